"""Patch Gram of a stride-1 convolution from correlations over the whole plane, with the edges taken off.

Sum over output positions q of x[q + k] x[q + l]: were q to run over all integers (pixels outside the image are 0), this
would depend on the taps k and l through l - k alone, (2K-1)/K^2 as many products in each axis, half of them by
symmetry. The positions that do not exist are few, and a tap reaches the image from them only near its edge: along an
axis with ``low`` zeros before the image, the ``reach - low`` positions before the first one see the last taps only.
They are a convolution of a slab of ``reach - low`` pixels in which that axis is short: its positions become examples
and its taps channels, and the same method takes the other axes, one less. So with axes a, b, ... in order

    Z x Z x ... - [outside a] x Z x ... - [inside a] x [outside b] x ... = [inside a] x [inside b] x ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcurv.kernels.aten.choice import edge_by_patches
from fxcurv.kernels.aten.columns import patches
from fxcurv.kernels.aten.geometry import Axis

Decide = Callable[[int, int, tuple[Axis, ...]], bool]
Correlate = Callable[[Tensor, tuple[Axis, ...]], Tensor]
"""(x of shape (n, C, *sizes), axes) -> the correlations at all differences of two taps, (offsets, C, C).

Entry [o, c, d] is the sum over examples and pixels u of x[c, u] x[d, u + dilation * o]; first come the ``half_offsets``
of the kernels, then their negatives without the zero, in the same order: the transposes.
"""


def half_offsets(kernels: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Differences of two taps from zero on, in lexicographic order; the others are their negatives."""
    everything = list(product(*(range(1 - kernel, kernel) for kernel in kernels)))
    return everything[len(everything) // 2 :]


@dataclass(frozen=True)
class _Edge:
    """What to take off: ``blocks`` (*kernels, *kernels, C, C) with only ``seen`` taps of ``axis`` from ``first`` on."""

    axis: int
    first: int
    seen: int
    blocks: Tensor


def plane_gram(x: Tensor, axes: tuple[Axis, ...], correlate: Correlate, by_patches: Decide = edge_by_patches) -> Tensor:
    """Gram of the patches of x (n, C, *sizes) as (C * taps, C * taps), channel-major; every stride is 1.

    by_patches: whether an edge of (n, C, axes) is left to its patches or seen as a plane again.
    """
    kernels, channels = tuple(axis.kernel for axis in axes), x.shape[1]
    places = _places(kernels, x.device)
    correlations, edges = correlate(x, axes), _edges(x, axes, correlate, by_patches)
    gram = x.new_empty(channels, len(places), channels, len(places))
    for i, taps in enumerate(product(*map(range, kernels))):  # a row of blocks at a time stays in the cache
        row = correlations.index_select(0, places[i])
        for edge in edges:
            tap = taps[edge.axis] - edge.first
            if 0 <= tap < edge.seen:
                part = edge.blocks[(*taps[: edge.axis], tap, *taps[edge.axis + 1 :])]
                row.view(*kernels, channels, channels).narrow(edge.axis, edge.first, edge.seen).sub_(part)
        gram[:, i] = row.permute(1, 2, 0)
    return gram.view(channels * len(places), channels * len(places))


def _blocks(x: Tensor, axes: tuple[Axis, ...], correlate: Correlate, by_patches: Decide) -> Tensor:
    """The Gram as (*kernels, *kernels, C, C): blocks of pairs of taps."""
    if not axes:
        return x.t() @ x
    kernels = tuple(axis.kernel for axis in axes)
    if by_patches(len(x), x.shape[1], axes):
        columns = patches(x, axes, taps_first=True).flatten(0, 1).flatten(1)
        gram = (columns @ columns.t()).view(*kernels, x.shape[1], *kernels, x.shape[1])
        return gram.movedim(len(axes), -2)
    blocks = correlate(x, axes).index_select(0, _places(kernels, x.device).view(-1))
    blocks = blocks.view(*kernels, *kernels, *blocks.shape[1:])
    for edge in _edges(x, axes, correlate, by_patches):
        inside = blocks.narrow(edge.axis, edge.first, edge.seen)
        inside.narrow(len(axes) + edge.axis, edge.first, edge.seen).sub_(edge.blocks)
    return blocks


def _edges(x: Tensor, axes: tuple[Axis, ...], correlate: Correlate, by_patches: Decide) -> list[_Edge]:
    """The edges of every axis, the earlier axes as they are and the later ones over all positions."""
    channels, found = x.shape[1], []
    for i, axis in enumerate(axes):
        others = axes[:i] + tuple(replace(other, low=other.reach, high=other.reach) for other in axes[i + 1 :])
        for first, seen, slab in _outside(x, 2 + i, axis):
            blocks = _blocks(slab, others, correlate, by_patches)
            blocks = blocks.unflatten(-2, (seen, channels)).unflatten(-1, (seen, channels))
            found.append(_Edge(i, first, seen, blocks.movedim((-4, -2), (i, len(axes) + i))))
    return found


@lru_cache(maxsize=256)
def _places(kernels: tuple[int, ...], device: torch.device) -> Tensor:
    """For every pair of taps (k, l) the place of l - k among the correlations, (taps, taps)."""
    taps, half = list(product(*map(range, kernels))), half_offsets(kernels)
    order = {offset: place for place, offset in enumerate(half)}
    order |= {tuple(-o for o in offset): len(half) - 1 + place for place, offset in enumerate(half) if place}
    rows = [[order[tuple(b - a for a, b in zip(k, l, strict=True))] for l in taps] for k in taps]  # noqa: E741
    return torch.tensor(rows, device=device)


def _outside(x: Tensor, dim: int, axis: Axis) -> list[tuple[int, int, Tensor]]:
    """(first tap, number of taps, slab) before and after the axis: what positions outside of it see of the image.

    In a slab (n positions, C taps, *other sizes) positions are examples and taps are channels.
    """
    found = []
    for after in (False, True):
        width = axis.reach - (axis.high if after else axis.low)  # positions that see something, and the pixels seen
        if width <= 0:
            continue
        taps = -(-width // axis.dilation)
        border = axis.dilation * (taps - 1)
        seen = min(width, axis.size)
        slab = x.narrow(dim, axis.size - seen if after else 0, seen)
        # Zeros where a tap reaches beyond the image again, on this side or, in a small image, on the other.
        pads = [0, 0] * (x.dim() - 1 - dim) + [width - seen, border][:: 1 if after else -1]
        slab = F.pad(slab, pads) if any(pads) else slab
        views = [slab.narrow(dim, axis.dilation * tap, width) for tap in range(taps)]
        stacked = torch.stack(views, 1) if taps > 1 else views[0].unsqueeze(1)
        stacked = stacked.movedim(dim + 1, 1).flatten(2, 3).flatten(0, 1)  # taps before channels
        found.append((0 if after else axis.kernel - taps, taps, stacked))
    return found
