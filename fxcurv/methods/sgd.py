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
    """SGD with momentum: the baseline, the direction is the gradient."""
    return Method(name="sgd", source=Source("gradient"), scope=Plain())
