"""Between tensors and one flat vector, for methods and transfers that see all parameters at once."""

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
from fxcurv.ir.types import Type, Vec


def _pack(xs: Sequence[Tensor]) -> Tensor:
    """All elements of all tensors in order, Vec (total,), in the common dtype; each tensor is flattened row-major."""
    return torch.cat([x.reshape(-1) for x in align(*xs)])


def _infer_pack(xs: Sequence[Type]) -> Type:
    if not isinstance(xs, (list, tuple)) or not xs:
        raise FxcurvError(f"operand 'xs' of op 'pack' must be a list of at least one value, got {xs}.")
    sizes = [times(*need("pack", "xs", x, Type).shape) for x in xs]
    known = [size for size in sizes if size is not None]
    return Vec((sum(known) if len(known) == len(sizes) else None,), promote(*xs))


def _unpack(v: Tensor, offset: int, shape: Sequence[int]) -> Tensor:
    """The tensor of ``shape`` that starts at element ``offset`` of a packed vector: the inverse of ``pack``."""
    return v[offset : offset + prod(shape)].reshape(tuple(shape)).clone()


def _infer_unpack(v: Type, offset: int, shape: Sequence[int]) -> Type:
    need("unpack", "v", v, Vec)
    end = offset + prod(shape)
    if offset < 0 or (v.shape[0] is not None and end > v.shape[0]):
        raise FxcurvError(f"op 'unpack' wants elements {offset} to {end} of {v}; they are not all there.")
    return types.Tensor(tuple(shape), v.dtype)


def _pack_samples() -> Iterator[tuple[list[Tensor]]]:
    draw = Draw(23)
    yield ([draw.normal(3, 4), draw.normal(5), draw.normal(), draw.normal(0, 2)],)
    yield ([draw.normal(4, 3).mT],)
    yield ([draw.normal(7)],)


def _unpack_samples() -> Iterator[tuple[Any, ...]]:
    v = Draw(24).normal(23)
    yield v, 0, [3, 4]
    yield v, 12, [11]
    yield v, 22, []
    yield v, 5, [1, 2, 3]


pack = Op("pack", "(Tensor[] xs) -> Tensor", _pack, _infer_pack, _pack_samples)
unpack = Op(
    "unpack",
    "(Tensor v, int offset, int[] shape) -> Tensor",
    _unpack,
    _infer_unpack,
    _unpack_samples,
    traits=frozenset({Trait.LINEAR}),
)
