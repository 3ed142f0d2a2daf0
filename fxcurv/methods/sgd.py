"""The baseline: no preconditioner at all."""

from __future__ import annotations

from types import SimpleNamespace

from torch import fx

from fxcurv.ir.program import Builder
from fxcurv.methods.facts import Facts
from fxcurv.methods.method import Method, Source
from fxcurv.methods.parts.scope import Tensors
from fxcurv.methods.registry import published


class Plain(Tensors):
    """The gradient itself."""

    def direction(self, b: Builder, method: Method, facts: Facts, name: str, gradient: fx.Node) -> fx.Node:
        return b.copy(gradient)


@published("sgd")
def sgd(o: SimpleNamespace) -> Method:
    """SGD with momentum: the baseline, the direction is the gradient.

    U = V; with fxcurv.optimizer v = momentum v + U and W = W - lr v, or W = W - lr (U + momentum v) with nesterov.

    Cost: nothing beyond the gradient; memory one number a parameter for the momentum. Choose it as the baseline: tune
    its learning rate and momentum before saying that another method is better.

    Source: Robbins & Monro 1951, Polyak 1964 for the momentum; the learning rate and the momentum are common practice.
    """
    return Method(name="sgd", source=Source("gradient"), scope=Plain())
