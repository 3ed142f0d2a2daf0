"""AdaHessian: Adam with the Hessian's diagonal in place of squared gradients."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from fxcurv.ir.program import STATISTICS, Builder
from fxcurv.ir.types import Scalar, Tensor
from fxcurv.methods.adam import adaptive
from fxcurv.methods.facts import Facts
from fxcurv.methods.method import Method, Scope, Source, hyper
from fxcurv.methods.registry import published


@dataclass(frozen=True)
class HutchinsonDiagonal(Scope):
    """Probes the Hessian with random signs z: the diagonal estimate is z * (H z), one product for all parameters.

    blocks: average the estimate over the kernel elements of every filter of a convolution.
    """

    blocks: bool = True

    def emit(self, b: Builder, method: Method, facts: Facts) -> None:
        names = list(facts.parameters)
        gradients = [b.input("grad", n, Tensor(tuple(facts.parameters[n]), facts.dtype)) for n in names]
        oracle = b.input("oracle", "hessian", Scalar((), facts.dtype))
        key = [hyper(b, facts, "seed"), hyper(b, facts, "step")]
        with b.within(at=STATISTICS):
            signs = [b.signs(gradient, *key, stream) for stream, gradient in enumerate(gradients)]
            products = b.hvp(oracle, signs)
        for i, (name, gradient) in enumerate(zip(names, gradients, strict=True)):
            with b.within(owner=(name,)):
                with b.within(at=STATISTICS):
                    diagonal = b.mul(signs[i], b.item(products, i))
                    if self.blocks and len(facts.parameters[name]) > 2:
                        diagonal = b.trailing_mean(diagonal, len(facts.parameters[name]) - 2)
                    square = b.square(diagonal)
                kept = b.input("state", f"{name}.D2", square.meta["type"], init="zeros")
                latest = b.latest(square, kept)
                b.give("state", f"{name}.D2", latest)
                b.give("update", name, adaptive(b, facts, name, gradient, latest, hyper(b, facts, "hessian_power")))


@published(
    "adahessian",
    papers=(58,),
    beta1=0.9,
    beta2=0.999,
    epsilon=1e-4,
    hessian_power=1.0,
    blocks=True,
    momentum=0.0,
    lr=0.03,
)
def adahessian(o: SimpleNamespace) -> Method:
    """AdaHessian: Adam whose second moment is the squared Hessian diagonal, estimated with one random probe a step.

    D = z * (H z) with random signs z, averaged over the kernel elements of a convolution's filters (blocks=True);
    U = mh / (vh^(hessian_power/2) + epsilon), v the moving average of D^2. With factor_every > 1 the last D is kept
    between probes. The block mean is taken of D itself, as the paper writes it, not of |D|. The paper's learning rate
    0.15 (image classification, with a schedule) overshoots in the first steps, where D is near 0: the default is lower.

    epsilon: added to the root. blocks: whether to average over the kernel elements.

    Cost: one product with the Hessian in every step with statistics, that is a second backward pass through the first
    (about two plain steps), and Adam's operations; memory three numbers a parameter, and the graph of the first
    backward pass while the product runs. Choose it over adam where curvature differs much between parameters and is not
    told by gradients; over kfac for models whose layers it cannot see, and for its memory.

    Source: Yao et al. 2020, equations 4-11; betas, epsilon and hessian_power as there, the learning rate ours.
    """
    return Method(name="adahessian", source=Source("hessian"), scope=HutchinsonDiagonal(o.blocks))
