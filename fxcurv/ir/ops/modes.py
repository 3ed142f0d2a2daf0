"""Means along the modes of a tensor, and the outer product of several vectors: rank-one curvature of a tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import Op, Trait
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.rules import accumulator, align, need, promote
from fxcurv.ir.types import Type, Vec


def _mode_mean(T: Tensor, mode: int) -> Tensor:
    """Mean over all axes but ``mode``, Vec (d,): row means of a matrix for mode 0, column means for mode 1 (Eva-s)."""
    return T.to(accumulator(T.dtype)).movedim(mode, 0).reshape(T.shape[mode], -1).mean(dim=1)


def _infer_mode_mean(T: Type, mode: int) -> Type:
    need("mode_mean", "T", T, Type)
    if not 0 <= mode < len(T.shape):
        raise FxcurvError(f"op 'mode_mean' got mode {mode} for {T}; modes go from 0 to {len(T.shape) - 1}.")
    return Vec((T.shape[mode],), accumulator(T.dtype))


def _outer_all(vs: Sequence[Tensor]) -> Tensor:
    """The outer product of vectors, flattened row-major to a Vec; the last runs fastest."""
    first, *rest = align(*vs)
    product = first.clone()
    for v in rest:
        product = torch.outer(product, v).reshape(-1)
    return product


def _infer_outer_all(vs: Sequence[Type]) -> Type:
    if not isinstance(vs, (list, tuple)) or not vs:
        raise FxcurvError(f"operand 'vs' of op 'outer_all' must be a list of at least one vector, got {vs}.")
    sizes = [need("outer_all", "vs", v, Vec).shape for v in vs]
    if any(len(size) != 1 for size in sizes):
        raise FxcurvError(f"op 'outer_all' takes vectors without groups, got {', '.join(map(str, vs))}.")
    return Vec((prod(size[0] or 1 for size in sizes),), promote(*vs))


def _tensors() -> Iterator[tuple[Tensor, int]]:
    draw = Draw(61)
    for shape in ((5,), (3, 4), (2, 3, 5), (3, 2, 1, 2)):
        for mode in range(len(shape)):
            yield draw.normal(*shape), mode


def _vectors() -> Iterator[tuple[list[Tensor]]]:
    draw = Draw(62)
    for sizes in ((5,), (3, 4), (2, 3, 5), (1, 1)):
        yield ([draw.normal(size) for size in sizes],)


mode_mean = Op(
    "mode_mean",
    "(Tensor T, int mode) -> Tensor",
    _mode_mean,
    _infer_mode_mean,
    _tensors,
    flops=lambda T, mode: T.numel,
    traits=frozenset({Trait.LINEAR}),
)
outer_all = Op(
    "outer_all",
    "(Tensor[] vs) -> Tensor",
    _outer_all,
    _infer_outer_all,
    _vectors,
    flops=lambda vs: prod(v.numel for v in vs),
)
