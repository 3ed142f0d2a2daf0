"""Nothing is timed before it is right: fxcurv's factors against the rows', a peer's against fxcurv's, in float64."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from workloads import Workload

from fxcurv.methods.conventions import convert
from peer_adapters import build, rows
from peer_adapters.side import Cadence, Factors

TOLERANCE = 1e-10

SQUARES = {"asdl": 1, "curvlinops": -1, "singd": -1, "nngeometry": -1}
"""Power of the outputs' width on G for a squared error that also averages over outputs: ASDL sums its loss over them,
the others are given the mean's gradients; fxcurv's G is between: that of the Gaussian with the loss's Hessian."""
SAMPLED = ("backpack",)
"""Libraries whose G is random: only A is compared."""


class Wrong(Exception):
    """A library's factors are not what its convention says."""


def distance(x: Tensor, y: Tensor) -> float:
    """Relative Frobenius distance of x from y."""
    return float((x - y).norm() / y.norm())


def check_fxcurv(work: Workload, net: nn.Module) -> tuple[Factors, float]:
    """Factors of fxcurv on a small batch and their largest distance from the rows'; raises :class:`Wrong`."""
    side = build("fxcurv", work, copy.deepcopy(net), Cadence())
    side.step()
    found, oracle = side.factors(), rows.factors(work, copy.deepcopy(net))
    missing = sorted(set(oracle) - set(found))
    if missing:
        raise Wrong(f"fxcurv has no factors of {missing[0]}")
    error = max(distance(x, y) for name in oracle for x, y in zip(found[name], oracle[name], strict=True))
    if not error < TOLERANCE:
        raise Wrong(f"fxcurv's factors are {error:.1e} off")
    return found, error


def check_peer(library: str, work: Workload, net: nn.Module, ours: Factors) -> float:
    """Largest distance of a peer's factors from ours in its own convention; raises :class:`Wrong`, or its error."""
    observed = rows.observe(work, copy.deepcopy(net))
    side = build(library, work, copy.deepcopy(net), Cadence())
    side.step()
    width = work.targets[0].numel() if work.targets.is_floating_point() else 1
    worst = 0.0
    for name, theirs in side.factors().items():
        a, g = ours[name]
        seen = observed[name]
        scale = float(width) ** SQUARES.get(library, 0)
        positions = len(seen.a[0]) // work.terms if seen.image is not None else 1
        if library in SAMPLED:
            expected = {"A": a, "G": theirs[1]}
        else:
            expected = convert({"A": a, "G": g * scale}, library, terms=work.terms, positions=positions)
        wanted = expected["A"] * seen.uses  # a module called T times: all of them add the calls' second moments
        wanted = wanted[: len(theirs[0]), : len(theirs[0])]  # without the bias coordinate where they have none
        worst = max(worst, distance(theirs[0], wanted), distance(theirs[1], expected["G"]))
    if not worst < TOLERANCE:
        raise Wrong(f"its factors are {worst:.1e} off")
    return worst
