"""Pointwise arithmetic on equal types, or between a value and a scalar (or one scalar a group).

The result keeps its type only where that is true: a difference of Psd is Sym, a square root of the entries of
a Psd is no longer Psd. Adding a scalar to every entry of a matrix is refused: it is not damping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import Op, Trait
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.rules import need, need_scalar, need_shape, promote
from fxcurv.ir.types import LowRank, Mat, Orth, Psd, Scalar, Sym, Tri, Type

STACKABLE = frozenset({Trait.BATCHABLE})
LINEAR = STACKABLE | {Trait.LINEAR}
_GENERAL: dict[type[Type], type[Type]] = {Psd: Sym, Orth: Mat, Tri: Mat, LowRank: Mat}
"""The type of a result that has lost the special structure of its operands."""


def _result(cls: type[Type], kept: tuple[type[Type], ...]) -> type[Type]:
    return cls if cls in kept else _GENERAL.get(cls, cls)


def _operands(x: Any, y: Any) -> tuple[Any, Any, torch.dtype]:
    """Both operands lined up from the left, and the dtype of the one with more dimensions."""
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        return x, y, (x if isinstance(x, Tensor) else y).dtype
    if x.ndim == y.ndim:
        return x, y, torch.promote_types(x.dtype, y.dtype)
    if x.ndim > y.ndim:
        return x, y.reshape(y.shape + (1,) * (x.ndim - y.ndim)), x.dtype
    return x.reshape(x.shape + (1,) * (y.ndim - x.ndim)), y, y.dtype


def _add(x: Tensor, y: Tensor) -> Tensor:
    """x + y. Equal types, or one a scalar (a number, 0-dimensional or one value a group)."""
    x, y, dtype = _operands(x, y)
    return (x + y).to(dtype)


def _sub(x: Tensor, y: Tensor) -> Tensor:
    """x - y. Equal types, or one a scalar (a number, 0-dimensional or one value a group)."""
    x, y, dtype = _operands(x, y)
    return (x - y).to(dtype)


def _mul(x: Tensor, y: Tensor) -> Tensor:
    """x * y elementwise. Equal types, or one a scalar (a number, 0-dimensional or one value a group).

    A scalar that multiplies a Psd must not be negative; its type would not be right.
    """
    x, y, dtype = _operands(x, y)
    return (x * y).to(dtype)


def _div(x: Tensor, y: Tensor) -> Tensor:
    """x / y elementwise. Equal types, or one a scalar (a number, 0-dimensional or one value a group).

    A scalar that divides a Psd must be positive; its type would not be right.
    """
    x, y, dtype = _operands(x, y)
    return (x / y).to(dtype)


def _binary(name: str, kept: tuple[type[Type], ...], kept_scaled: tuple[type[Type], ...] | None) -> Callable[..., Type]:
    """Type rule. ``kept``: types closed under the op; ``kept_scaled``: with a scalar (None: matrices are refused)."""

    def infer(x: Any, y: Any) -> Type:
        types = [operand for operand in (x, y) if isinstance(operand, Type)]
        if not types:
            raise FxcurvError(f"op '{name}' needs at least one tensor, got {x} and {y}.")
        value = max(types, key=lambda t: (not isinstance(t, Scalar), len(t.shape)))
        scalars = [operand for operand in (x, y) if operand is not value and not _is_value(operand)]
        if not scalars:
            return _equal(name, x, y, kept)
        need_scalar(name, "y" if scalars[0] is y else "x", scalars[0], value.batch)
        if kept_scaled is None and type(value) in (*_GENERAL, Sym):
            raise FxcurvError(
                f"op '{name}' would change every entry of {value} by a scalar; "
                f"for damping on the diagonal give the scalar to 'inverse' or 'inverse_root'."
            )
        same_rank = [t for t in types if len(t.shape) == len(value.shape)]
        return _result(type(value), kept_scaled or ())(value.shape, promote(*same_rank))

    return infer


def _is_value(operand: Any) -> bool:
    return isinstance(operand, Type) and not isinstance(operand, Scalar)


def _equal(name: str, x: Type, y: Type, kept: tuple[type[Type], ...]) -> Type:
    """Result of two operands of one type; a Psd counts as a Sym beside one."""
    if isinstance(x, type(y)):
        common = type(y)
    else:
        need(name, "y", y, type(x))
        common = type(x)
    need_shape(name, "y", y, x.shape)
    return _result(common, kept)(x.shape, promote(x, y))


def _pairs() -> Iterator[tuple[Any, Any]]:
    draw = Draw(6)
    yield draw.number(2.0), draw.number(3.0)
    yield draw.positive(5), draw.positive(5)
    yield draw.normal(3, 2), draw.positive(3, 2)
    yield draw.normal(2, 3, 5), draw.number(0.3)
    yield draw.normal(2, 3, 5), draw.number(0.3, 2)
    yield draw.number(0.3, 2), draw.positive(2, 7)


def _unaries() -> Iterator[tuple[Tensor]]:
    draw = Draw(7)
    for shape in ((), (5,), (3, 2), (2, 3, 3)):
        yield (draw.positive(*shape),)


def _numel(*operands: Any) -> float:
    return float(max(operand.numel for operand in operands if isinstance(operand, Type)))


_BINARY_SCHEMA = "(Tensor x, Tensor y) -> Tensor"
add = Op("add", _BINARY_SCHEMA, _add, _binary("add", (Psd, Tri), None), _pairs, _numel, STACKABLE)
sub = Op("sub", _BINARY_SCHEMA, _sub, _binary("sub", (Tri,), None), _pairs, _numel, STACKABLE)
mul = Op("mul", _BINARY_SCHEMA, _mul, _binary("mul", (Psd, Tri), (Psd, Tri)), _pairs, _numel, LINEAR)
div = Op("div", _BINARY_SCHEMA, _div, _binary("div", (), (Psd, Tri)), _pairs, _numel, LINEAR)


def _square(x: Tensor) -> Tensor:
    """x^2 elementwise."""
    return x.square()


def _sqrt(x: Tensor) -> Tensor:
    """Square root elementwise; NaN for a negative number."""
    return x.sqrt()


def _neg(x: Tensor) -> Tensor:
    """-x."""
    return -x


def _unary(name: str, *kept: type[Type]) -> Callable[[Type], Type]:
    def infer(x: Type) -> Type:
        need(name, "x", x, Type)
        return _result(type(x), kept)(x.shape, x.dtype)

    return infer


square = Op("square", "(Tensor x) -> Tensor", _square, _unary("square", Psd, Tri), _unaries, _numel, STACKABLE)
sqrt = Op("sqrt", "(Tensor x) -> Tensor", _sqrt, _unary("sqrt"), _unaries, _numel, STACKABLE)
neg = Op("neg", "(Tensor x) -> Tensor", _neg, _unary("neg", Tri), _unaries, _numel, LINEAR)
