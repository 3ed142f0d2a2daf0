"""A Gram and the average that takes it in, as one op: the sum never lies in memory.

Taps measure a Gram in the backward pass and the average follows in the update, so the pair meets only in programs whose
rows are kept; there the pass ``fuse`` joins it where a kernel claims it. The definitions are the compositions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxcurv.ir.op import OPS, Op
from fxcurv.ir.ops import fused, statistics  # noqa: F401  (their ops are composed here)
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.types import Type


def _gram_ema_mean(old: Tensor, rows: Tensor, count: Tensor, weight: Tensor) -> Tensor:
    """ema_mean(old, gram(rows), count, weight): weight * old + (1 - weight) * sum of r r^T / max(count, 1).

    old: Psd (d, d) or (G, d, d); rows: Rows (b, s, G, d); count, weight: number, Scalar or Scalar a group.
    """
    result: Tensor = OPS["ema_mean"].reference(old, OPS["gram"].reference(rows), count, weight)
    return result


def _gram_ema_scaled(old: Tensor, rows: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    """ema_scaled(old, gram(rows), scale, weight): weight * old + (1 - weight) * scale * sum of r r^T.

    old: Psd (d, d) or (G, d, d); rows: Rows (b, s, G, d); scale, weight: number, Scalar or Scalar a group.
    """
    result: Tensor = OPS["ema_scaled"].reference(old, OPS["gram"].reference(rows), scale, weight)
    return result


def _composed(average: str) -> Any:
    def infer(old: Type, rows: Type, factor: Any, weight: Any) -> Any:
        return OPS[average].infer(old, OPS["gram"].infer(rows), factor, weight)

    return infer


def _samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(63)
    for b, s, groups, d in ((5, 1, 1, 3), (2, 7, 1, 4), (3, 2, 5, 2), (1, 1, 1, 1), (0, 3, 1, 2)):
        old = draw.psd(d, *((groups,) if groups > 1 else ()))
        for weight in (0.0, 0.95, 1.0):
            numbers = (torch.tensor(number, dtype=torch.float64) for number in (b * s / 2, weight))
            yield old, draw.normal(b, s, groups, d), *numbers


def _flops(old: Type, rows: Type, *scalars: Any) -> float:
    return float(2 * rows.numel * rows.shape[-1] + 3 * old.numel)  # type: ignore[operator]


gram_ema_mean = Op(
    "gram_ema_mean",
    "(Tensor old, Tensor rows, Tensor count, Tensor weight) -> Tensor",
    _gram_ema_mean,
    _composed("ema_mean"),
    _samples,
    flops=_flops,
)
gram_ema_scaled = Op(
    "gram_ema_scaled",
    "(Tensor old, Tensor rows, Tensor scale, Tensor weight) -> Tensor",
    _gram_ema_scaled,
    _composed("ema_scaled"),
    _samples,
    flops=_flops,
)
