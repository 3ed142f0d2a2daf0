"""Rescalings: one factor on all directions."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from torch import fx

from fxcurv.ir.program import Builder
from fxcurv.methods.facts import Facts
from fxcurv.methods.method import Rescale, hyper


@dataclass(frozen=True)
class KLClip(Rescale):
    """nu = min(1, sqrt(kl_clip / (lr^2 sum <U, V>))): a bound on the quadratic KL divergence of a step of length lr."""

    def factor(self, b: Builder, facts: Facts, pairs: list[tuple[fx.Node, fx.Node]]) -> fx.Node:
        dots = [b.dot(direction, gradient) for direction, gradient in pairs]
        return b.clip_kl(dots, hyper(b, facts, "lr"), hyper(b, facts, "kl_clip"))


def rescaling(o: SimpleNamespace) -> Rescale | None:
    """The rescaling that a method's hyper-parameters ask for."""
    return None if o.kl_clip is None else KLClip()
