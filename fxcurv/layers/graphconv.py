"""Sparse data on a weight: features or adjacencies stored as ``torch.sparse`` tensors.

A graph convolution needs no layer kind of its own. Its product ``x @ W`` is linear with one row for each node (or
edge), and the aggregation over neighbours is an operation on data, like any other between two layers: the gradient rows
that arrive at the product have passed it. A bias added after the aggregation belongs to the aggregated nodes and not to
the rows of ``x``, so that it is a shift (:mod:`fxcurv.layers.elements`) and no coordinate of the product.

What is left are products whose data is itself sparse: an adjacency that meets the weight directly (a network without
node features), or bag-of-words features.
"""

from __future__ import annotations

from typing import Any

import torch

from fxcurv.layers.products import _addmm, _matmul
from fxcurv.layers.spelling import Match, Site, spelling

aten = torch.ops.aten


@spelling(torch.sparse.mm, "smm", aten._sparse_mm.default)
def _sparse_mm(at: Site, mat1: Any, mat2: Any) -> Match:
    return _matmul(at, mat1, mat2)


@spelling(torch.sparse.addmm, aten._sparse_addmm.default)
def _sparse_addmm(at: Site, mat: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> Match:
    return _addmm(at, mat, mat1, mat2, beta=beta, alpha=alpha)
