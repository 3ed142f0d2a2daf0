"""The Kronecker products nearest to a layer's Fisher block, from its rows (Koroko et al. 2022).

F = w sum (a a^T) (x) (g g^T) is approximated in Frobenius norm by R (x) S: the leading singular triplet of the
rearranged block (:mod:`fxcurv.ir.ops.rearranged`), by a power iteration, or the two leading ones, by restarted Lanczos.
The number of iterations is fixed, so that the host waits for nothing; a start near the last solution makes few of them
enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import Op
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.linalg import decompose, symmetric
from fxcurv.ir.ops.rearranged import Rearranged, rearranged, times
from fxcurv.ir.ops.rules import accumulator, count_of, grouped, need, need_rows, need_scalar, need_shape, promote
from fxcurv.ir.ops.statistics import ungroup
from fxcurv.ir.types import Psd, Rows, Sym, Type

RIDGE = 1e-3
"""Share of a fixed matrix in a start: an old solution that has become orthogonal to the new one would never leave."""


def _subset_examples(rows: Tensor, share: float) -> Tensor:
    """A share of the examples, evenly spaced, at least one: Rows (b, s, G, d) -> Rows (ceil(share b), s, G, d).

    Rows of both sides keep the same examples, so pairs stay pairs.
    """
    examples = rows.shape[0]
    kept = math.ceil(share * examples)
    places = torch.arange(kept, device=rows.device) * examples // max(kept, 1)
    return rows.index_select(0, places)


def _infer_subset(rows: Type, share: float) -> Type:
    need_rows("subset_examples", ("rows", rows))
    if not 0.0 < share <= 1.0:
        raise FxcurvError(f"operand 'share' of op 'subset_examples' is {share}; it must be above 0 and at most 1.")
    examples = rows.shape[0]
    return Rows((None if examples is None else math.ceil(share * examples), *rows.shape[1:]), rows.dtype)


def _start(olds: Sequence[Tensor], groups: int, generic: bool) -> Tensor:
    """Where to begin, (G, o, o): the sum of old solutions, each of norm 1, and a little of a fixed matrix.

    That is I, which no positive semidefinite solution is orthogonal to, or with ``generic`` a diagonal that tells
    the coordinates apart. An old solution of zeros has not been found yet, and then all of it is the fixed matrix.
    """
    parts = [old.to(accumulator(old.dtype)).reshape(groups, *old.shape[-2:]) for old in olds]
    size = parts[0].shape[-1]
    line = torch.linspace(1.0, 2.0 if generic else 1.0, size, dtype=parts[0].dtype, device=parts[0].device)
    fixed = torch.diag(line / line.norm())
    total = torch.zeros_like(parts[0])
    for part in parts:
        norm = part.square().sum(dim=(-2, -1)).sqrt()
        found = norm > 0
        old = times(part, torch.where(found, 1.0 / torch.where(found, norm, 1.0), 0.0))
        total = total + old + times(fixed.expand_as(part), torch.where(found, RIDGE, 1.0))
    return total


def _finish(z: Rearranged, u: Tensor, v: Tensor, dtype: torch.dtype, clip: bool) -> tuple[Tensor, Tensor]:
    """The factors that a pair of vectors stands for, with tr R >= 0; ``clip``: without negative eigenvalues."""
    R, S = (symmetric(z.leave(x, side)) for x, side in ((u, "a"), (v, "g")))
    sign = torch.where(R.diagonal(dim1=-2, dim2=-1).sum(dim=-1) < 0, -1.0, 1.0)
    R, S = (_clipped(times(M, sign)) if clip else times(M, sign) for M in (R, S))
    return ungroup(R).to(dtype).contiguous(), ungroup(S).to(dtype).contiguous()


def _clipped(M: Tensor) -> Tensor:
    values, vectors = decompose(M)
    return symmetric((vectors * values.clamp(min=0.0).unsqueeze(-2)) @ vectors.mT)


def _top_kron(
    a: Tensor,
    g: Tensor,
    weight: Tensor,
    start: Tensor,
    off: Sequence[Tensor],
    iterations: int,
    window: int = 0,
    hard: bool = False,
) -> tuple[Tensor, Tensor]:
    """(R, S) with R (x) S nearest to F - (R1 (x) S1) in Frobenius norm, |R| = |S|, tr R >= 0.

    F = weight * sum over examples and pairs of positions of k(|t - t'|) (a_t a_t'^T) (x) (g_t g_t'^T), with the
    triangular k(d) = 1 - d / (window + 1), or k(d) = 1 with ``hard``, for d <= window; window 0 takes positions as
    examples. By half a power iteration from ``start``, an earlier S (zeros for none; then from the identity), and
    ``iterations`` full ones. a: Rows (b, s, G, i), g: Rows (b, s, G, o); R: Psd (i, i), S: Psd (o, o), or with G; off:
    none, or [R1, S1], and then R and S are indefinite (Sym). A hard window is no positive kernel: its R and S lose what
    is negative in them. Koroko et al. 2022: KPSVD; with ``off`` DEFLATION and KFAC-CORRECTED.
    """
    z = rearranged(a, g, weight, off, window, hard)
    u, _ = z.unit(z.enter(_start([start], a.shape[2], bool(off))), "a")
    for _ in range(iterations):
        v, _ = z.unit(z.back(u), "g")
        u, _ = z.unit(z.forward(v), "a")
    v, sigma = z.unit(z.back(u), "g")
    root = sigma.sqrt()
    dtype = accumulator(torch.promote_types(a.dtype, g.dtype))
    return _finish(z, times(u, root), times(v, root), dtype, hard and not off)


def _top_two_kron(
    a: Tensor,
    g: Tensor,
    weight: Tensor,
    start: Tensor,
    start2: Tensor,
    dimension: int,
    restarts: int,
    window: int = 0,
    hard: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(R, S, R2, S2) with R (x) S + R2 (x) S2 nearest to F in Frobenius norm, by restarted Golub-Kahan-Lanczos.

    Krylov spaces of Z^T Z of ``dimension`` vectors, the first one from the sum of the earlier right singular vectors
    ``start`` and ``start2``; a restart keeps the two Ritz vectors and goes on with the last residual (thick restart:
    one that kept their sum alone would not converge to two triplets in two dimensions). F, a, g, window, hard and the
    norms of the results as in ``top_kron``; R, S: Psd, R2, S2: Sym. Koroko et al. 2022: LANCZOS.
    """
    z = rearranged(a, g, weight, [], window, hard)
    following, _ = z.unit(z.back(z.enter(_start([start, start2], a.shape[2], True))), "g")
    right: list[Tensor] = []
    left: list[Tensor] = []
    for _ in range(restarts):
        while len(right) < dimension:
            right.append(following)
            left.append(z.forward(following))
            following = _orthogonal(z, z.back(left[-1]), right)
        gram = torch.stack([torch.stack([z.inner(x, y, "a") for y in left], dim=-1) for x in left], dim=-2)
        values, vectors = decompose(symmetric(gram))
        kept = [vectors[..., -1 - rank] for rank in range(2)]
        right, left = ([_combined(basis, one) for one in kept] for basis in (right, left))
    found: list[Tensor] = []
    for rank in range(2):
        root = values[..., -1 - rank].clamp(min=0.0).pow(0.25)
        shrunk = torch.where(root > 0, 1.0 / torch.where(root > 0, root, 1.0), 0.0)
        dtype = accumulator(torch.promote_types(a.dtype, g.dtype))
        clip = hard and rank == 0
        found += _finish(z, times(left[rank], shrunk), times(right[rank], root), dtype, clip)
    return found[0], found[1], found[2], found[3]


def _orthogonal(z: Rearranged, x: Tensor, basis: Sequence[Tensor]) -> Tensor:
    """The unit vector of what is left of ``x`` beside the basis; zero where that is rounding."""

    def less(x: Tensor) -> tuple[Tensor, Tensor]:
        for one in basis:
            x = x - times(one, z.inner(one, x, "g"))
        return z.unit(x, "g")

    once, _ = less(z.unit(x, "g")[0])
    twice, norm = less(once)
    return times(twice, (norm > 0.5).to(x.dtype))


def _combined(basis: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    terms = [times(x, coefficients[:, j]) for j, x in enumerate(basis)]
    return torch.stack(terms).sum(dim=0)


def _need_common(name: str, a: Type, g: Type, weight: Any, window: int) -> tuple[Type, Type]:
    """Types of R and S of a first term."""
    need_rows(name, ("a", a), ("g", g))
    need_scalar(name, "weight", weight)
    if window < 0:
        raise FxcurvError(f"operand 'window' of op '{name}' is {window}; it must not be negative.")
    groups, dtype = a.shape[2], accumulator(promote(a, g))
    inputs, outputs = (Psd(grouped(groups, side.shape[3], side.shape[3]), dtype) for side in (a, g))
    return inputs, outputs


def _infer_top(
    a: Type,
    g: Type,
    weight: Any,
    start: Type,
    off: Sequence[Type],
    iterations: int,
    window: int = 0,
    hard: bool = False,
) -> tuple[Type, Type]:
    R, S = _need_common("top_kron", a, g, weight, window)
    need_shape("top_kron", "start", need("top_kron", "start", start, Sym), S.shape)
    if iterations < 0 or len(off) not in (0, 2):
        raise FxcurvError("op 'top_kron' takes iterations of at least 0, and no or two matrices to take off.")
    for given, one in zip(off, (R, S), strict=False):
        need_shape("top_kron", "off", need("top_kron", "off", given, Sym), one.shape)
    return (Sym(R.shape, R.dtype), Sym(S.shape, S.dtype)) if off else (R, S)


def _infer_two(
    a: Type,
    g: Type,
    weight: Any,
    start: Type,
    start2: Type,
    dimension: int,
    restarts: int,
    window: int = 0,
    hard: bool = False,
) -> tuple[Type, Type, Type, Type]:
    R, S = _need_common("top_two_kron", a, g, weight, window)
    for name, given in (("start", start), ("start2", start2)):
        need_shape("top_two_kron", name, need("top_two_kron", name, given, Sym), S.shape)
    if dimension < 3 or restarts < 1:
        raise FxcurvError("op 'top_two_kron' takes dimension of at least 3 and restarts of at least 1.")
    return R, S, Sym(R.shape, R.dtype), Sym(S.shape, S.dtype)


def _flops(a: Type, g: Type, applications: int, window: int) -> float:
    b, s, groups, i = (count_of(size) for size in a.shape)
    return 4.0 * applications * (window + 1) * groups * b * s * (i * i + count_of(g.shape[3]) ** 2)


def _rows() -> Iterator[tuple[Tensor, Tensor, tuple[int, ...]]]:
    draw = Draw(71)
    for b, s, groups, i, o in ((9, 1, 1, 4, 3), (4, 5, 1, 3, 2), (5, 2, 3, 2, 3), (40, 1, 1, 3, 2), (1, 1, 1, 1, 1)):
        yield draw.normal(b, s, groups, i), draw.normal(b, s, groups, o), (groups,) if groups > 1 else ()


def _top_samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(72)
    for a, g, groups in _rows():
        i, o = a.shape[3], g.shape[3]
        for window, hard in ((0, False), (2, False), (1, True)):
            yield a, g, draw.number(0.1), draw.psd(o, *groups), [], 3, window, hard
        if o > 1:
            off = [draw.psd(i, *groups), draw.psd(o, *groups)]
            yield a, g, draw.number(0.1), torch.zeros_like(off[1]), off, 40, 1, False
    yield draw.normal(0, 1, 1, 3), draw.normal(0, 1, 1, 2), draw.number(0.1), draw.psd(2), [], 3, 0, False


def _two_samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(73)
    for a, g, groups in _rows():
        o = g.shape[3]
        if o > 1:
            yield a, g, draw.number(0.1), draw.psd(o, *groups), torch.zeros(*groups, o, o).double(), 6, 8, 1, False


subset_examples = Op(
    "subset_examples",
    "(Tensor rows, float share) -> Tensor",
    _subset_examples,
    _infer_subset,
    lambda: ((a, share) for a, _, _ in _rows() for share in (0.25, 0.6, 1.0)),
)
top_kron = Op(
    "top_kron",
    "(Tensor a, Tensor g, Tensor weight, Tensor start, Tensor[] off, int iterations, int window=0, bool hard=False)"
    " -> (Tensor, Tensor)",
    _top_kron,
    _infer_top,
    _top_samples,
    flops=lambda a, g, weight, start, off, iterations, window=0, hard=False: _flops(a, g, iterations + 1, window),
)
top_two_kron = Op(
    "top_two_kron",
    "(Tensor a, Tensor g, Tensor weight, Tensor start, Tensor start2, int dimension, int restarts, int window=0, "
    "bool hard=False) -> (Tensor, Tensor, Tensor, Tensor)",
    _top_two_kron,
    _infer_two,
    _two_samples,
    flops=lambda a, g, weight, start, start2, dimension, restarts, window=0, hard=False: _flops(
        a, g, 2 + restarts * (dimension - 2), window
    ),
)
