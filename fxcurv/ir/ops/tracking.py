"""Tracking: from the sums of a batch to running averages, and the pointwise arithmetic around it.

A missing statistic is a count of 0 and leaves every state as it was, without a branch: the weight of the old
value is then 1, and at weight 1 the new value is not looked at, so a NaN in it does no harm.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxcurv.ir.op import Op, Trait
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.rules import accumulator, need, need_scalar, need_shape, spread
from fxcurv.ir.types import Scalar, Type

STACKABLE = frozenset({Trait.BATCHABLE})


def _mean(total: Tensor, count: Tensor) -> Tensor:
    """total / max(count, 1): the mean over the rows that were counted; 0 stays 0 when there was none.

    total: any statistic; count: Scalar. The result has the type of ``total``.
    """
    count = torch.as_tensor(count, dtype=accumulator(total.dtype), device=total.device)
    return (total / spread(count.clamp(min=1.0), total)).to(total.dtype)


def _infer_mean(total: Type, count: Any) -> Type:
    need("mean", "total", total, Type)
    need_scalar("mean", "count", count, total.batch)
    return total


def _statistics() -> list[Tensor]:
    draw = Draw(4)
    return [draw.psd(3), draw.psd(3, 2), draw.positive(5), draw.normal(1, 7), draw.number(2.0)]


def _mean_samples() -> Iterator[tuple[Any, ...]]:
    for total in _statistics():
        yield total, torch.tensor(6.0, dtype=torch.float64)
    yield Draw(4).normal(3, 2), torch.tensor(0.0, dtype=torch.float64)
    yield Draw(4).psd(3, 2), torch.tensor([4.0, 0.0], dtype=torch.float64)


mean = Op(
    "mean",
    "(Tensor total, Tensor count) -> Tensor",
    _mean,
    _infer_mean,
    _mean_samples,
    flops=lambda total, count: total.numel,
    traits=STACKABLE | {Trait.LINEAR},
)


def _ema_weight(k: Tensor, count: Tensor, ema: Tensor) -> Tensor:
    """Weight of the OLD value: min(k / (k + 1), ema) when count > 0, and 1 when nothing was measured.

    k: Scalar, number of earlier updates; the first update takes the new value alone, the second the mean of two, so
    the average is unbiased from the start (Martens & Grosse 2015, section 5: min(1 - 1/k, ema) for the k-th update).
    """
    ema = torch.as_tensor(ema, dtype=k.dtype, device=k.device)
    return torch.where(torch.as_tensor(count) > 0, torch.minimum(k / (k + 1), ema), torch.ones_like(k))


def _infer_ema_weight(k: Type, count: Any, ema: Any) -> Type:
    need("ema_weight", "k", k, Scalar)
    need_scalar("ema_weight", "count", count, k.shape)
    need_scalar("ema_weight", "ema", ema, k.shape)
    return k


def _ema_weight_samples() -> Iterator[tuple[Tensor, ...]]:
    for k, count in ((0.0, 4.0), (1.0, 4.0), (100.0, 1.0), (3.0, 0.0)):
        yield tuple(torch.tensor(value, dtype=torch.float64) for value in (k, count, 0.95))


ema_weight = Op(
    "ema_weight",
    "(Tensor k, Tensor count, Tensor ema) -> Tensor",
    _ema_weight,
    _infer_ema_weight,
    _ema_weight_samples,
    flops=lambda *operands: 3,
    traits=STACKABLE,
)


def _tick(k: Tensor, count: Tensor) -> Tensor:
    """k + 1 when count > 0, else k: number of updates so far. Scalar."""
    return k + (torch.as_tensor(count) > 0).to(k.dtype)


def _infer_tick(k: Type, count: Any) -> Type:
    need("tick", "k", k, Scalar)
    need_scalar("tick", "count", count, k.shape)
    return k


tick = Op(
    "tick",
    "(Tensor k, Tensor count) -> Tensor",
    _tick,
    _infer_tick,
    lambda: (sample[:2] for sample in _ema_weight_samples()),
    flops=lambda *operands: 1,
    traits=STACKABLE,
)


def _ema(old: Tensor, new: Tensor, weight: Tensor) -> Tensor:
    """weight * old + (1 - weight) * new, and exactly ``old`` where the weight is 1, whatever ``new`` holds.

    old, new: equal types (the dtype of ``old`` is kept); weight: number, Scalar or Scalar a group.
    """
    weight = torch.as_tensor(weight, dtype=accumulator(old.dtype), device=old.device)
    weight = spread(weight, old)
    return torch.where(weight == 1.0, old, (weight * old + (1.0 - weight) * new).to(old.dtype))


def _moving(old: Tensor, new: Tensor, beta: Tensor) -> Tensor:
    """beta * old + (1 - beta) * new: ``ema`` with a constant weight; ``bias_correct`` undoes its start from zero."""
    return _ema(old, new, beta)


def _infer_ema(name: str, old: Type, new: Type, weight: Any) -> Type:
    need(name, "old", old, Type)
    need(name, "new", new, type(old))
    need_shape(name, "new", new, old.shape)
    need_scalar(name, "weight", weight, old.batch)
    return old


def _ema_samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(5)
    for old in _statistics():
        new = draw.normal(*old.shape).abs()
        for weight in (0.0, 0.95, 1.0):
            yield old, new, torch.tensor(weight, dtype=torch.float64)
    yield draw.psd(3, 2), draw.psd(3, 2), torch.tensor([1.0, 0.25], dtype=torch.float64)
    yield draw.psd(3), torch.full((3, 3), float("nan"), dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)


ema = Op(
    "ema",
    "(Tensor old, Tensor new, Tensor weight) -> Tensor",
    _ema,
    lambda *types: _infer_ema("ema", *types),
    _ema_samples,
    flops=lambda old, new, weight: 3 * old.numel,
    traits=STACKABLE,
)
moving = Op(
    "moving",
    "(Tensor old, Tensor new, Tensor beta) -> Tensor",
    _moving,
    lambda *types: _infer_ema("moving", *types),
    _ema_samples,
    flops=lambda old, new, beta: 3 * old.numel,
    traits=STACKABLE,
)


def _bias_correct(x: Tensor, beta: Tensor, k: Tensor) -> Tensor:
    """x / (1 - beta^k): a moving average that started at zero, corrected after k updates (Kingma & Ba 2015).

    At k = 0 the result is x itself. k, beta: numbers or Scalars.
    """
    k = torch.as_tensor(k, dtype=accumulator(x.dtype), device=x.device)
    beta = torch.as_tensor(beta, dtype=k.dtype, device=k.device)
    filled = torch.where(k > 0, 1.0 - beta**k, torch.ones_like(k))
    return (x / spread(filled, x)).to(x.dtype)


def _infer_bias_correct(x: Type, beta: Any, k: Any) -> Type:
    need("bias_correct", "x", x, Type)
    need_scalar("bias_correct", "beta", beta, ())
    need_scalar("bias_correct", "k", k, x.shape)
    return x


def _bias_correct_samples() -> Iterator[tuple[Any, ...]]:
    for x in _statistics():
        for k in (0.0, 1.0, 7.0):
            yield x, torch.tensor(0.9, dtype=torch.float64), torch.tensor(k, dtype=torch.float64)


bias_correct = Op(
    "bias_correct",
    "(Tensor x, Tensor beta, Tensor k) -> Tensor",
    _bias_correct,
    _infer_bias_correct,
    _bias_correct_samples,
    flops=lambda x, beta, k: x.numel,
    traits=STACKABLE | {Trait.LINEAR},
)
