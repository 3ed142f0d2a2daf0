"""Scalars that decide how damping is split over the factors of a layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import Op, Trait
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.rules import need_flag, promote, reads_as_diagonal
from fxcurv.ir.types import Diag, Scalar, Type

STACKABLE = frozenset({Trait.BATCHABLE})


def _mean_diagonal(A: Tensor, diagonal: bool = False) -> Tensor:
    """Mean of the diagonal, tr A / dim A: Psd or Diag -> Scalar, or one a group (G,).

    ``diagonal=True`` says that a tensor of shape (d, d) holds the diagonals of d groups.
    """
    return (A if reads_as_diagonal(A, diagonal) else A.diagonal(dim1=-2, dim2=-1)).mean(dim=-1)


def _infer_mean_diagonal(A: Type, diagonal: bool = False) -> Type:
    need_flag("mean_diagonal", "A", A, diagonal)
    return Scalar(A.batch, A.dtype)


def _factor_samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(8)
    yield (draw.psd(5),)
    yield (draw.psd(1),)
    yield (draw.psd(3, 4),)
    yield (draw.positive(7),)
    yield (draw.positive(4, 3),)
    yield draw.positive(3, 3), True


mean_diagonal = Op(
    "mean_diagonal",
    "(Tensor A, bool diagonal=False) -> Tensor",
    _mean_diagonal,
    _infer_mean_diagonal,
    _factor_samples,
    flops=lambda A, diagonal=False: A.numel / (1 if isinstance(A, Diag) else A.shape[-1]),
    traits=STACKABLE | {Trait.LINEAR},
)


def _pi_split(A: Tensor, G: Tensor, diagonal_A: bool = False, diagonal_G: bool = False) -> Tensor:
    """pi = sqrt((tr A / dim A) / (tr G / dim G)), and 1 where either mean is not a positive finite number.

    The factors are damped as A + pi sqrt(lambda) I and G + sqrt(lambda) / pi I: the split that minimises a trace-norm
    bound of the cross terms (Martens & Grosse 2015, section 6.3).
    A, G: Psd or Diag with equal groups -> Scalar or (G,).
    """
    a, g = _mean_diagonal(A, diagonal_A), _mean_diagonal(G, diagonal_G)
    usable = (a > 0) & (g > 0) & torch.isfinite(a) & torch.isfinite(g)
    one = torch.ones_like(a)
    return torch.where(usable, (torch.where(usable, a, one) / torch.where(usable, g, one)).sqrt(), one)


def _infer_pi_split(A: Type, G: Type, diagonal_A: bool = False, diagonal_G: bool = False) -> Type:
    need_flag("pi_split", "A", A, diagonal_A)
    need_flag("pi_split", "G", G, diagonal_G)
    if A.batch != G.batch:
        raise FxcurvError(f"op 'pi_split' needs factors with equal groups, got A = {A} and G = {G}.")
    return Scalar(A.batch, promote(A, G))


def _pi_samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(9)
    yield draw.psd(5), draw.psd(3)
    yield draw.positive(5), draw.psd(3)
    yield draw.psd(2, 4), draw.psd(3, 4)
    yield draw.positive(4, 2), draw.psd(3, 4)
    yield draw.psd(2, 3), draw.positive(3, 3), False, True
    yield torch.zeros(2, 2, dtype=torch.float64), draw.psd(3)


pi_split = Op(
    "pi_split",
    "(Tensor A, Tensor G, bool diagonal_A=False, bool diagonal_G=False) -> Tensor",
    _pi_split,
    _infer_pi_split,
    _pi_samples,
    flops=lambda A, G, *flags: sum(t.numel / t.shape[-1] for t in (A, G)),
    traits=STACKABLE,
)
