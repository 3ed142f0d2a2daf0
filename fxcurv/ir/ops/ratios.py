"""Divisions that cannot blow up, and small helpers of adaptive methods."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import Op, Trait
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.rules import need_scalar, need_shape, spread
from fxcurv.ir.types import Type

_STACKABLE = frozenset({Trait.BATCHABLE})


def _copy(x: Tensor) -> Tensor:
    """x itself, in memory of its own."""
    return x.clone()


def _one_like(x: Tensor) -> Tensor:
    """Ones of the shape of x."""
    return torch.ones_like(x)


def _safe_ratio(x: Tensor, y: Tensor) -> Tensor:
    """x / y where y > 0, else 0."""
    return torch.where(y > 0, x / torch.where(y > 0, y, torch.ones_like(y)), torch.zeros_like(x))


def _damped_divide(x: Tensor, y: Tensor, damping: Tensor) -> Tensor:
    """x / (y + damping), elementwise for equal shapes."""
    return (x / (y + spread(damping, y))).to(x.dtype)


def _power(x: Tensor, exponent: Tensor) -> Tensor:
    """x ** exponent for x >= 0, elementwise."""
    return x.pow(spread(exponent, x)).to(x.dtype)


def _trailing_mean(x: Tensor, dims: int) -> Tensor:
    """Every entry replaced by the mean over the last ``dims`` dimensions, shaped like x (Yao et al. 2020, eq. 6)."""
    axes = tuple(range(x.ndim - dims, x.ndim))
    return x.mean(axes, keepdim=True).expand(x.shape).contiguous()


def _same(x: Type, *rest: Any) -> Type:
    return x


def _plain(x: Type) -> Type:
    return replace(x)


def _infer_divide(x: Type, y: Type, damping: Any) -> Type:
    need_shape("damped_divide", "y", y, x.shape)
    need_scalar("damped_divide", "damping", damping, x.shape)
    return x


def _infer_ratio(x: Type, y: Type) -> Type:
    need_shape("safe_ratio", "y", y, x.shape)
    return x


def _infer_power(x: Type, exponent: Any) -> Type:
    need_scalar("power", "exponent", exponent, x.shape)
    return x


def _infer_trailing(x: Type, dims: int) -> Type:
    if not 0 < dims <= len(x.shape):
        raise FxcurvError(f"op 'trailing_mean' takes 1 to {len(x.shape)} dimensions of {x}, got {dims}.")
    return x


def _singles() -> Iterator[tuple[Any, ...]]:
    draw = Draw(1)
    for shape in ((3, 4), (5,), (2, 3, 7)):
        yield (draw.normal(*shape),)


def _divides() -> Iterator[tuple[Any, ...]]:
    draw = Draw(2)
    for shape in ((3, 4), (5,), (2, 3, 7)):
        yield draw.normal(*shape), draw.positive(*shape), draw.number(0.3)


def _ratios() -> Iterator[tuple[Any, ...]]:
    draw = Draw(3)
    yield draw.number(0.5), draw.number(0.25)
    yield draw.positive(4), torch.tensor([0.0, 1.0, 2.0, 0.0], dtype=torch.float64)


def _powers() -> Iterator[tuple[Any, ...]]:
    draw = Draw(4)
    yield draw.positive(3, 5), draw.number(0.5)


def _trailings() -> Iterator[tuple[Any, ...]]:
    draw = Draw(5)
    yield draw.normal(2, 3, 3, 3), 2
    yield draw.normal(4, 5), 1


def _numel(x: Type, *rest: Any) -> float:
    return float(2 * x.numel)


copy = Op("copy", "(Tensor x) -> Tensor", _copy, _plain, _singles, traits=_STACKABLE)
one_like = Op("one_like", "(Tensor x) -> Tensor", _one_like, _plain, _singles, traits=_STACKABLE)
safe_ratio = Op(
    "safe_ratio", "(Tensor x, Tensor y) -> Tensor", _safe_ratio, _infer_ratio, _ratios, _numel, traits=_STACKABLE
)
damped_divide = Op(
    "damped_divide",
    "(Tensor x, Tensor y, Tensor damping) -> Tensor",
    _damped_divide,
    _infer_divide,
    _divides,
    _numel,
    _STACKABLE,
)
power = Op("power", "(Tensor x, Tensor exponent) -> Tensor", _power, _infer_power, _powers, _numel, _STACKABLE)
trailing_mean = Op(
    "trailing_mean", "(Tensor x, int dims) -> Tensor", _trailing_mean, _infer_trailing, _trailings, _numel
)
