"""Correlations of images with themselves by the correlation theorem.

The correlation of two channels at an offset is the inverse Fourier transform of conj(X_c) X_d, and the sum over images
can be taken at each frequency: one product of C x C x n instead of one for each of (2K-1)^D / 2 offsets and for each
pixel. Transforms are exact matrix products with cosines and sines: images are small beside the cost of the Gram, sizes
need not be powers of two (an image of H pixels is transformed at H + reach frequencies, just enough for offsets not to
wrap around), and the result comes out in the layout of the products, (frequency, real or imaginary, n, C). Only half of
the frequencies of the last axis are needed, as images are real.

A few frequencies are taken at a time, so that their spectra stay in the cache and memory does not grow with C^2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fxcurv.kernels.aten.geometry import Axis
from fxcurv.kernels.aten.plane import half_offsets

CACHED = 1 << 19
"""Numbers that stay in the second-level cache."""


def correlate(x: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """See ``plane.Correlate``."""
    n, channels, *sizes = x.shape
    steps = tuple((axis.size, axis.size + axis.reach, axis.dilation, axis.kernel) for axis in axes)
    first, turns, cosines, sines = _tables(steps, x.dtype, x.device)
    frequencies = len(first) // 2
    each = cosines.shape[1] // frequencies
    # (frequencies of the last axis, real or imaginary, n * C * other sizes)
    spectrum = torch.mm(first, x.reshape(-1, sizes[-1]).t()).view(frequencies, 2, -1)
    even = odd = None
    chunk = max(1, CACHED // (2 * each * channels * (n + channels)))
    for start in range(0, frequencies, chunk):
        part = spectrum[start : start + chunk]
        for real, imaginary in turns:
            part = part.reshape(len(part), 2, -1, real.shape[1])
            new = torch.bmm(real.expand(len(part), -1, -1), part[:, 0].mT)
            new.baddbmm_(imaginary.expand(len(part), -1, -1), part[:, 1].mT)
            part = new.view(len(part) * len(real) // 2, 2, -1)
        rows = part.view(len(part), 2 * n, channels)
        parts = part.view(len(part), 2, n, channels)
        at = slice(start * each, start * each + len(part))
        even = _add_product(even, cosines[:, at], torch.bmm(rows.mT, rows))
        odd = _add_product(odd, sines[:, at], torch.bmm(parts[:, 0].mT, parts[:, 1]))
    assert even is not None and odd is not None
    even, odd = (half.view(-1, channels, channels) for half in (even, odd))
    last, odd = len(cosines) - 1, odd - odd.mT
    result = x.new_empty(2 * last + 1, channels, channels)
    torch.sub(even, odd, out=result[: last + 1])
    torch.add(even[1:], odd[1:], out=result[last + 1 :])
    return result


def _add_product(total: Tensor | None, weights: Tensor, products: Tensor) -> Tensor:
    """``total`` plus the weighted sums of products (frequencies, C, C), as (offsets, C^2)."""
    flat = products.flatten(1)
    return weights @ flat if total is None else total.addmm_(weights, flat)


@lru_cache(maxsize=256)
def _tables(
    steps: tuple[tuple[int, int, int, int], ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """Transforms of (size, period, dilation, kernel) for every axis, and the inverse at the offsets.

    Returns the transform of the last axis, rows (frequency, part); that of the other axes from the last but one to the
    first, what it makes of real and of imaginary parts; and the weights of real and imaginary parts of the products,
    (offsets, frequencies), frequencies in the order in which axes are transformed.
    """
    order = steps[::-1]
    transforms = []
    for i, (size, period, _, _) in enumerate(order):
        frequencies = _numbers(range(period if i else period // 2 + 1))
        angle = 2 * math.pi / period * torch.outer(frequencies, _numbers(range(size)))
        cosine, sine = angle.cos(), -angle.sin()
        transforms.append([torch.stack(parts, 1).flatten(0, 1) for parts in ((cosine, sine), (-sine, cosine))])
    counts = [len(real) // 2 for real, _ in transforms]
    period = order[0][1]
    twice = _numbers([2.0] * counts[0])  # a frequency and its negative
    twice[0] = 1.0
    if period % 2 == 0:
        twice[-1] = 1.0
    weights = twice.repeat_interleave(math.prod(counts[1:])) / math.prod(period for _, period, _, _ in steps)
    grid = _numbers(product(*map(range, counts)))
    scales = _numbers(dilation / period for _, period, dilation, _ in order)
    offsets = _numbers(half_offsets(tuple(kernel for *_, kernel in steps))).flip(1)
    angle = 2 * math.pi * (offsets * scales) @ grid.t()

    def ready(table: Tensor) -> Tensor:
        return table.to(device=device, dtype=dtype)

    turns = [(ready(real), ready(imaginary)) for real, imaginary in transforms[1:]]
    return ready(transforms[0][0]), turns, ready(angle.cos() * weights), ready(angle.sin() * weights)


def _numbers(values: Iterable[Any]) -> Tensor:
    """A table in double precision on the CPU, whatever the defaults are."""
    return torch.tensor(list(values), dtype=torch.float64, device="cpu")
