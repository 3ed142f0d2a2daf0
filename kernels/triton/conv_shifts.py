"""Gram matrix of the patches of a convolution of stride 1 from shifted products of the image: autocorrelation.

The block of taps (k, l) is the sum over output positions p of x[:, p + k] x[:, p + l]^T. With q = p + k it is a sum
over pixels q of x[:, q] x[:, q + (l - k)]^T: it depends on the taps through their difference alone, up to which pixels
q the tap k sees. A 3 x 3 kernel has 13 differences (half of 25, by symmetry) where the triangle of patches has 45
blocks: a third of the products remains.

Which pixels a tap sees is handled by parts in place of corrections. Along each axis the places at which the taps begin
and end to see divide the image into an inner part, seen by all, and a few lines before and behind. Every (shift, part)
is one product of C x C; a second kernel adds for each pair of taps the parts that the first one sees. The parts are
disjoint, so no pixel is multiplied twice and nothing is subtracted.

It is worth it when C fills a tile and there are many pixels: ``worth`` compares what both ways multiply and write.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxcurv.kernels.triton import conv_gram
from fxcurv.kernels.triton.conv_gram import CASES, make, naive
from fxcurv.kernels.triton.family import DTYPES, Family, Geometry, Traffic, Variant

if TYPE_CHECKING:
    from fxcurv.layers.conv import ConvForm

BALANCE = 100
"""Operations that a GPU does in the time of a byte."""


def geometry(form: ConvForm, dtype: torch.dtype, how: str | None = None) -> Geometry | None:
    """What is baked in; ``None`` for strides, borders that are not zeros or crop, and other dtypes.

    before, after: parts of each axis before and behind the inner one. early: the last tap that sees the first pixel;
    late: from the other end, the last that sees the last one.
    """
    values = conv_gram.geometry(form, dtype, how)
    if values is None or form.mode != "zeros" or any(s > 1 for s in form.stride) or min(map(min, form.pads)) < 0:
        return None
    axes = list(zip(form.kernel, form.dilation, form.pads, strict=True))
    early = tuple(min(k - 1, pads[0] // d) for k, d, pads in axes)
    late = tuple(min(k - 1, pads[1] // d) for k, d, pads in axes)
    return {
        **{key: values[key] for key in ("kernel", "dilation", "pads", "groups", "bias", "scale", "dtype", "precision")},
        "channels": form.inputs // math.prod(form.kernel),
        "early": early,
        "late": late,
        "before": tuple(k - 1 - e for k, e in zip(form.kernel, early, strict=True)),
        "after": tuple(k - 1 - e for k, e in zip(form.kernel, late, strict=True)),
    }


def fits(values: Geometry, x: Tensor) -> bool:
    """Whether the image has an inner part that all taps see."""
    sizes = zip(
        x.shape[2:], *(values[key] for key in ("before", "early", "after", "late", "dilation", "pads")), strict=True
    )
    return all(
        size > max(0, (before + early) * dilation - pads[0]) + max(0, (after + late) * dilation - pads[1])
        for size, before, early, after, late, dilation, pads in sizes
    )


def shifts(values: Geometry) -> int:
    """Differences of taps, of a difference and its opposite one."""
    return (math.prod(2 * k - 1 for k in values["kernel"]) + 1) // 2


def parts(values: Geometry) -> int:
    """Parts of the image."""
    return math.prod(before + 1 + after for before, after in zip(values["before"], values["after"], strict=True))


def worth(values: Geometry, x: Tensor) -> bool:
    """Whether shifts take less time than patches: what is multiplied in tiles, against products written and added."""

    def tile(size: int) -> int:
        return min(64, max(16, 1 << (size - 1).bit_length()))

    channels, taps, pixels = values["channels"], math.prod(values["kernel"]), x.shape[0] * math.prod(x.shape[2:])
    d, block, own = channels * taps + values["bias"], tile(channels * taps), tile(channels)
    rows = -(-d // block)
    by_patches = rows * (rows + 1) * block**2 * pixels
    by_shifts = 2 * shifts(values) * (-(-channels // own) * own) ** 2 * pixels
    moved = 8 * shifts(values) * (parts(values) + 8) * channels**2
    return fits(values, x) and by_patches > by_shifts + BALANCE * moved


def _splits(values: Geometry, x: Tensor) -> int:
    """As ``launch`` divides the inner part."""
    side = -(-values["channels"] // values["block"])
    sizes = zip(x.shape[2:], values["kernel"], values["dilation"], values["pads"], strict=True)
    positions = x.shape[0] * math.prod(size + sum(pads) - d * (k - 1) for size, k, d, pads in sizes)
    programs = shifts(values) * side * side * values["groups"]
    return max(1, min(values["programs"] // programs, positions // values["least"]))


def cost(values: Geometry, x: Tensor, form: ConvForm) -> Traffic:
    """Images and result once; products and sums of the parts once out, and in once.

    Every shift asks for all pixels and for those they meet, every tile of channels again; products are asked for by all
    pairs of taps of that shift that see their part. Both find them in the cache.
    """
    batch, kernel, dilation = x.shape[0], values["kernel"], values["dilation"]
    channels, groups, bias, size = values["channels"], values["groups"], values["bias"], x.dtype.itemsize
    side, half, slots = -(-channels // values["block"]), shifts(values), _splits(values, x) + parts(values) - 1
    met = math.prod(
        sum(max(0, n - abs(turn) * d) for turn in range(1 - k, k))
        for n, k, d in zip(x.shape[2:], kernel, dilation, strict=True)
    )
    pixels = math.prod(x.shape[2:])
    asked = float(size * groups * channels * side * batch * (half * pixels + (met + pixels) // 2))
    once = float(x.numel() * size)
    stored = 4.0 * groups * slots * (half * channels**2 + (channels if bias else 0))
    added, rows = 0, 0
    for (t, tap), (o, _) in product(enumerate(product(*map(range, kernel))), repeat=2):
        if t <= o:
            seen = (
                _splits(values, x)
                - 1
                + math.prod(
                    before + after + 1 - max(0, k - early) - max(0, n - 1 - late - k)
                    for n, k, before, after, early, late in zip(
                        kernel, tap, *(values[key] for key in ("before", "after", "early", "late")), strict=True
                    )
                )
            )
            added += seen * (channels**2 if t < o else channels * (channels + 1) // 2)
            rows += seen * channels * int(t == o and bias)
    added_bytes = 4.0 * groups * (added + rows)
    d = channels * math.prod(kernel) + bias
    flops = 2.0 * batch * pixels * half * groups * channels**2
    read = once + min(stored, added_bytes)
    return Traffic(read, stored + 4.0 * groups * d * d, flops, asked + added_bytes - read)


def _never(*types: Any) -> None:
    """Not an op of programs."""


SHAPES: dict[str, dict[str, Any]] = {
    **{name: CASES[name] for name in ("3x3", "no-pad", "one")},
    "grouped": {"size": (3, 4, 4, 5), "kernel": (1, 3), "pads": ((0, 0), (1, 1)), "groups": 2},
    "scaled": {"size": (2, 3, 5, 4), "kernel": (2, 2), "pads": ((1, 1), (0, 1)), "scale": 0.37},
    "dilated": {"size": (2, 3, 9, 7), "kernel": (2, 2), "dilation": (2, 3), "pads": ((1, 2), (3, 1))},
    "channels-last": {"size": (3, 5, 6, 7), "kernel": (1, 3), "pads": ((0, 0), (1, 1)), "order": (0, 2, 3, 1)},
    "even": {"size": (3, 4, 6, 7), "kernel": (2, 3), "pads": ((1, 0), (0, 2))},
    "much-padded": {"size": (2, 3, 4, 3), "kernel": (3, 2), "pads": ((4, 3), (1, 2))},
    "3d": {"size": (2, 2, 4, 5, 3), "kernel": (2, 1, 2), "pads": ((1, 1), (0, 1), (0, 1)), "bias": False},
    "1d": {"size": (3, 17, 23), "kernel": (5,), "pads": ((2, 2),)},
}
"""Convolutions of stride 1 to prove."""
LARGE: dict[str, dict[str, Any]] = {
    "resnet": {"size": (16, 64, 32, 32), "kernel": (3, 3), "pads": ((1, 1), (1, 1)), "bias": False},
    "wide": {"size": (64, 256, 8, 8), "kernel": (3, 3), "pads": ((1, 1), (1, 1))},
    "narrow": {"size": (64, 16, 32, 32), "kernel": (3, 3), "pads": ((1, 1), (1, 1))},
    "volume": {"size": (2, 32, 16, 16, 16), "kernel": (3, 3, 3), "pads": ((1, 1),) * 3},
    "sequence": {"size": (16, 64, 512), "kernel": (5,), "dilation": (2,), "pads": ((4, 4),), "bias": False},
}
"""Convolutions to compile only, of sizes for which shifts are chosen."""


def variants() -> Iterator[Variant]:
    """Every case runs in float32; tf32 and the half precisions on some; large ones compile only."""

    def one(name: str, case: dict[str, Any], dtype: torch.dtype, how: str, **more: Any) -> Variant | None:
        values, operands = geometry(make(**case), dtype, how), partial(conv_gram.images, case, dtype)
        if values is None or not case["size"][0] or not fits(values, operands()[0]):
            return None
        kind = conv_gram.kind(dtype, how)
        return Variant(f"{name}-{kind}", values, operands, dot=kind != "fp32", **more)

    small: dict[str, Any] = {"compile": False}
    found = [one(name, case, torch.float32, "ieee", **small) for name, case in SHAPES.items()]
    found += [one(name, SHAPES[name], torch.float32, "tf32", tolerance=1e-3, **small) for name in ("3x3", "3d")]
    found += [one("even", SHAPES["even"], dtype, "ieee", **small) for dtype in (torch.bfloat16, torch.float16)]
    for name, case in LARGE.items():
        found.append(one(name, case, torch.float32, "tf32", run=False, quick=name == "resnet"))
        found += [one(name, case, dtype, "ieee", run=False) for dtype in DTYPES if name == "resnet"]
    yield from filter(None, found)


CONV_SHIFTS = Family(
    name="conv_shifts",
    op="",
    template="conv_shifts.py.jinja",
    label="{kernel}_{channels}_{dtype}",
    geometry=_never,
    naive=naive,
    variants=variants,
    cost=cost,
    doc="Gram matrix of the patches of a convolution of stride 1, from products of the image with itself, shifted. "
    "Taps that differ by the same shift share a product of channels; parts along the border are kept apart.",
)
