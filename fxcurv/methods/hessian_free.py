"""Hessian-free optimisation: a truncated Newton step with the Gauss-Newton matrix."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from fxcurv.ir.program import Builder
from fxcurv.ir.types import Scalar, Tensor
from fxcurv.methods.facts import Facts
from fxcurv.methods.method import Method, Rule, Scope, Source, hyper
from fxcurv.methods.registry import published


@dataclass(frozen=True)
class ConjugateGradients(Scope):
    """Solve (GGN + lambda I) x = -g for the whole network; the iterates go to the optimizer's backtracking."""

    iterations: int = 250
    tolerance: float = 5e-4

    def emit(self, b: Builder, method: Method, facts: Facts) -> None:
        names = list(facts.parameters)
        gradients = [b.input("grad", n, Tensor(tuple(facts.parameters[n]), facts.dtype)) for n in names]
        oracle = b.input("oracle", "ggn", Scalar((), facts.dtype))
        target = b.neg(b.pack(gradients))
        previous = b.input("state", "network.x", target.meta["type"], init="zeros")
        start = b.scale(previous, hyper(b, facts, "zeta"))
        solved = b.cg(oracle, target, start, hyper(b, facts, "damping"), self.iterations, self.tolerance)
        last, kept, values = (b.item(solved, i) for i in range(3))
        b.give("state", "network.x", last)
        b.give("info", "iterates", kept)
        b.give("info", "model_values", values)
        offset = 0
        descent = b.neg(last)  # an update is subtracted by the optimizer
        for name in names:
            shape = list(facts.parameters[name])
            b.give("update", name, b.unpack(descent, offset, shape))
            offset += facts.parameters[name].numel()


@published(
    "hessian_free",
    papers=(43,),
    damping=1.0,
    zeta=0.95,
    iterations=250,
    tolerance=5e-4,
    solve_every=1,
    momentum=0.0,
    lr=1.0,
)
def hessian_free(o: SimpleNamespace) -> Method:
    """Hessian-free: conjugate gradients on the damped Gauss-Newton matrix, backtracking, line search, adaptive damping.

    Solves (G + damping I) x = -g from zeta times the last solution, stops on the relative progress of the quadratic
    model, keeps iterates at 1.3^j, takes the best of them by the true loss, searches the step length and adapts the
    damping by the ratio of true to predicted decrease (Levenberg-Marquardt). Only through ``fxcurv.optimizer``, with a
    closure and a batch large enough for curvature. iterations: at most of conjugate gradients. tolerance: relative
    progress of the model per iteration, over the last tenth of them, below which they stop. zeta: what is left of the
    last solution as the next start. Options of the optimizer: backtrack, armijo, tries, raise_damping, lower_damping,
    min_damping.

    Cost: up to iterations products with the curvature a step, each about two plain backward passes, and a forward pass
    for every iterate and step length tried; memory some tens of vectors of the network's size (the kept iterates), no
    factor of any layer. Choose it for small networks on large batches, where a few very good steps are worth seconds
    each; over kfac where layers do not decouple. On small batches it fits their noise.

    Source: Martens 2010, sections 3-4; Martens & Sutskever 2012 for zeta. Tolerance and
    iterations are those of the first paper; its damping depends on the problem, 1 is that of public implementations.
    """
    return Method(
        name="hessian_free",
        source=Source("ggn_product"),
        scope=ConjugateGradients(o.iterations, o.tolerance),
        rule=Rule(kind="newton"),
    )
