"""Which form of a patch Gram is cheapest, from flops and numbers moved.

A form's cost is flops + ``MOVED`` for each number read from or written to memory beyond the cache + ``CALL`` for each
call of a tensor operation: the three things that take time on a CPU core, in units of one flop of a large product.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

from fxcurv.kernels.aten.geometry import Axis

MOVED = 16
"""Flops of a large product in the time in which one number is moved."""
CALL = 300_000
"""Flops of a large product in the time of a call."""


@lru_cache(maxsize=4096)
def cheapest(n: int, channels: int, axes: tuple[Axis, ...]) -> str:
    """The form for images (n, channels, *sizes): "positions", "patches", "shifts" or "spectrum"."""
    if all(axis == Axis(axis.size, 1, 1, 1, 0, 0) for axis in axes):
        return "positions"
    if any(axis.stride > 1 for axis in axes):
        return "patches"
    costs = {"patches": patches_cost(n, channels, axes)}
    costs[correlation(n, channels, axes)] = plane_cost(n, channels, axes)
    return min(costs, key=costs.__getitem__)


@lru_cache(maxsize=4096)
def correlation(n: int, channels: int, axes: tuple[Axis, ...]) -> str:
    """How the correlations over the plane are computed: "shifts" or "spectrum"."""
    few = shifts_cost(n, channels, axes) <= spectrum_cost(n, channels, axes)
    return "shifts" if few else "spectrum"


@lru_cache(maxsize=4096)
def edge_by_patches(n: int, channels: int, axes: tuple[Axis, ...]) -> bool:
    """Whether the Gram of an edge is cheaper by patches than as a plane."""
    return patches_cost(n, channels, axes) <= plane_cost(n, channels, axes)


def patches_cost(n: int, channels: int, axes: tuple[Axis, ...]) -> float:
    """Patches are written once and read once for the lower triangle of their product."""
    taps = math.prod(axis.kernel for axis in axes)
    d, rows = channels * taps, n * math.prod(axis.outputs for axis in axes)
    share = 1.0 if d < 256 else 0.5 + 64 / d
    return 2 * share * rows * d * d + MOVED * (2 * rows * d + d * d) + CALL * (taps + d // 128)


def plane_cost(n: int, channels: int, axes: tuple[Axis, ...]) -> float:
    """Correlations of the plane, the result written block by block and turned, and the edges: planes or patches."""
    if not axes:
        return 2 * n * channels**2 + CALL
    taps = math.prod(axis.kernel for axis in axes)
    total = min(shifts_cost(n, channels, axes), spectrum_cost(n, channels, axes))
    total += MOVED * 3 * (taps * channels) ** 2 + CALL * (3 * taps + 4)
    for i, axis in enumerate(axes):
        others = axes[:i] + tuple(replace(other, low=other.reach, high=other.reach) for other in axes[i + 1 :])
        for width in (axis.reach - axis.low, axis.reach - axis.high):
            if width > 0:
                seen = -(-width // axis.dilation)
                edge = n * width, channels * seen, others
                total += min(patches_cost(*edge), plane_cost(*edge)) + 8 * CALL
    return total


def shifts_cost(n: int, channels: int, axes: tuple[Axis, ...]) -> float:
    """One product of C x C over all pixels for each of half of the offsets."""
    pixels, offsets = n * math.prod(axis.size + axis.reach for axis in axes), _offsets(axes)
    moved = offsets * (2 * pixels * channels + channels**2)
    return 2 * offsets * pixels * channels**2 + MOVED * moved + CALL * (offsets + 3)


def spectrum_cost(n: int, channels: int, axes: tuple[Axis, ...]) -> float:
    """Transforms axis by axis, three real products of C x C x n for half of the frequencies, and the inverse."""
    images = n * channels
    total, pixels = 0.0, math.prod(axis.size for axis in axes)
    frequencies = 1.0
    for i, axis in enumerate(reversed(axes)):
        period = axis.size + axis.reach
        wide = period if i else period // 2 + 1
        pixels //= axis.size
        total += (8 if i else 4) * frequencies * wide * axis.size * images * pixels
        frequencies *= wide
        total += MOVED * 2 * frequencies * images * pixels
    total += 6 * frequencies * images * channels + 4 * _offsets(axes) * frequencies * channels**2
    return total + MOVED * frequencies * (2 * images + 2 * channels**2) + CALL * (8 + 4 * len(axes))


def _offsets(axes: tuple[Axis, ...]) -> int:
    return math.prod(2 * axis.kernel - 1 for axis in axes) // 2 + 1
