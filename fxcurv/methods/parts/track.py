"""Tracks: how an estimate is carried from batch to batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fxcurv.ir.program import Builder
from fxcurv.methods.facts import Facts, Target
from fxcurv.methods.method import Track, hyper


@dataclass(frozen=True)
class EMA(Track):
    """Exponential moving average with weight min(1 - 1/k, ema) on the old value at the k-th update.

    Source: Martens & Grosse 2015, section 5. A batch in which the layer was not reached counts as no update.
    """

    def follow(self, b: Builder, facts: Facts, target: Target, parts: dict[str, fx.Node]) -> dict[str, fx.Node]:
        count = self.counted(b, facts, target, parts)
        updates = b.input("state", f"{target.name}.updates", facts.scalar(), init="zeros")
        weight = b.ema_weight(updates, count, hyper(b, facts, "ema"))
        b.give("state", f"{target.name}.updates", b.tick(updates, count))
        followed = {}
        for part, value in parts.items():
            key = f"{target.name}.{part}"
            followed[part] = self.averaged(b, key, value, weight)
            b.give("state", key, followed[part])
        return followed

    def averaged(self, b: Builder, key: str, value: fx.Node, weight: fx.Node) -> fx.Node:
        """The next value of the state ``key``: the old one with this weight, the rest the new one's."""
        return b.ema(b.input("state", key, value.meta["type"], init="zeros"), value, weight)

    def counted(self, b: Builder, facts: Facts, target: Target, parts: dict[str, fx.Node]) -> fx.Node:
        """How many rows of this batch count; with none everything stays as it was."""
        return b.count(target.rows(b, "a"))


@dataclass(frozen=True)
class Reached(EMA):
    """An average over the batches that reached the layer's output: its input rows may be there for another's sake."""

    def counted(self, b: Builder, facts: Facts, target: Target, parts: dict[str, fx.Node]) -> fx.Node:
        return b.count(target.rows(b, "g"))
