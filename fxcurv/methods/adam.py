"""Adam: the baseline of diagonal methods."""

from __future__ import annotations

from types import SimpleNamespace

from torch import fx

from fxcurv.ir.program import Builder
from fxcurv.methods.facts import Facts
from fxcurv.methods.method import Method, Source, hyper
from fxcurv.methods.parts.scope import Tensors
from fxcurv.methods.registry import published


class Moments(Tensors):
    """m / (sqrt(v) + epsilon) with debiased moving averages of the gradient and its square."""

    def direction(self, b: Builder, method: Method, facts: Facts, name: str, gradient: fx.Node) -> fx.Node:
        return adaptive(b, facts, name, gradient, b.square(gradient))


def adaptive(
    b: Builder, facts: Facts, name: str, gradient: fx.Node, square: fx.Node, power: fx.Node | None = None
) -> fx.Node:
    """m / (v^(power/2) + epsilon), m and v the debiased moving averages of ``gradient`` and ``square``."""
    k = b.add(b.input("state", f"{name}.updates", facts.scalar(), init="zeros"), 1.0)
    b.give("state", f"{name}.updates", k)
    averages = []
    for part, beta, value in (("m", "beta1", gradient), ("v", "beta2", square)):
        old = b.input("state", f"{name}.{part}", value.meta["type"], init="zeros")
        new = b.moving(old, value, hyper(b, facts, beta))
        b.give("state", f"{name}.{part}", new)
        averages.append(b.bias_correct(new, hyper(b, facts, beta), k))
    m, root = averages[0], b.sqrt(averages[1])
    return b.damped_divide(m, root if power is None else b.power(root, power), hyper(b, facts, "epsilon"))


@published("adam", papers=(57,), beta1=0.9, beta2=0.999, epsilon=1e-8, momentum=0.0, lr=1e-3)
def adam(o: SimpleNamespace) -> Method:
    """Adam: divide the averaged gradient by the root of the averaged squared gradient.

    U = mh / (sqrt(vh) + epsilon) with m = beta1 m + (1 - beta1) V, v = beta2 v + (1 - beta2) V^2, mh = m / (1 -
    beta1^k) and vh = v / (1 - beta2^k) after k steps; momentum is inside, so the optimizer adds none.

    Cost: a handful of operations a parameter; memory two numbers a parameter. Choose it as the baseline of adaptive
    methods, and where a step has to be cheap; over diag for gradients without examples.

    Source: Kingma & Ba 2014, algorithm 1, with the paper's defaults.
    """
    return Method(name="adam", source=Source("gradient"), scope=Moments())
