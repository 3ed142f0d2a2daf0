"""Grouped products of a mixture of experts: rows sorted by expert, each block of rows with a matrix of its own.

The fused operation is one node whose stack of matrices meets rows by offsets. Exposed, every row has a place for every
expert, zero but for its own, and the product is an einsum with the experts as groups: kron(G, A) of an expert is made
of its own rows. A statistic step pays for it with as many times the rows as there are experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.layers.expose import Exposure, exposes
from fxcurv.layers.view import Refused

_GROUPED: tuple[Any, ...] = ("transformers.grouped_mm_fallback.default", "transformers.grouped_mm_fallback")
_GROUPED += tuple(  # where this torch has them
    function
    for owner, name in (
        (getattr(torch.ops.aten, "_grouped_mm", None), "default"),
        (torch, "_grouped_mm"),
        (torch.nn.functional, "grouped_mm"),
    )
    if (function := getattr(owner, name, None)) is not None
)


def own_rows(rows: Tensor, offsets: Tensor, experts: int) -> Tensor:
    """Rows (n, d) as (n, experts, d), zero for experts whose block, ended by its offset (experts,), a row is not in."""
    places = torch.arange(rows.shape[0], device=rows.device)
    expert = torch.searchsorted(offsets.to(places), places, right=True)  # past the last block: no expert
    mine = torch.arange(experts, device=rows.device) == expert[:, None]
    return torch.where(mine[..., None], rows[:, None], rows.new_zeros(()))


def gathered(products: Tensor, offsets: Tensor) -> Tensor:
    """Products (n, experts, d) of :func:`own_rows` as (n, d): of each row the one with its own expert."""
    places = torch.arange(products.shape[0], device=products.device)
    expert = torch.searchsorted(offsets.to(places), places, right=True)
    mine = torch.arange(products.shape[1], device=products.device) == expert[:, None]
    return torch.where(mine[..., None], products, products.new_zeros(())).sum(1)


@exposes(*_GROUPED)
def _grouped(
    at: Exposure, input: Any, weight: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> fx.Node:
    left, right = at.shape(input), at.shape(weight)
    if left is None or right is None:
        raise Refused("is used by a grouped product, and shapes are unknown; pass example inputs")
    if offs is None or bias is not None or out_dtype is not None or (len(left), len(right)) != (2, 3):
        raise Refused("is used by a grouped product other than of sorted rows with a stack of matrices")
    rows = at.call(own_rows, input, offs, right[0])
    return at.call(gathered, at.call(torch.einsum, "ngi,gio->ngo", rows, weight), offs)
