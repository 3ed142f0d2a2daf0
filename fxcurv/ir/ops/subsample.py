"""Fewer rows: a part of the positions of every example, for statistics whose cost is the number of rows."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import Op
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.rules import need_rows
from fxcurv.ir.ops.statistics import ROWWISE
from fxcurv.ir.types import Rows, Type


def _every_position(rows: Tensor, step: int) -> Tensor:
    """Every ``step``-th position of each example, from the first, Rows (b, s, G, d) -> Rows (b, ceil(s/step), G, d)."""
    return rows[:, ::step].clone()


def _infer_every_position(rows: Type, step: int) -> Type:
    need_rows("every_position", ("rows", rows))
    if step < 1:
        raise FxcurvError(f"op 'every_position' got a step of {step}; it is at least 1.")
    positions = rows.shape[1]
    return Rows((rows.shape[0], None if positions is None else -(-positions // step), *rows.shape[2:]), rows.dtype)


def _samples() -> Iterator[tuple[Tensor, int]]:
    draw = Draw(78)
    for shape, step in (((2, 7, 1, 3), 3), ((3, 4, 2, 2), 2), ((2, 1, 1, 2), 5), ((0, 3, 1, 2), 2)):
        yield draw.normal(*shape), step


every_position = Op(
    "every_position",
    "(Tensor rows, int step) -> Tensor",
    _every_position,
    _infer_every_position,
    _samples,
    traits=ROWWISE,
)
