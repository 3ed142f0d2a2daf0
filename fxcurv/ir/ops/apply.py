"""Applying curvature to a gradient: products from the left and right, in eigenbases, per unit and per mode.

V is the normal-form gradient, (o, i) or (G, o, i). A side is a matrix with as many dimensions as V, or a diagonal
with one less, which scales. Operands of different dtypes are computed in, and give, their common dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import Op, Trait
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.rules import accumulator, align, need, need_square, promote, times
from fxcurv.ir.types import Diag, Mat, Orth, Psd, Sym, Tri, Type

LINEAR = frozenset({Trait.LINEAR})
STACKABLE = LINEAR | {Trait.BATCHABLE}
SQUARE = (Sym, Orth, Tri)


def left(M: Tensor, V: Tensor) -> Tensor:
    """M V, for a matrix or a diagonal M."""
    return M.unsqueeze(-1) * V if M.ndim < V.ndim else M @ V


def right(V: Tensor, M: Tensor) -> Tensor:
    """V M, for a matrix or a diagonal M."""
    return V * M.unsqueeze(-2) if M.ndim < V.ndim else V @ M


def transposed(M: Tensor, V: Tensor) -> Tensor:
    """M^T; a diagonal is its own transpose."""
    return M if M.ndim < V.ndim else M.mT


def _kron_apply(V: Tensor, GI: Tensor, AI: Tensor) -> Tensor:
    """GI V AI: the inverse Kronecker product applied to a gradient (Martens & Grosse 2015), Mat (o, i) or (G, o, i).

    GI: (o, o) or Diag (o,); AI: (i, i) or Diag (i,), symmetric; each with a leading G for groups.
    """
    V, GI, AI = align(V, GI, AI)
    return right(left(GI, V), AI)


def _right_apply(V: Tensor, AI: Tensor) -> Tensor:
    """V AI: only the input side is preconditioned (FOOF, Benzing 2022), Mat (o, i) or (G, o, i)."""
    V, AI = align(V, AI)
    return right(V, AI)


def _rotate(V: Tensor, QG: Tensor, QA: Tensor) -> Tensor:
    """QG^T V QA: the gradient in the Kronecker eigenbasis (George et al. 2018), Mat (o, i) or (G, o, i).

    A Diag of ones stands for the identity basis.
    """
    V, QG, QA = align(V, QG, QA)
    return right(left(transposed(QG, V), V), QA)


def _rotate_back(V: Tensor, QG: Tensor, QA: Tensor) -> Tensor:
    """QG V QA^T: from the Kronecker eigenbasis back to the parameters, the inverse of ``rotate``."""
    V, QG, QA = align(V, QG, QA)
    return right(left(QG, V), transposed(QA, V))


def _two_sides(name: str, outer: str, inner: str, *classes: type[Type]) -> Callable[[Type, Type, Type], Type]:
    def infer(V: Type, left_side: Type, right_side: Type) -> Type:
        need(name, "V", V, Mat)
        need_square(name, outer, left_side, V.shape[-2], V.batch, *classes)
        need_square(name, inner, right_side, V.shape[-1], V.batch, *classes)
        return Mat(V.shape, promote(V, left_side, right_side))

    return infer


def _side_flops(V: Type, side: Type) -> float:
    return V.numel * (1.0 if isinstance(side, Diag) else 2.0 * (side.shape[-1] or 1))


def _sides(orthogonal: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    draw = Draw(14)
    square = draw.orth if orthogonal else draw.psd
    for groups, o, i in (((), 3, 5), ((), 1, 1), ((), 7, 2), ((4,), 3, 2), ((3,), 3, 3)):
        V = draw.normal(*groups, o, i)
        yield V, square(o, *groups), square(i, *groups)
        ones_o, ones_i = V.new_ones(*groups, o), V.new_ones(*groups, i)
        diagonals = (ones_o, ones_i) if orthogonal else (draw.positive(*groups, o), draw.positive(*groups, i))
        yield V, diagonals[0], square(i, *groups)
        yield V, square(o, *groups), diagonals[1]
        yield V, *diagonals


def _two_sided(name: str, reference: Callable[..., Tensor], sides: tuple[str, str], *classes: type[Type]) -> Op:
    schema = f"(Tensor V, Tensor {sides[0]}, Tensor {sides[1]}) -> Tensor"
    return Op(
        name,
        schema,
        reference,
        _two_sides(name, *sides, *classes),
        lambda: _sides(Orth in classes and Sym not in classes),
        flops=lambda V, first, second: _side_flops(V, first) + _side_flops(V, second),
        traits=STACKABLE,
    )


kron_apply = _two_sided("kron_apply", _kron_apply, ("GI", "AI"), *SQUARE)
rotate = _two_sided("rotate", _rotate, ("QG", "QA"), Orth)
rotate_back = _two_sided("rotate_back", _rotate_back, ("QG", "QA"), Orth)


def _infer_right_apply(V: Type, AI: Type) -> Type:
    need("right_apply", "V", V, Mat)
    need_square("right_apply", "AI", AI, V.shape[-1], V.batch, *SQUARE)
    return Mat(V.shape, promote(V, AI))


right_apply = Op(
    "right_apply",
    "(Tensor V, Tensor AI) -> Tensor",
    _right_apply,
    _infer_right_apply,
    lambda: ((V, AI) for V, _, AI in _sides(False)),
    flops=_side_flops,
    traits=STACKABLE,
)


def _unit_apply(V: Tensor, M: Tensor) -> Tensor:
    """M vec(V) in each group, vec row-major, in V's shape (o, i) or (G, o, i).

    M: Psd (o i, o i) or (G, o i, o i), or its diagonal (o i,) or (G, o i): blocks kept whole (norm scale and shift).
    """
    V, M = align(V, M)
    column = V.reshape(*V.shape[:-2], -1, 1)
    return left(M, column).reshape(V.shape)


def _infer_unit_apply(V: Type, M: Type) -> Type:
    need("unit_apply", "V", V, Mat)
    size = times(*V.shape[-2:])
    need_square("unit_apply", "M", M, size, V.batch, *SQUARE)
    return Mat(V.shape, promote(V, M))


def _unit_samples() -> Iterator[tuple[Tensor, Tensor]]:
    draw = Draw(15)
    for groups, o, i in (((), 3, 5), ((), 1, 1), ((4,), 1, 2), ((3,), 2, 3)):
        yield draw.normal(*groups, o, i), draw.psd(o * i, *groups)
        yield draw.normal(*groups, o, i), draw.positive(*groups, o * i)


unit_apply = Op(
    "unit_apply",
    "(Tensor V, Tensor M) -> Tensor",
    _unit_apply,
    _infer_unit_apply,
    _unit_samples,
    flops=lambda V, M: M.numel * (1.0 if isinstance(M, Diag) else 2.0),
    traits=STACKABLE,
)


def _mode_gram(T: Tensor, mode: int) -> Tensor:
    """T_(mode) T_(mode)^T, Psd (d, d), of any tensor unfolded along ``mode`` (Shampoo, Gupta et al. 2018)."""
    unfolded = T.to(accumulator(T.dtype)).movedim(mode, 0).reshape(T.shape[mode], -1)
    return unfolded @ unfolded.mT


def _mode_diag(T: Tensor, mode: int) -> Tensor:
    """The diagonal of ``mode_gram``, Diag (d,): sums of squares of the slices along ``mode``."""
    unfolded = T.to(accumulator(T.dtype)).movedim(mode, 0).reshape(T.shape[mode], -1)
    return unfolded.square().sum(dim=1)


def _mode_apply(T: Tensor, M: Tensor, mode: int) -> Tensor:
    """T multiplied by M along ``mode``: out[.., j, ..] = sum_k M[j, k] T[.., k, ..]; a Diag (d,) scales the slices."""
    T, M = align(T, M)
    if M.ndim == 1:
        return T * M.reshape(-1, *(1,) * (T.ndim - mode - 1))
    return torch.tensordot(M, T, dims=([1], [mode])).movedim(0, mode).contiguous()


def _size(name: str, T: Type, mode: int) -> int | None:
    need(name, "T", T, Type)
    if not 0 <= mode < len(T.shape):
        raise FxcurvError(f"op '{name}' got mode {mode} for {T}; modes go from 0 to {len(T.shape) - 1}.")
    return T.shape[mode]


def _infer_mode_apply(T: Type, M: Type, mode: int) -> Type:
    need_square("mode_apply", "M", M, _size("mode_apply", T, mode), (), *SQUARE)
    return type(T)(T.shape, promote(T, M))


def _mode_samples() -> Iterator[tuple[Tensor, int]]:
    draw = Draw(16)
    for shape in ((5,), (3, 4), (2, 3, 5), (3, 2, 1, 2)):
        for mode in range(len(shape)):
            yield draw.normal(*shape), mode


def _mode_apply_samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(17)
    for T, mode in _mode_samples():
        yield T, draw.psd(T.shape[mode]), mode
        yield T, draw.positive(T.shape[mode]), mode


mode_gram = Op(
    "mode_gram",
    "(Tensor T, int mode) -> Tensor",
    _mode_gram,
    lambda T, mode: Psd((_size("mode_gram", T, mode),) * 2, accumulator(T.dtype)),
    _mode_samples,
    flops=lambda T, mode: 2 * T.numel * T.shape[mode],
)
mode_diag = Op(
    "mode_diag",
    "(Tensor T, int mode) -> Tensor",
    _mode_diag,
    lambda T, mode: Diag((_size("mode_diag", T, mode),), accumulator(T.dtype)),
    _mode_samples,
    flops=lambda T, mode: 2 * T.numel,
)
mode_apply = Op(
    "mode_apply",
    "(Tensor T, Tensor M, int mode) -> Tensor",
    _mode_apply,
    _infer_mode_apply,
    _mode_apply_samples,
    flops=lambda T, M, mode: _side_flops(T, M),
    traits=LINEAR,
)
