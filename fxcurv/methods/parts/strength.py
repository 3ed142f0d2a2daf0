"""Strengths: how large lambda is in a layer (sheet kronecker-1, Damping, item 4, and tekfac).

A fixed lambda is fair where the blocks of a network are alike. Those of convolutions differ by orders of magnitude, so
TKFAC and TEKFAC measure it by the block's own trace.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from fxcurv.ir.program import Builder
from fxcurv.methods.facts import Facts, Target
from fxcurv.methods.method import hyper

Mean = Callable[[], fx.Node]
"""Writes the nodes of the mean eigenvalue of a block, a Scalar or one a group: only where it is needed."""


class Strength(ABC):
    """Abstract: the lambda of a layer."""

    @abstractmethod
    def of(self, b: Builder, facts: Facts, mean: Mean, size: int) -> fx.Node:
        """lambda from the mean eigenvalue of the block, which has ``size`` of them."""

    def at(self, facts: Facts, target: Target) -> Strength:
        """The strength of one layer, where layers differ."""
        return self

    def order(self, targets: tuple[Target, ...]) -> tuple[Target, ...]:
        """See :meth:`fxcurv.methods.method.Damp.order`."""
        return targets


@dataclass(frozen=True)
class Fixed(Strength):
    """lambda = damping, everywhere."""

    def of(self, b: Builder, facts: Facts, mean: Mean, size: int) -> fx.Node:
        return hyper(b, facts, "damping")


@dataclass(frozen=True)
class MeanEigenvalue(Strength):
    """lambda_l = max(tr F_l, trace_floor) / dim F_l."""

    def of(self, b: Builder, facts: Facts, mean: Mean, size: int) -> fx.Node:
        return b.at_least(mean(), b.div(hyper(b, facts, "trace_floor"), float(size)))


@dataclass(frozen=True)
class Relative(MeanEigenvalue):
    """damping times that."""

    def of(self, b: Builder, facts: Facts, mean: Mean, size: int) -> fx.Node:
        return b.mul(super().of(b, facts, mean, size), hyper(b, facts, "damping"))


@dataclass(frozen=True)
class Following(Strength):
    """lambda = damping times the largest lambda of the layers ``leaders``, which have given theirs."""

    leaders: tuple[str, ...]

    def of(self, b: Builder, facts: Facts, mean: Mean, size: int) -> fx.Node:
        leading = [b.given("info", told(name)) for name in self.leaders]
        return b.mul(b.largest(leading), hyper(b, facts, "damping"))


@dataclass(frozen=True)
class ByKind(Fixed):
    """A convolution's lambda is the mean eigenvalue of its block, and a dense layer's follows that of convolutions.

    lambda_l = max(tr F_l, trace_floor) / dim F_l for convolutions, each group for itself; for any other layer damping
    times the largest of these, so that it keeps pace, and damping itself in a network without convolutions. Gao et al.
    2020 (TEKFAC), who give it for TKFAC too.
    """

    def at(self, facts: Facts, target: Target) -> Strength:
        if target.convolution:
            return MeanEigenvalue()
        leaders = tuple(other.name for other in facts.targets if other.convolution)
        return Following(leaders) if leaders else Fixed()

    def order(self, targets: tuple[Target, ...]) -> tuple[Target, ...]:
        return tuple(sorted(targets, key=lambda target: not target.convolution))


def told(layer: str) -> str:
    """Under which name a layer's lambda is given among a program's ``info``, where it is not damping itself."""
    return f"lambda.{layer}"
