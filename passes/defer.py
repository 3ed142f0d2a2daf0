"""defer: the statistics of small layers are taken together, when the backward pass is over.

A tap costs a hundred microseconds of Python, whatever it measures. Where at least ``min`` uses of layers have one form
and measure the same, their taps only note what the reductions will read; the run time then reduces all of them at once,
with the layers in the place of groups (see :mod:`fxcurv.runtime.deferred`). The values that arrive in the slots are the
same. What is large is still reduced in its tap: nothing is gained there, and its rows would be kept for longer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxcurv.ir.statistic import Call
from fxcurv.layers.linear import LinearForm
from fxcurv.layers.tap import TapSpec, pattern
from fxcurv.passes.manager import Compilation, Pass
from fxcurv.passes.tap import BoundTap, Tapped

Note = Callable[["DeferredTap", Tensor, Tensor, "tuple[Tensor, ...]"], Tensor]
"""(tap, y, x, states) -> y, once it is noted what to measure there."""


class DeferredTap(BoundTap):
    """A tap that leaves its reductions to ``later``, the graph's first input; an ordinary one where there is none.

    keys: of the statistics; kind: the very same object for taps that can be reduced together; order: the tap's place in
    the graph; elements: above this size of y it does its own work.
    """

    def __init__(self, spec: TapSpec, keys: tuple[str, ...], kind: Any, order: int, elements: int) -> None:
        super().__init__(spec)
        self.keys, self.kind, self.order, self.elements = keys, kind, order, elements

    def __call__(self, later: Note | None, y: Tensor, x: Tensor, *rest: Any) -> Tensor:  # type: ignore[override]
        if later is None or not 0 < y.numel() <= self.elements or x.layout is not torch.strided:
            return super().__call__(y, x, *rest)
        return later(self, y, x, rest[: len(self.spec.states)])


@dataclass(frozen=True)
class Defer(Pass):
    """Defers the reductions of taps of at least ``min`` equal uses whose output has at most ``elements`` elements."""

    elements: int = 1 << 16
    min: int = 4
    name: ClassVar[str] = "defer"

    def run(self, c: Compilation) -> int:
        if c.tapped is None:  # a method that reads gradients only
            return 0
        c.options["defer"] = self
        return sum(self.apply(tapped) for tapped in c.tapped.graphs)

    def apply(self, tapped: Tapped) -> int:
        """Change a tapped graph in place; returns how many taps are deferred."""
        kinds: dict[Any, list[fx.Node]] = {}
        for node in tapped.graph.nodes:
            if isinstance(node.target, BoundTap) and deferrable(node.target.spec):
                kinds.setdefault(kind_of(node.target.spec), []).append(node)
        chosen = [(kind, node) for kind, nodes in kinds.items() if len(nodes) >= self.min for node in nodes]
        if not chosen:
            return 0
        with tapped.graph.inserting_before(next(iter(tapped.graph.nodes))):
            later = tapped.graph.placeholder("later")
        order = {name: i for i, name in enumerate(tapped.taps)}  # as the program lists the layers
        for kind, node in chosen:
            bound: Any = node.target
            keys = tapped.taps[node.name]
            node.target = DeferredTap(bound.spec, keys, kind, order[node.name], self.elements)
            node.args = (later, *node.args)
        tapped.deferred = True
        tapped.graph.lint()
        return len(chosen)


def deferrable(spec: TapSpec) -> bool:
    """Whether a stack of the layer's inputs is a valid input of its form, and every statistic is a reduction."""
    form = spec.form
    linear = isinstance(form, LinearForm) and form.axis == -1 and form.groups == 1 and spec.aux == 0
    return linear and all(isinstance(expression, Call) for expression in spec.statistics)


def kind_of(spec: TapSpec) -> tuple[Any, ...]:
    """Equal for taps with one form that measure the same of their layers."""
    return (spec.form, *(pattern(expression) for expression in spec.statistics))
