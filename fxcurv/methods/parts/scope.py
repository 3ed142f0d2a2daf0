"""Scopes: one problem a layer, or one a tensor."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import fx

from fxcurv.ir.program import Builder
from fxcurv.ir.types import Tensor
from fxcurv.methods.facts import Facts
from fxcurv.methods.method import Method, Scope
from fxcurv.methods.parts.unitwise import unitwise_direction


@dataclass(frozen=True)
class Layers(Scope):
    """Every layer is preconditioned on its own; a common rescaling follows.

    exact_norms: norm layers keep their whole (at most 2 x 2) block for each unit instead of the method's estimate.
    """

    exact_norms: bool = True

    def emit(self, b: Builder, method: Method, facts: Facts) -> None:
        assert method.estimate is not None and method.track is not None and method.solve is not None
        pairs: list[tuple[fx.Node, fx.Node]] = []
        for target in facts.targets:
            with b.within(owner=(target.name,)):
                gradient = target.gradient(b)
                if self.exact_norms and target.unitwise:
                    direction = unitwise_direction(b, method, facts, target, gradient)
                else:
                    with b.within(at="statistics"):
                        parts = method.track.follow(b, facts, target, method.estimate.measure(b, facts, target))
                    direction = method.solve.direction(b, method, facts, target, gradient, parts)
                pairs.append((direction, gradient))
        factor = method.rescale.factor(b, facts, pairs) if method.rescale and pairs else None
        if factor is not None:
            b.give("info", "kl_scale", factor)
        for target, (direction, _) in zip(facts.targets, pairs, strict=True):
            with b.within(owner=(target.name,)):
                target.update(b, direction if factor is None else b.scale(direction, factor))


class Tensors(Scope):
    """Abstract: every parameter tensor is preconditioned on its own, from its gradient alone."""

    def emit(self, b: Builder, method: Method, facts: Facts) -> None:
        for name, shape in facts.parameters.items():
            with b.within(owner=(name,)):
                gradient = b.input("grad", name, Tensor(tuple(shape), facts.dtype))
                b.give("update", name, self.direction(b, method, facts, name, gradient))

    @abstractmethod
    def direction(self, b: Builder, method: Method, facts: Facts, name: str, gradient: fx.Node) -> fx.Node:
        """The update of one tensor, of the gradient's type."""
