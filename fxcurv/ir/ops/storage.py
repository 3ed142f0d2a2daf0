"""How a value is kept between the steps that use it: half of a symmetric matrix, or fewer bits of each number.

A triangle is stored in rectangular full packed form (Gustavson, Wasniewski, Dongarra & Langou 2010): one triangle of
the upper left block and one of the lower right block share a rectangle, and the block between them is stored whole. So
packing and unpacking are a few copies of large blocks, where a row by row layout would need an index for every entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import Op, Trait
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.rules import need
from fxcurv.ir.types import DTYPES, Packed, Psd, Type

STACKABLE = frozenset({Trait.BATCHABLE})


def _half(d: int) -> int:
    """Size of the upper left block."""
    return (d + 1) // 2


def _pack_triangle(A: Tensor) -> Tensor:
    """A symmetric Psd (d, d) or (G, d, d) as d (d + 1) / 2 numbers, Packed (n,) or (G, n): see the module's docstring.

    The lower triangle is read.
    """
    d, k = A.shape[-1], _half(A.shape[-1])
    odd = d % 2
    shared = A.new_zeros(*A.shape[:-2], k + 1 - odd, k)
    shared[..., 1 - odd :, :] = A[..., :k, :k].tril()
    shared[..., : d - k, odd:] += A[..., k:, k:].tril().mT
    return torch.cat([shared.flatten(-2), A[..., k:, :k].flatten(-2)], dim=-1)


def _unpack_triangle(P: Tensor) -> Tensor:
    """The symmetric matrix that ``pack_triangle`` stored, Psd (d, d) or (G, d, d), exactly."""
    d = size_of(P.shape[-1])
    k, odd = _half(d), d % 2
    shared = P[..., : (k + 1 - odd) * k].unflatten(-1, (k + 1 - odd, k))
    A = P.new_empty(*P.shape[:-1], d, d)
    A[..., k:, :k] = P[..., (k + 1 - odd) * k :].unflatten(-1, (d - k, k)) if d > 1 else 0.0
    A[..., :k, k:] = A[..., k:, :k].mT
    for block, triangle in (
        (A[..., :k, :k], shared[..., 1 - odd :, :].tril()),
        (A[..., k:, k:], shared[..., : d - k, odd:].triu().mT),
    ):
        block.copy_(triangle)
        block += triangle.tril(-1).mT
    return A


def size_of(n: int) -> int:
    """The d of d (d + 1) / 2 = ``n`` numbers; raises :class:`FxcurvError` when there is none."""
    d = (isqrt(8 * n + 1) - 1) // 2
    if d * (d + 1) // 2 != n:
        raise FxcurvError(f"{n} numbers are no triangle of a square matrix.")
    return d


def _infer_pack(A: Type) -> Type:
    d = need("pack_triangle", "A", A, Psd).shape[-1]
    return Packed((*A.shape[:-2], None if d is None else d * (d + 1) // 2), A.dtype)


def _infer_unpack(P: Type) -> Type:
    n = need("unpack_triangle", "P", P, Packed).shape[-1]
    d = None if n is None else size_of(n)
    return Psd((*P.shape[:-1], d, d), P.dtype)


def _matrices() -> Iterator[tuple[Tensor]]:
    draw = Draw(63)
    for d, groups in ((1, ()), (2, ()), (3, ()), (6, ()), (7, ()), (4, (3,)), (5, (2,))):
        yield (draw.psd(d, *groups),)


pack_triangle = Op("pack_triangle", "(Tensor A) -> Tensor", _pack_triangle, _infer_pack, _matrices, traits=STACKABLE)
unpack_triangle = Op(
    "unpack_triangle",
    "(Tensor P) -> Tensor",
    _unpack_triangle,
    _infer_unpack,
    lambda: ((_pack_triangle(A),) for (A,) in _matrices()),
    traits=STACKABLE,
)


def _cast(x: Tensor, dtype: str) -> Tensor:
    """x in another precision, by its name in program text: "bf16", "f16", "f32" or "f64"."""
    return x.to(DTYPES[dtype], copy=True)


def _infer_cast(x: Type, dtype: str) -> Type:
    if dtype not in DTYPES or not DTYPES[dtype].is_floating_point:
        raise FxcurvError(f"op 'cast' got the dtype '{dtype}'; choose bf16, f16, f32 or f64.")
    return type(need("cast", "x", x, Type))(x.shape, DTYPES[dtype])


def _cast_samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(64)
    for dtype in ("bf16", "f32", "f64"):
        yield draw.normal(3, 4), dtype


cast = Op("cast", "(Tensor x, str dtype) -> Tensor", _cast, _infer_cast, _cast_samples, traits=STACKABLE)
