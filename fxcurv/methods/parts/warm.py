"""A start without curvature: the plain gradient, clipped, while the factors are averages of few batches."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fxcurv.ir.program import Builder
from fxcurv.methods.facts import Facts, Target
from fxcurv.methods.method import hyper
from fxcurv.methods.parts.rescale import Pairs
from fxcurv.methods.parts.scope import Layers


@dataclass(frozen=True)
class ColdStart(Layers):
    """In the first ``cold_steps`` steps a direction is its gradient times min(1, cold_clip / |all gradients|).

    The clip is over the layers that are preconditioned; statistics and refreshes go on meanwhile.
    """

    def common(self, b: Builder, facts: Facts, pairs: Pairs) -> tuple[fx.Node, ...]:
        left = b.sub(hyper(b, facts, "cold_steps"), hyper(b, facts, "step"))
        limit = hyper(b, facts, "cold_clip")
        short = b.clip_kl([b.dot(gradient, gradient) for _, gradient in pairs], 1.0, b.mul(limit, limit))
        return b.safe_ratio(left, left), short  # 1 in the first steps, then 0

    def chosen(
        self,
        b: Builder,
        facts: Facts,
        target: Target,
        pair: tuple[fx.Node, fx.Node],
        common: tuple[fx.Node, ...],
    ) -> fx.Node:
        (direction, gradient), (cold, short) = pair, common
        return b.ema(b.scale(gradient, short), direction, cold)
