"""Patches whose pixels do not depend on their neighbours: a convolution's input factor from channel moments alone.

With C channels and K kernel taps a patch has C K features, channel-major, and perhaps the constant. If pixels at
different places are uncorrelated, E[a a^T] = kron(Sigma, I_K) + m m^T, Sigma the centred covariance of the channels and
m their mean mu at every tap (and 1), so that its damped inverse needs one C x C inverse (Grosse & Martens 2016, "SUA").
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import Op, Trait
from fxcurv.ir.ops.apply import left
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.rules import (
    accumulator,
    align,
    count_of,
    grouped,
    need,
    need_rows,
    need_scalar,
    need_shape,
    promote,
    spread,
)
from fxcurv.ir.ops.statistics import ADDITIVE, ungroup, wide
from fxcurv.ir.types import Diag, Mat, Psd, Sym, Type, Vec

STACKABLE = frozenset({Trait.BATCHABLE})


def _channel_gram(rows: Tensor, taps: int) -> Tensor:
    """Sum over rows, mean over taps of p p^T with p = [x; 1], x the channels of a patch at one tap.

    Rows (b, s, G, C K) or (b, s, G, C K + 1) of ``taps`` = K -> Psd (C + 1, C + 1) or (G, C + 1, C + 1); the constant
    of the rows is not read. Padding counts as the zeros (or mirrored pixels) that the convolution reads.
    """
    channels = rows.shape[-1] // taps
    x = wide(rows[..., : channels * taps]).unflatten(-1, (channels, taps))
    x = x.permute(2, 0, 1, 4, 3).flatten(1, 3)  # (G, b s K, C)
    p = torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)
    return ungroup(p.mT @ p / taps)


def _infer_channel_gram(rows: Type, taps: int) -> Type:
    need_rows("channel_gram", ("rows", rows))
    channels, constant = divmod(count_of(rows.shape[3]), taps) if taps > 1 else (0, 0)
    if not channels or constant > 1:
        raise FxcurvError(f"op 'channel_gram' got rows of {rows.shape[3]} features, which are no {taps} taps.")
    return Psd(grouped(rows.shape[2], channels + 1, channels + 1), accumulator(rows.dtype))


def _gram_samples() -> Iterator[tuple[Tensor, int]]:
    draw = Draw(71)
    for shape, taps in (((3, 4, 1, 8), 4), ((2, 5, 1, 10), 3), ((2, 3, 2, 5), 2), ((4, 1, 1, 3), 3), ((0, 2, 1, 4), 2)):
        yield draw.normal(*shape), taps


channel_gram = Op(
    "channel_gram",
    "(Tensor rows, int taps) -> Tensor",
    _channel_gram,
    _infer_channel_gram,
    _gram_samples,
    flops=lambda rows, taps: 2.0 * rows.numel * (rows.shape[-1] // taps + 1),
    traits=ADDITIVE,
)


def _centred(M: Tensor) -> tuple[Tensor, Tensor]:
    """(Sigma, mu): covariance and mean of x from M = E[p p^T], p = [x; 1]; Psd (C + 1, C + 1) -> Psd (C, C), Vec (C,).

    Groups lead. Exactly symmetric; zeros where M is zero.
    """
    mean = M[..., :-1, -1]
    return M[..., :-1, :-1] - mean.unsqueeze(-1) * mean.unsqueeze(-2), mean.clone()


def _infer_centred(M: Type) -> tuple[Type, Type]:
    need("centred", "M", M, Psd)
    channels = count_of(M.shape[-1]) - 1
    return Psd((*M.batch, channels, channels), M.dtype), Vec((*M.batch, channels), M.dtype)


def _moments(*groups: int, channels: int, seed: int) -> Tensor:
    p = Draw(seed).normal(*groups, 3 * channels, channels + 1)
    p[..., -1] = 1.0
    return p.mT @ p / p.shape[-2]


centred = Op(
    "centred",
    "(Tensor M) -> (Tensor, Tensor)",
    _centred,
    _infer_centred,
    lambda: ((_moments(*groups, channels=c, seed=72),) for groups, c in (((), 3), ((2,), 2), ((), 1))),
    flops=lambda M: 2.0 * M.numel,
    traits=STACKABLE,
)


def _patch_diagonal(M: Tensor, taps: int, constants: int) -> Tensor:
    """The diagonal of E[a a^T]: E[x^2] of each channel ``taps`` times, and 1 for each of the 0 or 1 ``constants``.

    Psd (C + 1, C + 1) -> Diag (C K,) or (C K + 1,); groups lead.
    """
    squares = M.diagonal(dim1=-2, dim2=-1)
    each = squares[..., :-1].repeat_interleave(taps, -1)
    return torch.cat([each, squares[..., squares.shape[-1] - constants :]], -1)


def _infer_patch_diagonal(M: Type, taps: int, constants: int) -> Type:
    need("patch_diagonal", "M", M, Psd)
    return Diag((*M.batch, (count_of(M.shape[-1]) - 1) * taps + constants), M.dtype)


def _diagonal_samples() -> Iterator[tuple[Any, ...]]:
    yield _moments(channels=3, seed=75), 4, 1
    yield _moments(2, channels=2, seed=76), 3, 0


patch_diagonal = Op(
    "patch_diagonal",
    "(Tensor M, int taps, int constants) -> Tensor",
    _patch_diagonal,
    _infer_patch_diagonal,
    _diagonal_samples,
    traits=STACKABLE,
)


def _uncorrelated_apply(V: Tensor, GI: Tensor, SI: Tensor, mu: Tensor, damping: Tensor, taps: int) -> Tensor:
    """GI V (kron(Sigma, I_K) + m m^T + damping I)^-1 from SI = (Sigma + damping I)^-1, by Sherman-Morrison.

    B^-1 applies SI at each tap and 1/damping to the constant; then X - (X m) (B^-1 m)^T / (1 + m^T B^-1 m), X = V B^-1.
    V: Mat (o, C K), or (o, C K + 1) with the constant's column; GI: Psd (o, o) or Diag (o,); SI: Psd (C, C); mu: Vec
    (C,); groups lead; damping: number, Scalar or one a group.
    """
    out = align(V, GI, SI, mu)[0].dtype
    V, GI, SI, mu = (x.to(accumulator(out)) for x in (V, GI, SI, mu))
    channels = SI.shape[-1]
    patch = V[..., : channels * taps].unflatten(-1, (channels, taps))
    kept = torch.einsum("...ock,...cd->...odk", patch, SI)
    solved = torch.einsum("...c,...cd->...d", mu, SI)  # SI mu, the same at every tap
    along = torch.einsum("...odk,...d->...o", kept, mu)
    total = taps * (solved * mu).sum(-1)
    constant = V.shape[-1] > channels * taps
    rest: list[Tensor] = []
    if constant:
        strength = torch.as_tensor(damping, dtype=V.dtype, device=V.device)
        rest = [V[..., -1:] / spread(strength, V)]
        along, total = along + rest[0].squeeze(-1), total + 1.0 / strength
    weight = along / (1.0 + total).unsqueeze(-1)
    kept = kept - weight[..., None, None] * solved[..., None, :, None]
    if constant:
        rest = [rest[0] - (weight / spread(strength, weight)).unsqueeze(-1)]
    return left(GI, torch.cat([kept.flatten(-2), *rest], -1)).to(out)


def _infer_uncorrelated_apply(V: Type, GI: Type, SI: Type, mu: Type, damping: Any, taps: int) -> Type:
    op = "uncorrelated_apply"
    for operand, given, types in (("V", V, (Mat,)), ("GI", GI, (Sym, Diag)), ("SI", SI, (Sym,))):
        need(op, operand, given, *types)
    need_shape(op, "GI", GI, (*V.shape[:-1], V.shape[-2]) if isinstance(GI, Sym) else V.shape[:-1])
    need_shape(op, "mu", need(op, "mu", mu, Vec), SI.shape[:-1])
    need_scalar(op, "damping", damping, V.batch)
    if count_of(V.shape[-1]) - count_of(SI.shape[-1]) * taps not in (0, 1):
        raise FxcurvError(f"op '{op}' got V with {V.shape[-1]} columns, which are not {taps} taps of {SI.shape[-1]}.")
    return Mat(V.shape, promote(V, GI, SI, mu))


def _apply_samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(77)
    yield draw.normal(3, 9), draw.psd(3), draw.psd(2), draw.normal(2), draw.number(0.4), 4
    yield draw.normal(3, 8), draw.positive(3), draw.psd(2), draw.normal(2), draw.number(0.4), 4
    yield draw.normal(2, 3, 5), draw.psd(3, 2), draw.psd(1, 2), draw.normal(2, 1), draw.number(0.3, 2), 4
    yield draw.normal(2, 2, 4), draw.psd(2, 2), draw.psd(2, 2), draw.normal(2, 2), draw.number(0.3), 2


uncorrelated_apply = Op(
    "uncorrelated_apply",
    "(Tensor V, Tensor GI, Tensor SI, Tensor mu, Tensor damping, int taps) -> Tensor",
    _uncorrelated_apply,
    _infer_uncorrelated_apply,
    _apply_samples,
    flops=lambda V, GI, SI, mu, damping, taps: 2.0 * V.numel * (SI.shape[-1] + V.shape[-2]),
)
