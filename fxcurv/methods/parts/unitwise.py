"""The whole curvature block of every unit of a norm layer (sheet distributed, sp-ngd: unit-wise Fisher).

A scale and a shift make a 2 x 2 block for each unit c: F_c = mean over examples of h h^T, h the example's gradient of
(scale_c, shift_c), summed over its positions *before* the product. The block is small, so no approximation is needed.
"""

from __future__ import annotations

from torch import fx

from fxcurv.ir.program import REFRESH, STATISTICS, Builder
from fxcurv.methods.facts import Facts, Target
from fxcurv.methods.method import Method, curvature_weight, hyper


def unitwise_direction(b: Builder, method: Method, facts: Facts, target: Target, gradient: fx.Node) -> fx.Node:
    """(F_c + lambda I)^-1 times the gradient of every unit, F_c tracked as the method tracks its factors."""
    assert method.track is not None
    with b.within(at=STATISTICS):
        blocks = b.grad_gram(target.rows(b, "a"), target.rows(b, "g"))
        parts = method.track.follow(b, facts, target, {"F": b.scale(blocks, curvature_weight(b, facts))})
    with b.within(at=REFRESH):
        inverse = b.inverse(parts["F"], hyper(b, facts, "damping"))
    return b.unit_apply(gradient, inverse)
