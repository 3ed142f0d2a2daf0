"""Second order at first, the plain gradient later: when the loss has stopped to fall fast, all layers retire.

Every step two averages of the loss are taken, over about 10 and 50 steps; their difference is how far the loss fell
between the middles of the two windows. In steps with statistics it is compared with the largest one so far. Once it is
less than ``switch_below`` times that, and not before ``switch_after`` losses, every layer is retired
(:data:`fxcurv.ir.schedule.RETIRED`): its update is its gradient from the next step on, and nothing is measured, updated
or preconditioned any more. The rule knows neither the zero nor the unit of the loss, is decided on the device from
states, and so goes on bit for bit when they are loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fxcurv.ir.program import STATISTICS, Builder
from fxcurv.ir.schedule import RETIRED
from fxcurv.methods.facts import Facts, Target
from fxcurv.methods.method import Method, hyper
from fxcurv.methods.parts.rankone import Inverses
from fxcurv.methods.parts.scope import Layers

QUICK, LASTING = 0.9, 0.98
"""Weights on the old value of the two averages."""
LOSS = "loss"
"""The number that the run time supplies: the loss of the coming step."""


@dataclass(frozen=True)
class Hybrid(Layers):
    """Layers whose update becomes the gradient for good, by the rule above."""

    def emit(self, b: Builder, method: Method, facts: Facts) -> None:
        scalar = facts.scalar()
        old = {part: b.input("state", f"switch.{part}", scalar, init="zeros") for part in ("steps", "fast", "slow")}
        found = b.loss_averages(hyper(b, facts, LOSS), *old.values(), QUICK, LASTING)
        new = {part: b.item(found, i) for i, part in enumerate(old)}
        best, over = (b.input("state", f"switch.{part}", scalar, init="zeros") for part in ("best", "over"))
        with b.within(at=STATISTICS):
            below, after = hyper(b, facts, "switch_below"), hyper(b, facts, "switch_after")
            found = b.loss_rule(new["fast"], new["slow"], best, over, new["steps"], below, after)
            new |= {part: b.item(found, i) for i, part in enumerate(("best", "over"))}
        for part, value in new.items():
            b.give("state", f"switch.{part}", value)
        super().emit(b, method, facts)
        for target in facts.targets:
            retired(b, facts, target)
            b.give("state", f"{target.name}.{RETIRED}", new["over"])

    def chosen(
        self, b: Builder, facts: Facts, target: Target, pair: tuple[fx.Node, fx.Node], common: tuple[fx.Node, ...]
    ) -> fx.Node:
        (direction, gradient), over = pair, retired(b, facts, target)
        return b.latest(b.ema(gradient, direction, over), gradient)  # the run time takes the gradient without asking


class Fading(Inverses):
    """Inverses that a retired layer leaves as they are."""

    def seen(self, b: Builder, facts: Facts, target: Target) -> fx.Node:
        return b.mul(super().seen(b, facts, target), b.sub(1.0, retired(b, facts, target)))


def retired(b: Builder, facts: Facts, target: Target) -> fx.Node:
    """1 where the layer has retired before this step, else 0."""
    with b.within(owner=(target.name,)):
        return b.input("state", f"{target.name}.{RETIRED}", facts.scalar(), init="zeros")
