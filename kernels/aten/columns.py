"""Patches of images as the columns of a matrix."""

from __future__ import annotations

import math
from itertools import product

import torch.nn.functional as F
from torch import Tensor

from fxcurv.kernels.aten.geometry import Axis


def patches(x: Tensor, axes: tuple[Axis, ...], taps_first: bool = False) -> Tensor:
    """Patches of x (n, C, *sizes) as columns, (C, taps, n, *outputs) or (taps, C, n, *outputs).

    A tap of all patches is one slice of the images.
    """
    pads = [side for axis in reversed(axes) for side in (axis.low, axis.high)]
    x = (F.pad(x, pads) if any(pads) else x).transpose(0, 1)
    counts = [axis.outputs for axis in axes]
    shape = [len(x), math.prod(axis.kernel for axis in axes)]
    columns = x.new_empty(*(shape[::-1] if taps_first else shape), x.shape[1], *counts)
    by_tap = columns if taps_first else columns.transpose(0, 1)
    for i, taps in enumerate(product(*(range(axis.kernel) for axis in axes))):
        starts = [tap * axis.dilation for tap, axis in zip(taps, axes, strict=True)]
        spans = [(count - 1) * axis.stride + 1 if count else 0 for count, axis in zip(counts, axes, strict=True)]
        steps = [axis.stride for axis in axes]
        at = [slice(start, start + span, step) for start, span, step in zip(starts, spans, steps, strict=True)]
        by_tap[i] = x[(slice(None), slice(None), *at)]
    return columns
