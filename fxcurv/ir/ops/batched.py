"""Many equal things as one: stacking values of one type, and the ops that act on each row of a stack.

A stack has one more leading dimension than its rows. Most ops already treat leading dimensions as a batch (trait
``BATCHABLE``); those that reduce over, or name, *all* dimensions have a twin here with "each" in its name. The pass
``batch`` writes these ops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import Op, Trait
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.rules import accumulator, align, need, need_shape, need_square, promote, times
from fxcurv.ir.types import Diag, Mat, Orth, Psd, Scalar, Shape, Sym, Tri, Type
from fxcurv.ir.types import Tensor as Plain

LINEAR = frozenset({Trait.LINEAR})


def stacked(type_: Type, rows: int) -> Type:
    """The type of ``rows`` values of a type on top of one another."""
    return replace(type_, shape=(rows, *type_.shape))


def row_of(type_: Type) -> Type:
    """The type of one row of a stack; raises :class:`FxcurvError` when there is no leading dimension to take off."""
    if not type_.shape or (type_.rank is not None and not type_.batch):
        raise FxcurvError(f"{type_} is no stack: it has no leading dimension beside its own.")
    return replace(type_, shape=type_.shape[1:])


def _stack(xs: Sequence[Tensor]) -> Tensor:
    """Equal tensors on top of one another, in a new leading dimension."""
    return torch.stack(list(xs))


def _unstack(x: Tensor) -> tuple[Tensor, ...]:
    """The rows of a stack, as many tensors as its leading dimension says."""
    return tuple(row.clone(memory_format=torch.contiguous_format) for row in x.unbind())


def _infer_stack(xs: Sequence[Type]) -> Type:
    if not isinstance(xs, (list, tuple)) or not xs:
        raise FxcurvError(f"operand 'xs' of op 'stack' must be a list of at least one value, got {xs}.")
    if any(x != xs[0] for x in xs):
        raise FxcurvError(f"op 'stack' takes values of one type, got {', '.join(str(x) for x in dict.fromkeys(xs))}.")
    return stacked(need("stack", "xs", xs[0], Type), len(xs))


def _infer_unstack(x: Type) -> tuple[Type, ...]:
    row = row_of(need("unstack", "x", x, Type))
    if x.shape[0] is None:
        raise FxcurvError(f"op 'unstack' must know how many rows there are, got {x}.")
    return (row,) * x.shape[0]


def _stack_samples() -> Iterator[tuple[list[Tensor]]]:
    draw = Draw(71)
    yield ([draw.normal(3, 4) for _ in range(5)],)
    yield ([draw.normal()],)
    yield ([draw.normal(2, 1, 3).mT for _ in range(2)],)


stack = Op("stack", "(Tensor[] xs) -> Tensor", _stack, _infer_stack, _stack_samples)
unstack = Op(
    "unstack",
    "(Tensor x) -> Tensor[]",
    _unstack,
    _infer_unstack,
    lambda: ((_stack(xs),) for (xs,) in _stack_samples()),
)


def _dot_each(x: Tensor, y: Tensor) -> Tensor:
    """sum(x * y) over all dimensions but the first, Scalar (L,) in float32 (float64 where an operand is)."""
    dtype = torch.promote_types(accumulator(x.dtype), accumulator(y.dtype))
    return (x.to(dtype) * y.to(dtype)).reshape(x.shape[0], -1).sum(dim=1)


def _infer_dot_each(x: Type, y: Type) -> Type:
    row_of(need("dot_each", "x", x, Type))
    need_shape("dot_each", "y", need("dot_each", "y", y, Type), x.shape)
    return Scalar(x.shape[:1], accumulator(promote(x, y)))


def _each_samples() -> Iterator[tuple[Tensor]]:
    draw = Draw(72)
    for shape in ((4, 3, 5), (1, 2), (3,), (2, 3, 1, 2)):
        yield (draw.normal(*shape),)


dot_each = Op(
    "dot_each",
    "(Tensor x, Tensor y) -> Tensor",
    _dot_each,
    _infer_dot_each,
    lambda: ((x, x.cos()) for (x,) in _each_samples()),
    flops=lambda x, y: 2 * x.numel,
    traits=LINEAR,
)


def _finite_each(xs: Sequence[Tensor]) -> Tensor:
    """For every row whether all its elements are finite in every stack: a boolean Scalar (L,).

    By the smallest and largest element, as ``finite``.
    """
    ends = [end for x in xs if x.numel() for end in _ends(x)]
    if not ends:
        return torch.ones(xs[0].shape[:1], dtype=torch.bool, device=xs[0].device)
    return torch.isfinite(torch.stack(align(*ends))).all(dim=0)


def _ends(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest and the smallest element of each row; two reductions are ten times faster than ``aminmax`` here."""
    flat = x.reshape(x.shape[0], -1)
    return flat.amax(dim=1), flat.amin(dim=1)


def _infer_finite_each(xs: Sequence[Type]) -> Type:
    if not isinstance(xs, (list, tuple)) or not xs:
        raise FxcurvError(f"operand 'xs' of op 'finite_each' must be a list of at least one stack, got {xs}.")
    for x in xs:
        row_of(need("finite_each", "xs", x, Type))
        need_shape("finite_each", "xs", x, (xs[0].shape[0], *x.shape[1:]))
    return Scalar(xs[0].shape[:1], torch.bool)


