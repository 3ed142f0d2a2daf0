"""The product of a matrix with its own transpose: each entry of the lower triangle computed once, then mirrored."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
"""Rows of a slab. Below two slabs, with few columns, and on other devices, one product of the whole is faster."""


def add_product(x: Tensor, total: Tensor | None) -> Tensor:
    """``x @ x.T`` for x (d, n), added to ``total`` in place where there is one."""
    d = len(x)
    if d < 2 * BLOCK or x.shape[1] < 2 * BLOCK or x.device.type != "cpu":
        return x @ x.t() if total is None else total.addmm_(x, x.t())
    result = x.new_empty(d, d) if total is None else total
    for start in range(0, d, BLOCK):
        stop = min(start + BLOCK, d)
        slab = result[start:stop, :stop]
        if total is None:
            torch.mm(x[start:stop], x[:stop].t(), out=slab)
        else:
            slab.addmm_(x[start:stop], x[:stop].t())
        result[:start, start:stop] = result[start:stop, :start].t()
    return result
