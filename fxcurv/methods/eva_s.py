"""Eva-s: Shampoo with vectors in place of matrices."""

from __future__ import annotations

from types import SimpleNamespace

from torch import fx

from fxcurv.ir.program import STATISTICS, Builder
from fxcurv.methods.facts import Facts
from fxcurv.methods.method import Method, Source, hyper
from fxcurv.methods.parts.rescale import rescaling
from fxcurv.methods.parts.scope import Tensors
from fxcurv.methods.registry import published


class ModeMeans(Tensors):
    """U = (w w^T + lambda I)^-1 V, w the outer product of the gradient's means over all axes but one."""

    def direction(self, b: Builder, method: Method, facts: Facts, name: str, gradient: fx.Node) -> fx.Node:
        shape = gradient.meta["type"].shape
        modes = [mode for mode, size in enumerate(shape) if size > 1]
        if len(modes) < 2:
            return b.copy(gradient)
        updates = b.input("state", f"{name}.updates", facts.scalar(), init="zeros")
        means = []
        with b.within(at=STATISTICS):
            weight = b.ema_weight(updates, 1.0, hyper(b, facts, "ema"))
            b.give("state", f"{name}.updates", b.tick(updates, 1.0))
            for mode in modes:
                mean = b.mode_mean(gradient, mode)
                old = b.input("state", f"{name}.v{mode}", mean.meta["type"], init="zeros")
                means.append(b.ema(old, mean, weight))
                b.give("state", f"{name}.v{mode}", means[-1])
            rest = b.outer_all(means[1:])
        order = [modes[0], *(axis for axis in range(len(shape)) if axis != modes[0])]
        matrix = b.matricize(gradient, order, [shape[modes[0]], rest.meta["type"].shape[0]])
        direction = b.rank1_apply(matrix, rest, means[0], hyper(b, facts, "damping"))
        return b.tensorize(direction, order, list(shape))


@published("eva_s", papers=(13,), damping=0.03, ema=0.05, kl_clip=1e-3, rescale="graft")
def eva_s(o: SimpleNamespace) -> Method:
    """Eva-s: precondition every gradient tensor with the outer product of its means over all axes but one.

    With v_i the mean of the gradient over all axes but i (row means and column means of a matrix) and w = v_1 o ... o
    v_k,

        U = (w w^T + damping I)^-1 V = [V - <V, w> / (damping + |v_1|^2 ... |v_k|^2) w] / damping,

    shampoo with the root left out and a vector for each of its Grams; then U gets the length of V, which makes
    1/damping immaterial. For a matrix it is eva's formula with (v_2, v_1) for (abar, gbar). Axes of size one are no
    modes, and tensors with fewer than two modes keep their gradient. ema: weight of the OLD means, as in eva. rescale:
    "graft" (each tensor as long as its gradient), "match" (all tensors together), "kl" (bounds lr^2 sum <U, V> by
    kl_clip) or "none". Needs only gradients.

    Cost: one pass over the gradient for each mode and 6 flops an element; memory d_1 + ... + d_k a tensor, where
    shampoo has d_1^2 + ... + d_k^2 and their roots. Choose it over shampoo where these do not fit, over eva for
    parameters that belong to no layer.

    Source: Zhang, Shi & Li 2023, section 3.3 and the authors' prototype. damping and ema are eva's: published values
    for Eva-s are not known.
    """
    return Method(name="eva_s", source=Source("gradient"), scope=ModeMeans(), rescale=rescaling(o))
