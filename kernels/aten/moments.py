"""Squared per-example gradients of one group, in pieces that stay in the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxcurv.ir.ops.rules import accumulator, align
from fxcurv.kernels.registry import Kernel, register

SMALL = 1 << 15
"""Elements of one example's gradient above which examples are taken one by one."""
CACHED = 1 << 17
"""Elements of a chunk of examples' gradients that still lie in the second-level cache."""


def grad_square(a: Tensor, g: Tensor) -> Tensor:
    """``grad_square`` of Rows (b, s, 1, i) and (b, s, 1, o).

    One position: one product of the squares. More: a batched product a chunk, or for large layers one product an
    example, squared and added in a single pass.
    """
    a, g = align(_rows(a), _rows(g))
    if a.shape[1] == 1:
        return g.squeeze(1).square().mT @ a.squeeze(1).square()
    total = a.new_zeros(g.shape[-1], a.shape[-1])
    if total.numel() > SMALL:
        for one_a, one_g in zip(a.unbind(), g.unbind(), strict=True):
            gradient = one_g.mT @ one_a
            total.addcmul_(gradient, gradient)
        return total
    step = max(1, CACHED // max(1, total.numel()))
    for part_a, part_g in zip(a.split(step), g.split(step), strict=True):
        total += torch.bmm(part_g.mT, part_a).square_().sum(dim=0)
    return total


def second_moment(a: Tensor, g: Tensor, QA: Tensor, QG: Tensor) -> Tensor:
    """``second_moment`` of one group: rows are turned by one product, then as ``grad_square``."""
    return grad_square(_turn(a, QA), _turn(g, QG))


def _rows(rows: Tensor) -> Tensor:
    rows = rows.to(accumulator(rows.dtype))
    return rows.squeeze(2) if rows.ndim == 4 else rows


def _turn(rows: Tensor, basis: Tensor) -> Tensor:
    x = _rows(rows)
    basis = basis.to(x.dtype)
    return x * basis if basis.ndim == 1 else x @ basis


def when(result: Any, a: Any, g: Any, *bases: Any) -> bool:
    """One group."""
    return bool(a.shape[2] == 1)


DOC = """Plain and batched products without the group dimension, in chunks that stay in the cache. On one CPU core,
against the reference: 1.1x for a linear layer 256 -> 128, 1.1x to 1.3x for small layers with positions, 1.6x to 3.5x
for 256 x 256 with 16 positions; with the change of basis 1.1x to 1.2x and 1.8x."""

register(Kernel("grad_square", "cached", "aten", when, grad_square, DOC))
register(Kernel("second_moment", "cached", "aten", when, second_moment, DOC))
