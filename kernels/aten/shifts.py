"""Correlations of images with themselves as products of shifted views.

Images lie side by side, (C, n * sizes), each followed by as many zeros in every axis as two taps are apart. Then an
offset is a shift along the flat axis, whatever leaves an image meets zeros, and each product reads two views.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxcurv.kernels.aten.geometry import Axis
from fxcurv.kernels.aten.plane import half_offsets


def correlate(x: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """See ``plane.Correlate``."""
    n, channels, *sizes = x.shape
    wide = [axis.size + axis.reach for axis in axes]
    steps = [math.prod(wide[i + 1 :]) for i in range(len(wide))]
    offsets = half_offsets(tuple(axis.kernel for axis in axes))
    shifts = [sum(o * a.dilation * step for o, a, step in zip(at, axes, steps, strict=True)) for at in offsets]
    length = n * math.prod(wide)
    flat = x.new_zeros(channels, length + shifts[-1])
    inside = flat[:, :length].view(channels, n, *wide)
    for i, size in enumerate(sizes):
        inside = inside.narrow(2 + i, 0, size)
    inside.copy_(x.transpose(0, 1))
    last = len(shifts) - 1
    result = x.new_empty(2 * last + 1, channels, channels)
    for i, shift in enumerate(shifts):
        torch.mm(flat[:, :length], flat[:, shift : shift + length].t(), out=result[i])
    result[last + 1 :] = result[1 : last + 1].mT
    return result