def _finite_each_samples() -> Iterator[tuple[list[Tensor]]]:
    draw = Draw(73)
    yield ([draw.normal(4, 3, 2), draw.normal(4)],)
    yield ([draw.normal(2, 0)],)
    for bad in (float("nan"), float("inf"), -float("inf")):
        xs = [draw.normal(3, 2), draw.normal(3)]
        xs[0][1, 1] = bad
        yield (xs,)


finite_each = Op(
    "finite_each",
    "(Tensor[] xs) -> Tensor",
    _finite_each,
    _infer_finite_each,
    _finite_each_samples,
    flops=lambda xs: 2 * sum(x.numel for x in xs),
)


def _last_column_each(M: Tensor) -> Tensor:
    """The last column of each row of a stack, flattened to the shape of the stored bias, Tensor (L, G o)."""
    return M[..., -1].reshape(M.shape[0], -1).clone(memory_format=torch.contiguous_format)


def _infer_last_column_each(M: Type) -> Type:
    need("last_column_each", "M", M, Mat)
    row_of(M)
    return Plain((M.shape[0], times(*M.shape[1:-1])), M.dtype)


def _stacks_of_matrices() -> Iterator[tuple[Tensor]]:
    draw = Draw(74)
    for shape in ((4, 3, 5), (1, 1, 1), (2, 4, 3, 2)):
        yield (draw.normal(*shape),)


last_column_each = Op(
    "last_column_each",
    "(Tensor M) -> Tensor",
    _last_column_each,
    _infer_last_column_each,
    _stacks_of_matrices,
    traits=LINEAR,
)


def _unfolded(T: Tensor, mode: int) -> Tensor:
    """(L, d, rest): each row of the stack unfolded along its own ``mode``."""
    x = T.to(accumulator(T.dtype)).movedim(mode + 1, 1)
    return x.reshape(*x.shape[:2], -1)


def _mode_gram_each(T: Tensor, mode: int) -> Tensor:
    """``mode_gram`` of each row of a stack, Psd (L, d, d); ``mode`` counts the dimensions of a row."""
    unfolded = _unfolded(T, mode)
    return unfolded @ unfolded.mT


def _mode_diag_each(T: Tensor, mode: int) -> Tensor:
    """``mode_diag`` of each row of a stack, Diag (L, d)."""
    return _unfolded(T, mode).square().sum(dim=2)


def _mode_apply_each(T: Tensor, M: Tensor, mode: int) -> Tensor:
    """``mode_apply`` of each row of a stack; M: (L, d, d), or Diag (L, d)."""
    T, M = align(T, M)
    moved = T.movedim(mode + 1, 1)
    flat = moved.reshape(*moved.shape[:2], -1)
    product = M @ flat if M.ndim == 3 else M.unsqueeze(-1) * flat
    return product.reshape(moved.shape).movedim(1, mode + 1).contiguous()


def _mode_size(name: str, T: Type, mode: int) -> Shape:
    row = row_of(need(name, "T", T, Type))
    if not 0 <= mode < len(row.shape):
        raise FxcurvError(f"op '{name}' got mode {mode} for rows {row}; modes go from 0 to {len(row.shape) - 1}.")
    return T.shape[0], row.shape[mode]


def _infer_mode_gram_each(T: Type, mode: int) -> Type:
    rows, size = _mode_size("mode_gram_each", T, mode)
    return Psd((rows, size, size), accumulator(T.dtype))


def _infer_mode_diag_each(T: Type, mode: int) -> Type:
    return Diag(_mode_size("mode_diag_each", T, mode), accumulator(T.dtype))


def _infer_mode_apply_each(T: Type, M: Type, mode: int) -> Type:
    rows, size = _mode_size("mode_apply_each", T, mode)
    need_square("mode_apply_each", "M", M, size, (rows,), Sym, Orth, Tri)
    return type(T)(T.shape, promote(T, M))


def _mode_samples() -> Iterator[tuple[Tensor, int]]:
    draw = Draw(75)
    for shape in ((5,), (3, 4), (2, 3, 5)):
        for mode in range(len(shape)):
            yield draw.normal(3, *shape), mode


def _mode_apply_samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(76)
    for T, mode in _mode_samples():
        yield T, draw.psd(T.shape[mode + 1], 3), mode
        yield T, draw.positive(3, T.shape[mode + 1]), mode


mode_gram_each = Op(
    "mode_gram_each",
    "(Tensor T, int mode) -> Tensor",
    _mode_gram_each,
    _infer_mode_gram_each,
    _mode_samples,
    flops=lambda T, mode: 2 * T.numel * (T.shape[mode + 1] or 1),
)
mode_diag_each = Op(
    "mode_diag_each",
    "(Tensor T, int mode) -> Tensor",
    _mode_diag_each,
    _infer_mode_diag_each,
    _mode_samples,
    flops=lambda T, mode: 2 * T.numel,
)
mode_apply_each = Op(
    "mode_apply_each",
    "(Tensor T, Tensor M, int mode) -> Tensor",
    _mode_apply_each,
    _infer_mode_apply_each,
    _mode_apply_samples,
    flops=lambda T, M, mode: T.numel * (1.0 if isinstance(M, Diag) else 2.0 * (M.shape[-1] or 1)),
    traits=LINEAR,
)
