"""What the ops share: type rules, the accumulation type and the broadcasting of scalars over groups.

Conventions. Rows have shape (b, s, G, d). A result for one group is written without the group dimension,
(d, d), and for G > 1 with it, (G, d, d). A square operand with as many dimensions as the matrix it meets is a
matrix, one with a dimension less is a diagonal. A scalar of a group has shape (G,): it lines up with the
*leading* dimensions of what it scales. Sums over rows accumulate in float32, or in float64 for float64 rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxcurv.errors import FxcurvError
from fxcurv.ir.types import Diag, Psd, Rows, Scalar, Shape, Type


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Type in which sums over ``dtype`` numbers are kept."""
    return torch.promote_types(dtype, torch.float32)


def spread(scale: Any, x: torch.Tensor) -> Any:
    """``scale`` ready to be combined with ``x``: dimensions lined up from the left, in x's accumulation type.

    A scalar stays in (at least) float32 beside a half-precision ``x``, where 1 - 0.999 would be 0.
    """
    if not isinstance(scale, torch.Tensor):
        return scale
    return scale.to(accumulator(x.dtype)).reshape(scale.shape + (1,) * (x.ndim - scale.ndim))


def number(value: Any, like: torch.Tensor) -> torch.Tensor:
    """A number or Scalar in the type of ``like``, made where it lies: nothing is copied to a device."""
    if isinstance(value, torch.Tensor):
        return value.to(like.dtype)
    return torch.full((), float(value), dtype=like.dtype, device=like.device)


def promote(*types: Any) -> torch.dtype:
    """Common dtype of the tensors among ``types``."""
    dtypes = [item.dtype for item in types if isinstance(item, Type)]
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result


def align(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors in their common dtype."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def times(*sizes: int | None) -> int | None:
    """Product of sizes; unknown when one is."""
    total = 1
    for size in sizes:
        if size is None:
            return None
        total *= size
    return total


def count_of(size: int | None) -> int:
    """A size for the cost model, where an unknown one counts as 1."""
    return 1 if size is None else size


def grouped(groups: int | None, *core: int | None) -> Shape:
    """Shape of a result with ``groups`` groups: no group dimension for one."""
    return core if groups == 1 else (groups, *core)


def need(op: str, operand: str, given: Any, *classes: type[Type]) -> Type:
    """``given`` if it is one of ``classes``; raises :class:`FxcurvError` otherwise."""
    if not isinstance(given, classes):
        wanted = " or ".join(cls.__name__ for cls in classes)
        raise FxcurvError(f"operand '{operand}' of op '{op}' must be a {wanted}, got {given}.")
    return given


def need_scalar(op: str, operand: str, given: Any, groups: Shape = ()) -> None:
    """Check that ``given`` is a number, a Scalar, or a Scalar a group."""
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        return
    need(op, operand, given, Scalar)
    if given.shape and given.shape != groups[: len(given.shape)]:
        raise FxcurvError(
            f"operand '{operand}' of op '{op}' has shape {given.shape}; "
            f"it must be a number or have one value for each of the groups {groups}."
        )


def need_shape(op: str, operand: str, given: Type, shape: Sequence[int | None]) -> None:
    """Check a shape, taking an unknown size for right."""
    fits = len(given.shape) == len(shape) and all(
        None in (a, b) or a == b for a, b in zip(given.shape, shape, strict=True)
    )
    if not fits:
        raise FxcurvError(f"operand '{operand}' of op '{op}' is {given}; its shape must be {tuple(shape)}.")


def need_rows(op: str, *operands: tuple[str, Any]) -> None:
    """Check rows operands; several must agree in examples, positions and groups."""
    for name, given in operands:
        need(op, name, given, Rows)
        need_shape(op, name, given, (*operands[0][1].shape[:3], given.shape[3]))


def need_square(op: str, operand: str, given: Any, size: int | None, groups: Shape, *classes: type[Type]) -> None:
    """Check a matrix (one of ``classes``) or a diagonal of ``size`` in each of ``groups``."""
    need(op, operand, given, Diag, *classes)
    need_shape(op, operand, given, (*groups, size) if isinstance(given, Diag) else (*groups, size, size))


def need_flag(op: str, operand: str, given: Type, diagonal: bool) -> None:
    """Check that a matrix and a diagonal can be told apart when only the tensor is there.

    A tensor of shape (d, d) is one matrix or the diagonals of d groups. ``diagonal=True`` says the latter.
    """
    need(op, operand, given, Diag, Psd)
    is_diagonal = isinstance(given, Diag)
    if is_diagonal and not diagonal and len(given.shape) > 1 and given.shape[-1] == given.shape[-2]:
        raise FxcurvError(f"op '{op}' would read '{operand}' of type {given} as a matrix; pass diagonal=True with it.")
    if diagonal and not is_diagonal:
        raise FxcurvError(f"op '{op}' has diagonal=True but '{operand}' is {given}; leave the flag out.")


def reads_as_diagonal(x: torch.Tensor, diagonal: bool) -> bool:
    """How a tensor is read by the ops that take a matrix or a diagonal."""
    return diagonal or x.ndim < 2 or x.shape[-1] != x.shape[-2]
