"""Pairs of tracking ops as one: what the pass ``fuse`` puts in the place of an average of a scaled sum.

A statistic arrives as a sum over rows; dividing it by a count, averaging it and looking at it again are three walks
over a d x d matrix that do next to nothing. Together they are one walk. The definitions are the compositions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxcurv.ir.op import OPS, Op, Trait
from fxcurv.ir.ops import scalars, tracking  # noqa: F401  (their ops are composed here)
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.rules import need
from fxcurv.ir.types import Diag, Psd, Type

STACKABLE = frozenset({Trait.BATCHABLE})


def _ema_scaled(old: Tensor, total: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    """ema(old, scale * total, weight) = weight * old + (1 - weight) * scale * total, ``old`` where the weight is 1.

    old, total: equal types; scale, weight: number, Scalar or Scalar a group.
    """
    result: Tensor = OPS["ema"].reference(old, OPS["scale"].reference(total, scale), weight)
    return result


def _ema_mean(old: Tensor, total: Tensor, count: Tensor, weight: Tensor) -> Tensor:
    """ema(old, total / max(count, 1), weight): an average of means from the sum over ``count`` rows.

    old, total: equal types; count, weight: number, Scalar or Scalar a group.
    """
    result: Tensor = OPS["ema"].reference(old, OPS["mean"].reference(total, count), weight)
    return result


def _composed(inner: str) -> Any:
    def infer(old: Type, total: Type, factor: Any, weight: Any) -> Any:
        return OPS["ema"].infer(old, OPS[inner].infer(total, factor), weight)

    return infer


def _samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(61)
    for old in (draw.psd(3), draw.psd(3, 2), draw.positive(5), draw.normal(1, 7), draw.number(2.0)):
        total = draw.normal(*old.shape).abs()
        for weight in (0.0, 0.95, 1.0):
            yield old, total, _number(6.0), _number(weight)
    yield draw.psd(3, 2), draw.psd(3, 2), _number([4.0, 0.5]), _number([1.0, 0.25])
    yield draw.psd(3), draw.psd(3) * float("nan"), _number(0.0), _number(1.0)


def _number(value: float | list[float]) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


ema_scaled = Op(
    "ema_scaled",
    "(Tensor old, Tensor total, Tensor scale, Tensor weight) -> Tensor",
    _ema_scaled,
    _composed("scale"),
    _samples,
    flops=lambda old, *operands: 3 * old.numel,
    traits=STACKABLE,
)
ema_mean = Op(
    "ema_mean",
    "(Tensor old, Tensor total, Tensor count, Tensor weight) -> Tensor",
    _ema_mean,
    _composed("mean"),
    _samples,
    flops=lambda old, *operands: 3 * old.numel,
    traits=STACKABLE,
)


def _diagonal(A: Tensor) -> Tensor:
    """The diagonal of a Psd (d, d) or (G, d, d), Diag (d,) or (G, d)."""
    return A.diagonal(dim1=-2, dim2=-1).clone(memory_format=torch.contiguous_format)


def _infer_diagonal(A: Type) -> Type:
    need("diagonal", "A", A, Psd)
    return Diag(A.shape[:-1], A.dtype)


def _diagonal_samples() -> Iterator[tuple[Tensor]]:
    draw = Draw(62)
    for d, groups in ((1, ()), (5, ()), (3, (4,)), (2, (2,))):
        yield (draw.psd(d, *groups),)


diagonal = Op(
    "diagonal",
    "(Tensor A) -> Tensor",
    _diagonal,
    _infer_diagonal,
    _diagonal_samples,
    traits=STACKABLE,
)
