"""Rescalings by name: a factor on every direction (sheet kronecker-1, Damping, item 8).

U is a direction, V the gradient that it was made of. Where the curvature alone says how long a step should be there is
none; where it is old, coarse or free of scale, a factor brings the length back.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from torch import fx

from fxcurv.errors import FxcurvError
from fxcurv.ir.program import Builder
from fxcurv.methods.facts import Facts
from fxcurv.methods.method import Rescale, hyper

Pairs = list[tuple[fx.Node, fx.Node]]


@dataclass(frozen=True)
class KLClip(Rescale):
    """nu = min(1, sqrt(halves kl_clip / (lr^2 sum <U, V>))): a bound on the KL divergence of a step of length lr.

    <U, V> is u^T F u of the operator that was inverted. halves: 1 bounds lr^2 nu^2 u^T F u by kl_clip (as distributed
    K-FAC does), 2 bounds the divergence itself, half of that (ACKTR, Wu et al. 2017: lr is then eta_max).
    """

    halves: int = 1

    def factors(self, b: Builder, facts: Facts, pairs: Pairs) -> list[fx.Node]:
        dots = [b.dot(direction, gradient) for direction, gradient in pairs]
        lr, bound = hyper(b, facts, "lr"), hyper(b, facts, "kl_clip")
        if self.halves != 1:
            bound = b.mul(bound, float(self.halves))
        return [b.clip_kl(dots, lr, bound)] * len(pairs)


@dataclass(frozen=True)
class MatchNorm(Rescale):
    """nu = sqrt(sum |V|^2 / sum |U|^2): all directions together are as long as the gradient (Eva without a clip)."""

    def factors(self, b: Builder, facts: Facts, pairs: Pairs) -> list[fx.Node]:
        wanted = [b.dot(gradient, gradient) for _, gradient in pairs]
        given = [b.dot(direction, direction) for direction, _ in pairs]
        return [b.match_norm(wanted, given)] * len(pairs)


@dataclass(frozen=True)
class Graft(Rescale):
    """nu_l = |V_l| / |U_l|: every layer's direction is as long as its own gradient (MKOR, Eva-s)."""

    def factors(self, b: Builder, facts: Facts, pairs: Pairs) -> list[fx.Node]:
        return [b.sqrt(b.safe_ratio(b.dot(v, v), b.dot(u, u))) for u, v in pairs]


RESCALES: dict[str, Rescale | None] = {
    "kl": KLClip(),
    "trust": KLClip(halves=2),
    "match": MatchNorm(),
    "graft": Graft(),
    "none": None,
}
"""By name; "kl" and "trust" read kl_clip and lr, and do nothing with kl_clip=None."""


def rescaling(o: SimpleNamespace) -> Rescale | None:
    """The rescaling that a method's hyper-parameters ask for: ``rescale``, "kl" where it has none, and ``kl_clip``."""
    name = getattr(o, "rescale", "kl")
    if name not in RESCALES:
        raise FxcurvError(f"rescale='{name}' is unknown; choose one of {', '.join(RESCALES)}.")
    found = RESCALES[name]
    return None if isinstance(found, KLClip) and getattr(o, "kl_clip", None) is None else found
