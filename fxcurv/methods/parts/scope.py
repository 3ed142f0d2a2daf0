"""Scopes: one problem a layer, or one a tensor."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import fx

from fxcurv.ir.program import Builder
from fxcurv.ir.types import Tensor
from fxcurv.methods.facts import Facts, Target
from fxcurv.methods.method import Method, Scope
from fxcurv.methods.parts.unitwise import unitwise_direction


@dataclass(frozen=True)
class Layers(Scope):
    """Every layer is preconditioned on its own; a rescaling follows, common to all or of each its own.

    exact_norms: norm layers keep their whole (at most 2 x 2) block for each unit instead of the method's estimate.
    """

    exact_norms: bool = True

    def emit(self, b: Builder, method: Method, facts: Facts) -> None:
        targets = facts.targets if method.damp is None else method.damp.order(facts.targets)
        pairs = self.pairs(b, facts, (self._problem(b, method, facts, target) for target in targets))
        factors = factors_of(b, method, facts, pairs)
        common = self.common(b, facts, pairs)
        for i, (target, (direction, gradient)) in enumerate(zip(targets, pairs, strict=True)):
            with b.within(owner=(target.name,)):
                direction = b.scale(direction, factors[i]) if factors else direction
                target.update(b, self.chosen(b, facts, target, (direction, gradient), common))

    def common(self, b: Builder, facts: Facts, pairs: list[tuple[fx.Node, fx.Node]]) -> tuple[fx.Node, ...]:
        """What :meth:`chosen` needs to know of all layers' (direction, gradient), before the rescaling."""
        return ()

    def chosen(
        self, b: Builder, facts: Facts, target: Target, pair: tuple[fx.Node, fx.Node], common: tuple[fx.Node, ...]
    ) -> fx.Node:
        """What becomes of a layer's gradient in the end; pair: its (rescaled direction, gradient)."""
        return pair[0]

    def pairs(self, b: Builder, facts: Facts, problems: Iterator[Problem]) -> list[tuple[fx.Node, fx.Node]]:
        """(direction, gradient) of every problem."""
        return [(self.direction(b, facts, problem), problem.gradient) for problem in problems]

    def direction(self, b: Builder, facts: Facts, one: Problem) -> fx.Node:
        """What the layer's own curvature makes of its gradient."""
        with b.within(owner=(one.target.name,)):
            if one.parts is None:
                return unitwise_direction(b, one.method, facts, one.target, one.gradient)
            assert one.method.solve is not None
            return one.method.solve.direction(b, one.method, facts, one.target, one.gradient, one.parts)

    def _problem(self, b: Builder, method: Method, facts: Facts, target: Target) -> Problem:
        assert method.estimate is not None and method.track is not None
        damp = method.damp
        with b.within(owner=(target.name,)):
            gradient = target.gradient(b)
            if self.exact_norms and target.unitwise:
                return Problem(target, method, gradient)
            with b.within(at="statistics"):
                measured = method.estimate.measure(b, facts, target)
                if damp is not None:
                    measured = {**measured, **damp.measure(b, facts, target)}
                parts = method.track.follow(b, facts, target, measured)
            own = method if damp is None else replace(method, damp=damp.at(facts, target))
            return Problem(target, own, gradient, parts)


@dataclass(frozen=True)
class Problem:
    """A layer with its gradient in normal form and the parts of its curvature; method: with the layer's own damping.

    parts: ``None`` for a norm layer that keeps exact blocks.
    """

    target: Target
    method: Method
    gradient: fx.Node
    parts: dict[str, fx.Node] | None = None


class Tensors(Scope):
    """Abstract: every parameter tensor is preconditioned on its own, from its gradient alone; a rescaling follows."""

    def emit(self, b: Builder, method: Method, facts: Facts) -> None:
        pairs: list[tuple[fx.Node, fx.Node]] = []
        for name, shape in facts.parameters.items():
            with b.within(owner=(name,)):
                gradient = b.input("grad", name, Tensor(tuple(shape), facts.dtype))
                pairs.append((self.direction(b, method, facts, name, gradient), gradient))
        factors = factors_of(b, method, facts, pairs)
        for i, (name, (direction, _)) in enumerate(zip(facts.parameters, pairs, strict=True)):
            with b.within(owner=(name,)):
                b.give("update", name, b.scale(direction, factors[i]) if factors else direction)

    @abstractmethod
    def direction(self, b: Builder, method: Method, facts: Facts, name: str, gradient: fx.Node) -> fx.Node:
        """The update of one tensor, of the gradient's type."""


def factors_of(b: Builder, method: Method, facts: Facts, pairs: list[tuple[fx.Node, fx.Node]]) -> list[fx.Node]:
    """The rescaling's factor on each direction of the (direction, gradient) pairs, reported where it is one for all; an
    empty list without a rescaling."""
    factors = method.rescale.factors(b, facts, pairs) if method.rescale and pairs else []
    if len(set(factors)) == 1:
        b.give("info", "kl_scale", factors[0])
    return factors
