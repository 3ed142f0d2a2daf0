"""Statistics of rows in time order: how a row depends on the one before it, and how many sequences there are.

With ``gram`` and ``count`` they describe a stationary chain: C0 = E[r_t r_t^T] and C1 = E[r_{t+1} r_t^T]. Both are
divided by the number of *all* rows, as if the sequence went on with zeros: then C0 and C1 are two blocks of one
positive semidefinite Toeplitz matrix, whatever the data, and |C0^-1/2 C1 C0^-1/2| <= 1.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fxcurv.ir.op import Op
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.rules import accumulator, grouped, need_rows
from fxcurv.ir.ops.statistics import ADDITIVE, ungroup, wide
from fxcurv.ir.types import Mat, Scalar, Type


def _lagged_gram(rows: Tensor) -> Tensor:
    """Sum over examples and positions of r_{t+1} r_t^T, Rows (b, s, G, d) -> Mat (d, d) or (G, d, d).

    Positions are time steps in order; the last row of an example has no successor, and one position gives zeros.
    The lag-one factors of recurrent K-FAC before division by the count (Martens, Ba & Johnson 2018).
    """
    x = wide(rows).movedim(2, 0)
    later, earlier = x[:, :, 1:].flatten(1, 2), x[:, :, :-1].flatten(1, 2)
    return ungroup(later.mT @ earlier)


def _infer_lagged_gram(rows: Type) -> Type:
    need_rows("lagged_gram", ("rows", rows))
    groups, d = rows.shape[2:]
    return Mat(grouped(groups, d, d), accumulator(rows.dtype))


def _examples(rows: Tensor) -> Tensor:
    """Number of examples b, a 0-dimensional float32: ``count`` divided by it is the mean length of a sequence."""
    return torch.full((), float(rows.shape[0]), dtype=torch.float32, device=rows.device)


def _infer_examples(rows: Type) -> Type:
    need_rows("examples", ("rows", rows))
    return Scalar((), torch.float32)


def _samples() -> Iterator[tuple[Tensor]]:
    draw = Draw(35)
    for shape in ((5, 1, 1, 3), (2, 7, 1, 4), (3, 2, 5, 2), (1, 1, 1, 1), (0, 3, 1, 2), (4, 3, 2, 1)):
        yield (draw.normal(*shape),)


lagged_gram = Op(
    "lagged_gram",
    "(Tensor rows) -> Tensor",
    _lagged_gram,
    _infer_lagged_gram,
    _samples,
    flops=lambda rows: 2 * rows.numel * rows.shape[-1],
    traits=ADDITIVE,
)
examples = Op("examples", "(Tensor rows) -> Tensor", _examples, _infer_examples, _samples, traits=ADDITIVE)
