"""Statistics: sums over the rows that one batch sends through a layer.

Rows ``a`` (inputs, the constant coordinate of a bias last) and ``g`` (output gradients) have shape
(b, s, G, d): examples, positions, groups, features. Every additive statistic is a plain sum, never a mean:
sums of micro-batches, of processes and of the uses of a tied weight add up, and ``count`` divides later.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxcurv.ir.op import Op, Trait
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.rules import accumulator, grouped, need_rows
from fxcurv.ir.types import Diag, Psd, Rows, Scalar, Type, Vec

ADDITIVE = frozenset({Trait.ADDITIVE})
ROWWISE = frozenset({Trait.ROWWISE, Trait.LINEAR})


def wide(rows: Tensor) -> Tensor:
    """Rows in their accumulation type."""
    return rows.to(accumulator(rows.dtype))


def _by_group(rows: Tensor) -> Tensor:
    """(G, b s, d)"""
    return wide(rows).flatten(0, 1).transpose(0, 1)


def ungroup(x: Tensor) -> Tensor:
    """Drop the leading group dimension of one group."""
    return x.squeeze(0) if x.shape[0] == 1 else x


def _rows_samples() -> Iterator[tuple[Tensor]]:
    draw = Draw(1)
    for shape in ((5, 1, 1, 3), (2, 7, 1, 4), (3, 2, 5, 2), (1, 1, 1, 1), (0, 3, 1, 2), (4, 3, 2, 1)):
        yield (draw.normal(*shape),)


def _mean_positions(rows: Tensor) -> Tensor:
    """Mean over positions, Rows (b, s, G, d) -> Rows (b, 1, G, d): the inputs of K-FAC-reduce.

    Eschenhagen et al. 2023, "reduce" weight sharing. Accumulated in float32 or wider.
    """
    return wide(rows).mean(dim=1, keepdim=True)


def _sum_positions(rows: Tensor) -> Tensor:
    """Sum over positions, Rows (b, s, G, d) -> Rows (b, 1, G, d): the output gradients of K-FAC-reduce.

    Eschenhagen et al. 2023, "reduce" weight sharing. Accumulated in float32 or wider.
    """
    return wide(rows).sum(dim=1, keepdim=True)


def _one_position(name: str) -> Any:
    def infer(rows: Type) -> Type:
        need_rows(name, ("rows", rows))
        return Rows((rows.shape[0], 1, *rows.shape[2:]), accumulator(rows.dtype))

    return infer


def _reduced(name: str, result: type[Type], copies: int) -> Any:
    """Type rule of a sum over examples and positions whose result repeats the feature size ``copies`` times."""

    def infer(rows: Type) -> Type:
        need_rows(name, ("rows", rows))
        groups, d = rows.shape[2:]
        return result(grouped(groups, *(d,) * copies), accumulator(rows.dtype))

    return infer


mean_positions = Op(
    "mean_positions",
    "(Tensor rows) -> Tensor",
    _mean_positions,
    _one_position("mean_positions"),
    _rows_samples,
    flops=lambda rows: rows.numel,
    traits=ROWWISE,
)
sum_positions = Op(
    "sum_positions",
    "(Tensor rows) -> Tensor",
    _sum_positions,
    _one_position("sum_positions"),
    _rows_samples,
    flops=lambda rows: rows.numel,
    traits=ROWWISE,
)


def _gram(rows: Tensor) -> Tensor:
    """Sum over examples and positions of r r^T, Rows (b, s, G, d) -> Psd (d, d) or (G, d, d).

    The factors of K-FAC before division by the count (Martens & Grosse 2015; Grosse & Martens 2016 for patches).
    """
    x = _by_group(rows)
    return ungroup(x.mT @ x)


def _diag_gram(rows: Tensor) -> Tensor:
    """Diagonal of ``gram``: sum of r^2, Rows (b, s, G, d) -> Diag (d,) or (G, d), never forming a matrix."""
    return ungroup(wide(rows).square().sum(dim=(0, 1)))


def _row_sum(rows: Tensor) -> Tensor:
    """Sum of the rows, Rows (b, s, G, d) -> Vec (d,) or (G, d): the mean vectors of rank-one methods."""
    return ungroup(wide(rows).sum(dim=(0, 1)))


def _count(rows: Tensor) -> Tensor:
    """Number of rows b s of a group, a 0-dimensional float32: it divides the sums."""
    return torch.full((), float(rows.shape[0] * rows.shape[1]), dtype=torch.float32, device=rows.device)


def _infer_count(rows: Type) -> Type:
    need_rows("count", ("rows", rows))
    return Scalar((), torch.float32)


gram = Op(
    "gram",
    "(Tensor rows) -> Tensor",
    _gram,
    _reduced("gram", Psd, 2),
    _rows_samples,
    flops=lambda rows: 2 * rows.numel * rows.shape[-1],
    traits=ADDITIVE,
)
diag_gram = Op(
    "diag_gram",
    "(Tensor rows) -> Tensor",
    _diag_gram,
    _reduced("diag_gram", Diag, 1),
    _rows_samples,
    flops=lambda rows: 2 * rows.numel,
    traits=ADDITIVE,
)
row_sum = Op(
    "row_sum",
    "(Tensor rows) -> Tensor",
    _row_sum,
    _reduced("row_sum", Vec, 1),
    _rows_samples,
    flops=lambda rows: rows.numel,
    traits=ADDITIVE | {Trait.LINEAR},
)
count = Op("count", "(Tensor rows) -> Tensor", _count, _infer_count, _rows_samples, traits=ADDITIVE)
