"""Shampoo: one Gram of the gradient a tensor dimension."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from torch import fx

from fxcurv.errors import FxcurvError
from fxcurv.ir.program import REFRESH, STATISTICS, Builder
from fxcurv.methods.facts import Facts
from fxcurv.methods.method import Method, Source, flag, hyper
from fxcurv.methods.parts.scope import Tensors
from fxcurv.methods.registry import published


@dataclass(frozen=True)
class ModeGrams(Tensors):
    """U = G x_1 H_1^(-1/2k) ... x_k H_k^(-1/2k), H_i the accumulated Gram of mode i of a k-mode gradient.

    average: "sum" accumulates as in the paper, "ema" forgets with weight ``ema`` on the old value.
    """

    average: str = "sum"

    def direction(self, b: Builder, method: Method, facts: Facts, name: str, gradient: fx.Node) -> fx.Node:
        shape = gradient.meta["type"].shape
        modes = [mode for mode, size in enumerate(shape) if size > 1] or ([0] if shape else [])
        direction = gradient
        for mode in modes:
            wide = shape[mode] > facts.max_factor_dim
            with b.within(at=STATISTICS):
                gram = b.mode_diag(gradient, mode) if wide else b.mode_gram(gradient, mode)
                old = b.input("state", f"{name}.H{mode}", gram.meta["type"], init="zeros")
                new = b.add(old, gram) if self.average == "sum" else b.moving(old, gram, hyper(b, facts, "ema"))
            b.give("state", f"{name}.H{mode}", new)
            with b.within(at=REFRESH):
                root = b.inverse_root(new, 2 * len(modes), hyper(b, facts, "epsilon"), *flag(new))
            direction = b.mode_apply(direction, root, mode)
        return direction if modes else b.copy(gradient)


@published("shampoo", papers=(28,), epsilon=1e-4, average="sum", ema=0.95, max_factor_dim=1024, lr=0.01)
def shampoo(o: SimpleNamespace) -> Method:
    """Shampoo: precondition every mode of a gradient tensor with an inverse root of its accumulated Gram.

    For a matrix U = L^-1/4 G R^-1/4 with L = epsilon I + sum G G^T, R = epsilon I + sum G^T G; a vector gets
    full-matrix AdaGrad; a mode wider than max_factor_dim gets a diagonal. Dimensions of size one are no modes. Needs
    only gradients. average: "sum" accumulates as in the paper, so that steps shrink as in AdaGrad; "ema" forgets, with
    weight ema on the old Gram. epsilon: what the Grams start from.

    Cost: d_in d_out (d_in + d_out) for the Grams in every step with statistics, an eigendecomposition of each at a
    refresh, and as much as the Grams to apply the roots; memory 2 (d_in^2 + d_out^2). Nothing depends on the batch's
    size. Choose it over kfac where only gradients are to be had (no layers that can be detected, losses without known
    curvature); over adam where gradients are matrices with strong correlations.

    Source: Gupta, Koren & Singer 2018, algorithms 1 and 2. "ema" and its weight are later practice; epsilon is the
    paper's, max_factor_dim and the learning rate are ours.
    """
    if o.average not in ("sum", "ema"):
        raise FxcurvError(f"average='{o.average}' must be 'sum' or 'ema'.")
    return Method(name="shampoo", source=Source("gradient"), scope=ModeGrams(o.average))
