"""Spectra and strengths: what damping schemes do to the eigenvalues of a block (sheet kronecker-1, Damping, item 4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import Op, Trait
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.rules import align, need, need_scalar, need_shape, need_square, promote, spread
from fxcurv.ir.types import Diag, Orth, Psd, Scalar, Type, Vec

STACKABLE = frozenset({Trait.BATCHABLE})
NULL = 1e-10
"""An eigenvalue below this part of the largest one counts as 0; where rounding is coarser, below the rounding error."""


def _entries_mean(x: Tensor, dims: int) -> Tensor:
    """Mean over the last ``dims`` dimensions: a Scalar, or one a group (G,). The mean eigenvalue, of a spectrum."""
    return x.flatten(-dims).mean(-1)


def _infer_entries_mean(x: Type, dims: int) -> Type:
    _check_dims("entries_mean", x, dims)
    return Scalar(x.shape[: len(x.shape) - dims], x.dtype)


def _check_dims(name: str, x: Type, dims: int) -> None:
    if not 0 < dims <= len(x.shape):
        raise FxcurvError(f"op '{name}' takes 1 to {len(x.shape)} dimensions of {x}, got {dims}.")


def _at_least(x: Tensor, floor: Tensor) -> Tensor:
    """max(x, floor), elementwise. floor: number, Scalar or Scalar a group. NaN stays NaN."""
    if not isinstance(floor, Tensor):
        return x.clamp(min=floor)
    return torch.maximum(x, spread(floor, x).to(x.dtype))


def _infer_at_least(x: Type, floor: Any) -> Type:
    need_scalar("at_least", "floor", floor, x.shape)
    return type(x)(x.shape, x.dtype)


def _or_one(x: Tensor) -> Tensor:
    """x where it is positive and finite, else 1: a divisor of what has not been measured yet."""
    return torch.where((x > 0) & torch.isfinite(x), x, torch.ones_like(x))


def _masked_divide(x: Tensor, y: Tensor, damping: Tensor, dims: int) -> Tensor:
    """x / (y + damping) where y is above 1e-10 of its largest entry over the last ``dims`` dimensions, else 0.

    x, y: equal shapes, y >= 0; damping: number, Scalar or Scalar a group. Where the dtype's rounding error is coarser
    than 1e-10, it takes its place: what an eigendecomposition returns below it is noise.
    """
    largest = y.amax(dim=tuple(range(-dims, 0)), keepdim=True)
    kept = y > largest * max(NULL, torch.finfo(y.dtype).eps)
    safe = torch.where(kept, y + spread(damping, y), torch.ones_like(y))
    return (torch.where(kept, x / safe, 0.0) + largest * 0.0).to(x.dtype)  # what is not finite must not pass for a 0


def _infer_masked_divide(x: Type, y: Type, damping: Any, dims: int) -> Type:
    need_shape("masked_divide", "y", y, x.shape)
    need_scalar("masked_divide", "damping", damping, x.shape)
    _check_dims("masked_divide", x, dims)
    return type(x)(x.shape, x.dtype)


def _recompose(values: Tensor, basis: Tensor) -> Tensor:
    """Q diag(values) Q^T, Psd (d, d) or (G, d, d); of a diagonal ``basis`` (ones) the Diag of the values.

    values: Vec (d,) or (G, d), not negative: the eigenvalues, or a function of them.
    """
    values, basis = align(values, basis)
    if basis.ndim == values.ndim:
        return values * basis.square()
    half = basis * values.sqrt().unsqueeze(-2)  # a product of a matrix with itself is exactly symmetric
    return half @ half.mT


def _infer_recompose(values: Type, basis: Type) -> Type:
    need("recompose", "values", values, Vec, Diag)
    need_square("recompose", "basis", basis, values.shape[-1], values.batch, Orth)
    return (Diag if isinstance(basis, Diag) else Psd)(basis.shape, promote(values, basis))


def _largest(xs: Sequence[Tensor]) -> Tensor:
    """The largest of all entries of Scalars or stacks of them, Scalar in their common dtype; what is not finite is out.

    At least 0.
    """
    dtype = xs[0].dtype
    for x in xs[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    joint = torch.cat([x.reshape(-1).to(dtype) for x in xs])
    return torch.where(torch.isfinite(joint), joint, 0.0).amax().clamp(min=0.0)


def _infer_largest(xs: Sequence[Type]) -> Type:
    if not isinstance(xs, (list, tuple)) or not xs:
        raise FxcurvError(f"operand 'xs' of op 'largest' must be a list of at least one value, got {xs}.")
    for x in xs:
        need("largest", "xs", x, Scalar)
    return Scalar((), promote(*xs))


def _means() -> Iterator[tuple[Any, ...]]:
    draw = Draw(72)
    yield draw.positive(3, 4), 2
    yield draw.positive(2, 3, 4), 2
    yield draw.positive(5), 1
    yield draw.positive(2, 5), 1


def _floors() -> Iterator[tuple[Any, ...]]:
    draw = Draw(73)
    yield draw.normal(3, 4), draw.number(0.3)
    yield draw.normal(2, 3, 4), draw.number(0.3, 2)
    yield draw.number(0.1), draw.number(0.3)


def _divides() -> Iterator[tuple[Any, ...]]:
    draw = Draw(74)
    for shape, dims in (((3, 4), 2), ((2, 3, 4), 2), ((6,), 1)):
        y = draw.positive(*shape)
        y[..., 0] *= 1e-13
        y[..., 1] = 0.0
        yield draw.normal(*shape), y, draw.number(0.3), dims
    yield draw.normal(2, 3), draw.positive(2, 3), draw.number(0.3, 2), 1
    yield draw.normal(2, 2), torch.zeros(2, 2, dtype=torch.float64), draw.number(0.3), 2


def _ones() -> Iterator[tuple[Any, ...]]:
    yield (torch.tensor(2.5, dtype=torch.float64),)
    yield (torch.tensor([0.0, 3.0, -1.0, float("inf"), float("nan")], dtype=torch.float64),)


def _bases() -> Iterator[tuple[Any, ...]]:
    draw = Draw(75)
    yield draw.positive(4), draw.orth(4)
    yield draw.positive(3, 4), draw.orth(4, 3)
    yield draw.positive(4), torch.ones(4, dtype=torch.float64)
    yield draw.positive(3, 3), torch.ones(3, 3, dtype=torch.float64)


def _lists() -> Iterator[tuple[Any, ...]]:
    draw = Draw(76)
    yield ([draw.number(0.5), draw.number(2.0), draw.positive(3)],)
    yield ([draw.number(-0.5), torch.tensor(float("nan"), dtype=torch.float64)],)


def _numel(x: Type, *rest: Any) -> float:
    return float(2 * x.numel)


entries_mean = Op(
    "entries_mean",
    "(Tensor x, int dims) -> Tensor",
    _entries_mean,
    _infer_entries_mean,
    _means,
    _numel,
    STACKABLE | {Trait.LINEAR},
)
at_least = Op("at_least", "(Tensor x, Tensor floor) -> Tensor", _at_least, _infer_at_least, _floors, _numel, STACKABLE)
or_one = Op("or_one", "(Tensor x) -> Tensor", _or_one, lambda x: type(x)(x.shape, x.dtype), _ones, _numel, STACKABLE)
masked_divide = Op(
    "masked_divide",
    "(Tensor x, Tensor y, Tensor damping, int dims) -> Tensor",
    _masked_divide,
    _infer_masked_divide,
    _divides,
    _numel,
    STACKABLE,
)
recompose = Op(
    "recompose",
    "(Tensor values, Tensor basis) -> Tensor",
    _recompose,
    _infer_recompose,
    _bases,
    flops=lambda values, basis: basis.numel * (1.0 if isinstance(basis, Diag) else 2.0 * (basis.shape[-1] or 1)),
    traits=STACKABLE,
)
largest = Op("largest", "(Tensor[] xs) -> Tensor", _largest, _infer_largest, _lists, lambda xs: float(len(xs)))
