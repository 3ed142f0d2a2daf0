"""Gram of the patches of a convolution on the CPU: the input factor, by the cheapest of several exact forms.

- *positions*: a kernel of one tap reads pixels; what a stride skips is left out first.
- *patches*: for any geometry; patches of a few images at a time as columns, then the lower triangle of one product.
- *shifts* and *spectrum*: for stride 1; correlations of the whole plane less its edges (see ``plane``), as products of
  shifted views or one product a frequency. They need no patches, whose product is 45 blocks of C x C for a 3 x 3 kernel
  where 13 correlations do.

All are exact to rounding. ``cheapest`` chooses from flops and numbers moved.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcurv.kernels.aten import plane, shifts, spectrum
from fxcurv.kernels.aten.choice import cheapest, correlation
from fxcurv.kernels.aten.columns import patches
from fxcurv.kernels.aten.geometry import Axis, Convolution, axes_of
from fxcurv.kernels.aten.triangle import add_product

CACHED = 1 << 18
"""Numbers of patches that are made at a time."""
RESULTS = 1 << 20
"""Numbers of single images' Grams up to which a batched product is faster than laying images side by side."""


def conv_gram(x: Tensor, form: Convolution) -> Tensor:
    """Sum over examples and positions of p p^T for the patches p of x, the constant coordinate of a bias last.

    x: (b, C, *spatial) or (C, *spatial), any strides. Returns (d, d) or (groups, d, d) in x's accumulation type, equal
    to ``gram(form.rows_a(x))``.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = x.unsqueeze(0) if x.dim() == len(form.kernel) + 1 else x
    pads = [side for pair in reversed(form.pads) for side in pair]
    padded = form.mode != "zeros" and any(pads)
    x = F.pad(x, pads, mode=form.mode) if padded else x
    axes = axes_of(form, tuple(x.shape[2:]), padded)
    count = x.shape[0] * math.prod(axis.outputs for axis in axes)
    seen, left = skipped(x, axes)
    if not count or not seen.numel():
        gram = x.new_zeros((form.groups,) * (form.groups > 1) + (form.inputs, form.inputs))
    elif form.groups > 1:
        gram = patches_gram(seen, left, form.groups)
    else:
        name = cheapest(seen.shape[0], seen.shape[1], left) if x.device.type == "cpu" else "patches"
        gram = FORMS[name](seen, left)
    if form.scale != 1.0:
        gram = gram * form.scale**2
    return _bordered(gram, x, axes, form, count) if form.bias else gram


def skipped(x: Tensor, axes: tuple[Axis, ...]) -> tuple[Tensor, tuple[Axis, ...]]:
    """Along axes with one tap: only the pixels that are read, as an axis without stride and border."""
    left = []
    for dim, axis in enumerate(axes, 2):
        if axis.kernel == 1 and (axis.stride > 1 or axis.low or axis.high):
            first = -(-axis.low // axis.stride)  # first output inside the image
            last = min(axis.outputs, (axis.size - 1 + axis.low) // axis.stride + 1)
            start, length = first * axis.stride - axis.low, max(0, last - first)
            x = x.narrow(dim, min(start, axis.size), max(0, axis.size - start) if length else 0)
            x = x[(slice(None),) * dim + (slice(0, (length - 1) * axis.stride + 1 if length else 0, axis.stride),)]
            axis = Axis(length, 1, 1, 1, 0, 0)
        left.append(axis)
    return x, tuple(left)


def positions_gram(x: Tensor, axes: tuple[Axis, ...] = ()) -> Tensor:
    """Gram of the pixels of x (n, C, *sizes), summed over images and pixels; every kernel has one tap."""
    columns = x.flatten(2)
    n, channels, size = columns.shape
    if channels > size or channels * channels * n > RESULTS:
        return add_product(columns.transpose(0, 1).reshape(channels, n * size), None)
    return torch.bmm(columns, columns.mT).sum(0)


def patches_gram(x: Tensor, axes: tuple[Axis, ...], groups: int = 1) -> Tensor:
    """Gram of the patches of x (n, C, *sizes), (d, d) or (groups, d, d): a tap of all patches is one slice of x."""
    features = x.shape[1] // groups * math.prod(axis.kernel for axis in axes)
    each = max(1, features * groups * math.prod(axis.outputs for axis in axes))
    step = max(1, CACHED // each, -(-features * features * groups // each))
    total = None
    for part in x.split(step):
        columns = patches(part, axes)
        if groups == 1:
            total = add_product(columns.flatten(0, 1).flatten(1), total)
        else:
            grouped = columns.reshape(groups, features, -1)
            total = grouped @ grouped.mT if total is None else total.baddbmm_(grouped, grouped.mT)
    return x.new_zeros((groups, features, features) if groups > 1 else (features, features)) if total is None else total


def shifts_gram(x: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """Gram of the patches of x by products of shifted views; every stride is 1."""
    return plane.plane_gram(x, axes, shifts.correlate)


def spectrum_gram(x: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """Gram of the patches of x by its spectrum, every stride is 1; edges by what is cheapest for them."""

    def correlate(part: Tensor, left: tuple[Axis, ...]) -> Tensor:
        name = "spectrum" if len(left) == len(axes) else correlation(part.shape[0], part.shape[1], left)
        return CORRELATIONS[name](part, left)

    return plane.plane_gram(x, axes, correlate)


CORRELATIONS: dict[str, plane.Correlate] = {"shifts": shifts.correlate, "spectrum": spectrum.correlate}
FORMS: dict[str, Callable[[Tensor, tuple[Axis, ...]], Tensor]] = {
    "positions": positions_gram,
    "patches": patches_gram,
    "shifts": shifts_gram,
    "spectrum": spectrum_gram,
}


def _bordered(gram: Tensor, x: Tensor, axes: tuple[Axis, ...], form: Convolution, count: int) -> Tensor:
    """The Gram with a row and a column for the constant coordinate: sums of the patches, and their number."""
    sums = patches(x.sum(0, keepdim=True), axes).flatten(2).sum(2).view(*gram.shape[:-1]) * form.scale
    full = gram.new_empty(*gram.shape[:-2], form.d_in, form.d_in)
    full[..., :-1, :-1] = gram
    full[..., :-1, -1] = full[..., -1, :-1] = sums
    full[..., -1, -1] = count
    return full
