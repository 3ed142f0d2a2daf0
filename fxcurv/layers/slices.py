"""Steps that leave a part of a parameter: slices, chunks and splits before the product (fused weights).

Links as in :mod:`fxcurv.layers.chain`; those that return several tensors return a tuple of views.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxcurv.layers.chain import link
from fxcurv.layers.view import Refused, View

aten = torch.ops.aten


def _bound(value: Any, default: int, size: int) -> int:
    """One end of a slice as Python reads it."""
    if value is None:
        return default
    if not isinstance(value, int):
        raise Refused("is sliced to a size that the graph computes")
    return min(max(value + size if value < 0 else value, 0), size)


def _range(view: View, dim: int, start: Any, end: Any, step: Any = 1) -> View:
    if step not in (None, 1):
        raise Refused("is sliced with a step")
    if isinstance(end, fx.Node) and start in (None, 0):
        return view.first(dim)
    size = view.shape[dim]
    first = _bound(start, 0, size)
    return view.narrow(dim % view.ndim, first, _bound(end, size, size) - first)


@link(aten.slice.Tensor)
def _slice(view: View, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1) -> View:
    return _range(view, dim, start, end, step)


@link("narrow", torch.narrow, aten.narrow.default)
def _narrow(view: View, dim: int, start: Any, length: Any) -> View:
    if start == 0 and isinstance(length, fx.Node):
        return view.first(dim)
    if not isinstance(start, int) or not isinstance(length, int):
        raise Refused("is sliced to a size that the graph computes")
    return view.narrow(dim % view.ndim, start + view.shape[dim] if start < 0 else start, length)


@link("select", torch.select, aten.select.int)
def _select(view: View, dim: int, index: Any) -> View:
    if not isinstance(index, int):
        raise Refused("is indexed by what the graph computes")
    return view.select(dim, index)


@link("unbind", torch.unbind, aten.unbind.int)
def _unbind(view: View, dim: int = 0) -> tuple[View, ...]:
    return tuple(view.select(dim, k) for k in range(view.shape[dim]))


@link("split", torch.split, torch.functional.split, aten.split.Tensor, aten.split_with_sizes.default)
@link("split_with_sizes", torch.split_with_sizes)
def _split(view: View, split_size_or_sections: Any, dim: int = 0) -> tuple[View, ...]:
    size = view.shape[dim]
    sizes = split_size_or_sections
    if isinstance(sizes, int):
        sizes = [min(sizes, size - start) for start in range(0, size, sizes)]
    if not isinstance(sizes, (list, tuple)) or not all(isinstance(part, int) for part in sizes):
        raise Refused("is split into sizes that the graph computes")
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return tuple(view.narrow(dim % view.ndim, start, part) for start, part in zip(starts, sizes, strict=True))


@link("chunk", torch.chunk, aten.chunk.default)
def _chunk(view: View, chunks: int, dim: int = 0) -> tuple[View, ...]:
    return _split(view, -(-view.shape[dim] // chunks), dim)


@link("tensor_split", torch.tensor_split, aten.tensor_split.sections, aten.tensor_split.indices)
def _tensor_split(view: View, indices_or_sections: Any, dim: int = 0) -> tuple[View, ...]:
    size, cuts = view.shape[dim], indices_or_sections
    if isinstance(cuts, int):
        small, more = divmod(size, cuts)
        return _split(view, [small + 1] * more + [small] * (cuts - more), dim)
    ends = [_bound(cut, 0, size) for cut in cuts]
    return _split(view, [b - a for a, b in zip([0, *ends], [*ends, size], strict=True)], dim)


@link("__getitem__", operator.getitem)
def _item(view: View, index: Any) -> Any:
    items = list(index) if isinstance(index, tuple) else [index]
    if len(items) == 1 and isinstance(items[0], fx.Node) and "dtype" in items[0].meta:
        return NotImplemented  # a tensor of indices: see the lookups in fxcurv.layers.embedding
    if any(isinstance(item, (fx.Node, list, torch.Tensor)) for item in items):
        raise Refused("is indexed by what the graph computes")
    if Ellipsis in items:
        place = items.index(Ellipsis)
        free = view.ndim - sum(item is not None for item in items) + 1
        items[place : place + 1] = [slice(None)] * free
    axis = 0
    for item in items:
        if item is None:
            view = view.expand([1, *view.shape]).permute([*range(1, axis + 1), 0, *range(axis + 1, view.ndim + 1)])
        elif isinstance(item, slice):
            view = _range(view, axis, item.start, item.stop, item.step)
        elif isinstance(item, bool) or not isinstance(item, int):
            raise Refused("is indexed in a way that is not understood")
        else:
            view = view.select(axis, item)
            axis -= 1
        axis += 1
    return view
