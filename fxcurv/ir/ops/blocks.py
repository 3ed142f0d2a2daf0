"""Factors cut into diagonal blocks of one size: their Gram, and the product of a gradient with two such sides.

A side of d features is cut into n = ceil(d / size) runs of ``size`` neighbours; what couples different runs is left
out. Blocks are stacked, (n, size, size) or (G, n, size, size), so that one batched factorisation inverts all of them.
The last run may be shorter: its block is filled up with zeros, which a positive damping keeps invertible and which meet
the zeros that a gradient is filled up with. Work and memory of a side fall from d^2 to d size (Chen et al. 2021).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import Op
from fxcurv.ir.ops.apply import STACKABLE, left, right
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.rules import accumulator, align, count_of, grouped, need, need_rows, need_shape, promote
from fxcurv.ir.ops.statistics import ADDITIVE, ungroup, wide
from fxcurv.ir.types import Diag, Mat, Psd, Sym, Type


def block_count(d: int, size: int) -> int:
    """Number of blocks of ``size`` that hold ``d`` features."""
    return -(-d // size)


def _cut(x: Tensor, size: int) -> Tensor:
    """The last dimension d as (n, size), filled up with zeros."""
    d = x.shape[-1]
    n = block_count(d, size)
    return (F.pad(x, (0, n * size - d)) if n * size > d else x).unflatten(-1, (n, size))


def _block_gram(rows: Tensor, size: int) -> Tensor:
    """The diagonal blocks of ``gram``: sum of r_k r_k^T for every run r_k of ``size`` features of a row.

    Rows (b, s, G, d) -> Psd (n, size, size) or (G, n, size, size), n = ceil(d / size), the last block filled up with
    zeros. What lies outside the blocks is never computed.
    """
    runs = _cut(wide(rows).flatten(0, 1), size).permute(1, 2, 0, 3).contiguous()  # (G, n, b s, size)
    return ungroup(runs.mT @ runs)


def _infer_block_gram(rows: Type, size: int) -> Type:
    need_rows("block_gram", ("rows", rows))
    if size < 1:
        raise FxcurvError(f"op 'block_gram' got blocks of size {size}; they have at least 1 feature.")
    n = block_count(count_of(rows.shape[3]), size)
    return Psd(grouped(rows.shape[2], n, size, size), accumulator(rows.dtype))


def _rows_samples() -> Iterator[tuple[Tensor, int]]:
    draw = Draw(51)
    for shape, size in (((5, 1, 1, 4), 2), ((2, 3, 1, 5), 2), ((3, 2, 2, 7), 3), ((4, 1, 1, 3), 8), ((0, 2, 1, 3), 2)):
        yield draw.normal(*shape), size


block_gram = Op(
    "block_gram",
    "(Tensor rows, int size) -> Tensor",
    _block_gram,
    _infer_block_gram,
    _rows_samples,
    flops=lambda rows, size: 2.0 * rows.numel * size,
    traits=ADDITIVE,
)


def _block_apply(V: Tensor, GI: Tensor, AI: Tensor) -> Tensor:
    """GI V AI where a side may be block-diagonal, Mat (o, i) or (G, o, i).

    A side with a dimension more than V holds blocks, (n, size, size) or (G, n, size, size); with as many it is a
    matrix, with one less a diagonal. As ``kron_apply`` otherwise.
    """
    V, GI, AI = align(V, GI, AI)
    if GI.ndim > V.ndim:
        runs = GI @ _cut(V.mT, GI.shape[-1]).movedim(-3, -1)  # (.., n, size, i)
        V = runs.flatten(-3, -2)[..., : V.shape[-2], :]
    else:
        V = left(GI, V)
    if AI.ndim > V.ndim:
        runs = _cut(V, AI.shape[-1]).movedim(-2, -3) @ AI  # (.., n, o, size)
        return runs.movedim(-3, -2).flatten(-2)[..., : V.shape[-1]].contiguous()
    return right(V, AI).contiguous()


def _infer_block_apply(V: Type, GI: Type, AI: Type) -> Type:
    need("block_apply", "V", V, Mat)
    for operand, side, d in (("GI", GI, V.shape[-2]), ("AI", AI, V.shape[-1])):
        need("block_apply", operand, side, Diag, Sym)
        if isinstance(side, Diag):
            need_shape("block_apply", operand, side, (*V.batch, d))
        elif len(side.shape) == len(V.shape):
            need_shape("block_apply", operand, side, (*V.batch, d, d))
        else:
            size = count_of(side.shape[-1])
            need_shape("block_apply", operand, side, (*V.batch, block_count(count_of(d), size), size, size))
    return Mat(V.shape, promote(V, GI, AI))


def _apply_samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(52)
    for groups, o, i, sizes in (((), 5, 4, (2, 2)), ((), 3, 7, (2, 3)), ((2,), 3, 5, (2, 4)), ((), 4, 2, (4, 1))):
        V = draw.normal(*groups, o, i)
        gi, ai = (draw.psd(s, *groups, block_count(d, s)) for d, s in zip((o, i), sizes, strict=True))
        yield V, gi, ai
        yield V, draw.psd(o, *groups), ai
        yield V, gi, draw.positive(*groups, i)


def _side_flops(V: Type, side: Type) -> float:
    return V.numel * (1.0 if isinstance(side, Diag) else 2.0 * count_of(side.shape[-1]))


block_apply = Op(
    "block_apply",
    "(Tensor V, Tensor GI, Tensor AI) -> Tensor",
    _block_apply,
    _infer_block_apply,
    _apply_samples,
    flops=lambda V, GI, AI: _side_flops(V, GI) + _side_flops(V, AI),
    traits=STACKABLE,
)


def dense_blocks(blocks: Tensor, d: int) -> Tensor:
    """Blocks (.., n, size, size) as the block-diagonal matrix (.., d, d) that they stand for."""
    n, size = blocks.shape[-3], blocks.shape[-1]
    full = blocks.new_zeros(*blocks.shape[:-3], n * size, n * size)
    for k in range(n):
        full[..., k * size : (k + 1) * size, k * size : (k + 1) * size] = blocks[..., k, :, :]
    return full[..., :d, :d]


def block_loss(factor: Tensor, size: int) -> Tensor:
    """What a factor (.., d, d) loses by being cut: 1 - sqrt(lmax(B B^T) / lmax(A A^T)), B its blocks of ``size``.

    0 for a factor that is block-diagonal already, near 1 for one whose largest eigenvector spreads over many blocks
    (Chen et al. 2021, block size choice: a matrix counts as well approximated below 0.01).
    """
    d = factor.shape[-1]
    place = torch.arange(d, device=factor.device) // size
    cut = torch.where(place[:, None] == place, factor, 0.0)
    largest = [torch.linalg.matrix_norm(x, 2) for x in (cut, factor)]
    return torch.where(largest[1] > 0, 1.0 - largest[0] / largest[1], torch.zeros_like(largest[0]))
