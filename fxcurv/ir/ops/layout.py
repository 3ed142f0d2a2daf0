"""Layout: between a parameter as the user stores it and the normal-form matrix (o, i) or (G, o, i), bias column last.

All copy: a result never shares memory with its operand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.ir import types
from fxcurv.ir.op import Op, Trait
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.rules import align, need, promote, times
from fxcurv.ir.types import Diag, Mat, Psd, Type

LINEAR = frozenset({Trait.LINEAR})


def _fresh(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _matricize(W: Tensor, perm: Sequence[int], shape: Sequence[int]) -> Tensor:
    """W.permute(perm).reshape(shape), contiguous: a stored weight (or gradient) -> Mat (o, i) or (G, o, i)."""
    return _fresh(W.permute(tuple(perm)).reshape(tuple(shape)))


def _tensorize(M: Tensor, perm: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The inverse of ``matricize`` with the same ``perm``: Mat -> contiguous, the stored weight's ``shape``."""
    permuted = M.reshape([shape[axis] for axis in perm])
    inverse = sorted(range(len(perm)), key=lambda position: perm[position])
    return _fresh(permuted.permute(inverse))


def _check_layout(name: str, perm: Sequence[int], stored: Sequence[int | None], matrix: Sequence[int | None]) -> None:
    if sorted(perm) != list(range(len(stored))):
        raise FxcurvError(
            f"op '{name}' got perm {list(perm)}, which does not order the {len(stored)} axes of the weight."
        )
    if None not in (times(*stored), times(*matrix)) and times(*stored) != times(*matrix):
        raise FxcurvError(f"op '{name}' cannot bring shape {tuple(stored)} and shape {tuple(matrix)} together.")


def _infer_matricize(W: Type, perm: Sequence[int], shape: Sequence[int]) -> Type:
    need("matricize", "W", W, Type)
    _check_layout("matricize", perm, W.shape, shape)
    return Mat(tuple(shape), W.dtype)


def _infer_tensorize(M: Type, perm: Sequence[int], shape: Sequence[int]) -> Type:
    need("tensorize", "M", M, Mat)
    _check_layout("tensorize", perm, shape, M.shape)
    return types.Tensor(tuple(shape), M.dtype)


_LAYOUTS: tuple[tuple[tuple[int, ...], list[int], list[int]], ...] = (
    ((3, 5), [0, 1], [3, 5]),  # linear
    ((3, 5), [1, 0], [5, 3]),  # x @ W
    ((4, 3, 2, 1), [0, 1, 2, 3], [4, 6]),  # convolution
    ((6, 2, 3), [0, 1, 2], [2, 3, 6]),  # two groups
    ((4, 3, 2, 5), [1, 0, 2, 3], [3, 40]),  # transposed convolution
    ((2, 5, 3), [2, 0, 1], [3, 10]),  # an order that is not its own inverse
    ((7,), [0], [7, 1, 1]),  # scale of a norm
)


def _matricize_samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(18)
    for stored, perm, matrix in _LAYOUTS:
        yield draw.normal(*stored), perm, matrix


def _tensorize_samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(19)
    for stored, perm, matrix in _LAYOUTS:
        yield draw.normal(*matrix), perm, list(stored)


matricize = Op(
    "matricize",
    "(Tensor W, int[] perm, int[] shape) -> Tensor",
    _matricize,
    _infer_matricize,
    _matricize_samples,
    traits=LINEAR,
)
tensorize = Op(
    "tensorize",
    "(Tensor M, int[] perm, int[] shape) -> Tensor",
    _tensorize,
    _infer_tensorize,
    _tensorize_samples,
    traits=LINEAR,
)


def _append_column(M: Tensor, v: Tensor) -> Tensor:
    """[M v]: the bias (gradient) as the last column, (o, i) -> (o, i + 1) or (G, o, i) -> (G, o, i + 1).

    v: any shape with G o elements, group-major, as biases are stored.
    """
    M, v = align(M, v)
    return torch.cat([M, v.reshape(*M.shape[:-1], 1)], dim=-1)


def _weight_columns(M: Tensor) -> Tensor:
    """All columns but the last, (o, i + 1) -> (o, i) or with a leading group: the weight of [W b]."""
    return _fresh(M[..., :-1])


def _last_column(M: Tensor) -> Tensor:
    """The last column flattened to the shape (G o,) of the stored bias: the bias of [W b]."""
    return _fresh(M[..., -1].reshape(-1))


def _infer_append_column(M: Type, v: Type) -> Type:
    need("append_column", "M", M, Mat)
    need("append_column", "v", v, Type)
    if v.numel != prod(size or 1 for size in M.shape[:-1]):
        raise FxcurvError(f"op 'append_column' needs one bias entry for each row of {M}, got {v}.")
    return Mat((*M.shape[:-1], _plus(M.shape[-1], 1)), promote(M, v))


def _infer_weight_columns(M: Type) -> Type:
    need("weight_columns", "M", M, Mat)
    return Mat((*M.shape[:-1], _plus(M.shape[-1], -1)), M.dtype)


def _infer_last_column(M: Type) -> Type:
    need("last_column", "M", M, Mat)
    return types.Tensor((prod(size or 1 for size in M.shape[:-1]),), M.dtype)


def _plus(size: int | None, step: int) -> int | None:
    return None if size is None else size + step


def _column_samples() -> Iterator[tuple[Tensor, Tensor]]:
    draw = Draw(20)
    for shape in ((3, 5), (1, 1), (4, 3, 2), (7, 1, 1)):
        yield draw.normal(*shape), draw.normal(prod(shape[:-1]))


append_column = Op(
    "append_column", "(Tensor M, Tensor v) -> Tensor", _append_column, _infer_append_column, _column_samples
)
weight_columns = Op(
    "weight_columns",
    "(Tensor M) -> Tensor",
    _weight_columns,
    _infer_weight_columns,
    lambda: ((M,) for M, _ in _column_samples()),
    traits=LINEAR,
)
last_column = Op(
    "last_column",
    "(Tensor M) -> Tensor",
    _last_column,
    _infer_last_column,
    lambda: ((M,) for M, _ in _column_samples()),
    traits=LINEAR,
)


def _border(A: Tensor) -> Tensor:
    """A with one more coordinate of zeros at the end: the constant coordinate of rows that have none.

    Psd (.., d, d) -> (.., d + 1, d + 1); a Diag (d,) -> (d + 1,).
    """
    return torch.nn.functional.pad(A, (0, 1) if A.ndim == 1 else (0, 1, 0, 1))


def _infer_border(A: Type) -> Type:
    need("border", "A", A, Psd, Diag)
    rank = 2 if isinstance(A, Psd) else 1
    if isinstance(A, Diag) and len(A.shape) != 1:
        raise FxcurvError(f"op 'border' takes a diagonal of one group, got {A}.")
    return type(A)((*A.shape[:-rank], *(_plus(size, 1) for size in A.shape[-rank:])), A.dtype)


def _border_samples() -> Iterator[tuple[Tensor]]:
    draw = Draw(21)
    yield (draw.psd(3),)
    yield (draw.psd(2, 4),)
    yield (draw.positive(5),)


border = Op("border", "(Tensor A) -> Tensor", _border, _infer_border, _border_samples, traits=LINEAR)
