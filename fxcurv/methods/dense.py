"""Dense matrices of what a method keeps as factors: for oracles, tests and ``fxcurv approx``, never for a step.

The order is that of ``[W b].flatten()``: row-major, so that the output factor comes first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def full(factor: Tensor, size: int) -> Tensor:
    """A factor as a matrix (..., size, size): one that is kept as its diagonal (..., size) is spread out."""
    return factor if factor.shape[-2:] == (size, size) else torch.diag_embed(factor)


def kron(left: Tensor, right: Tensor) -> Tensor:
    """The Kronecker product of matrices (..., m, n) and (..., p, q), (..., m p, n q); leading dimensions agree."""
    product = left[..., :, None, :, None] * right[..., None, :, None, :]
    return product.flatten(-4, -3).flatten(-2)
