"""Decisions that a program takes by itself, on the device: which of two values holds, and when that changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxcurv.ir.op import Op
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.rules import need, need_scalar, need_shape, number
from fxcurv.ir.types import Scalar, Type


def _either(flag: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """x where the Scalar ``flag`` is above 1/2, else y, which has the type of x."""
    return torch.where(torch.as_tensor(flag) > 0.5, x, y)


def _infer_either(flag: Any, x: Type, y: Type) -> Type:
    need_scalar("either", "flag", flag)
    need_shape("either", "y", need("either", "y", y, type(need("either", "x", x, Type))), x.shape)
    return x


def _either_samples() -> Iterator[tuple[Tensor, ...]]:
    draw = Draw(88)
    for shape in ((), (5,), (3, 4)):
        for flag in (0.0, 1.0):
            yield torch.tensor(flag, dtype=torch.float64), draw.normal(*shape), draw.normal(*shape)


either = Op("either", "(Tensor flag, Tensor x, Tensor y) -> Tensor", _either, _infer_either, _either_samples)


def _norm_switch(
    flag: Tensor, total: Tensor, before: Tensor, norm: Tensor, step: Tensor, threshold: Tensor, period: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(flag, total, before) after a step with a gradient of this norm: has the sum of norms changed between periods?

    total sums the norms of a period of ``period`` steps, before is the sum of the period before it. When one begins,
    flag becomes 1 if |total - before| > threshold * before, else 0, before the total and the total 0. After the first
    period, with nothing to compare, it is 1. Scalars. Mu et al. 2022, with steps in place of epochs.
    """
    begins = (step % period == 0) & (total > 0)
    changed = (total - before).abs() > threshold * before
    flag = torch.where(begins, changed.to(flag.dtype), flag)
    before = torch.where(begins, total, before)
    return flag, torch.where(begins, torch.zeros_like(total), total) + norm.to(total.dtype), before


def _infer_norm_switch(flag: Type, total: Type, before: Type, *rest: Any) -> tuple[Type, ...]:
    for name, given in (("flag", flag), ("total", total), ("before", before)):
        need_shape("norm_switch", name, need("norm_switch", name, given, Scalar), ())
    for name, given in zip(("norm", "step", "threshold"), rest, strict=False):
        need_scalar("norm_switch", name, given)
    return flag, total, before


def _switch_samples() -> Iterator[tuple[Any, ...]]:
    for numbers in ((1, 0, 0, 2, 0, 0.2), (0, 6, 3, 2, 10, 0.2), (1, 3, 3.1, 2, 10, 0.2), (0, 6, 3, 2, 11, 0.2)):
        yield *(torch.tensor(float(number), dtype=torch.float64) for number in numbers), 5


norm_switch = Op(
    "norm_switch",
    "(Tensor flag, Tensor total, Tensor before, Tensor norm, Tensor step, Tensor threshold, int period)"
    " -> (Tensor, Tensor, Tensor)",
    _norm_switch,
    _infer_norm_switch,
    _switch_samples,
)


def _within_steps(step: Tensor, a: int, b: int, c: int) -> Tensor:
    """1 for step < a and for b < step <= c, else 0: a schedule by fixed intervals. Scalar."""
    return ((step < a) | ((step > b) & (step <= c))).to(step.dtype)


def _infer_within(step: Type, a: int, b: int, c: int) -> Type:
    return need("within_steps", "step", step, Scalar)


def _within_samples() -> Iterator[tuple[Any, ...]]:
    for step in (0, 10, 11, 35, 36, 40, 41):
        yield torch.tensor(float(step), dtype=torch.float64), 10, 35, 40


within_steps = Op(
    "within_steps", "(Tensor step, int a, int b, int c) -> Tensor", _within_steps, _infer_within, _within_samples
)


def _decayed(k: Tensor, start: Tensor, end: Tensor, steps: int, warmup: int) -> Tensor:
    """A number on its way from ``start`` to ``end`` after k updates: end + (start - end)(1 - q)^(k - warmup).

    q = 2 log10(start / end) / steps; the first ``warmup`` updates change nothing. q is at least 0 and at most 1, so it
    moves towards ``end`` only from above. Scalars, positive. The damping schedule of Mu et al. 2022's code.
    """
    start, end = (number(x, k) for x in (start, end))
    rate = (2.0 * (start / end).log10() / steps).clamp(0.0, 1.0)
    return end + (start - end) * (1.0 - rate) ** (k - warmup).clamp(min=0.0)


def _infer_decayed(k: Type, start: Any, end: Any, steps: int, warmup: int) -> Type:
    need_scalar("decayed", "start", start)
    need_scalar("decayed", "end", end)
    return need("decayed", "k", k, Scalar)


def _decayed_samples() -> Iterator[tuple[Any, ...]]:
    for k in (0.0, 2.0, 5.0, 40.0):
        yield *(torch.tensor(x, dtype=torch.float64) for x in (k, 4.0, 0.04)), 10, 2


decayed = Op(
    "decayed",
    "(Tensor k, Tensor start, Tensor end, int steps, int warmup) -> Tensor",
    _decayed,
    _infer_decayed,
    _decayed_samples,
)
