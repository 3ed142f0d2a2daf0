"""Gram matrix of the patches of a convolution by implicit im2col: the input factor without patches in memory.

A patch is never stored: each program owns a tile of the lower triangle of (d, d) and runs over a chunk of the output
positions; from a feature (channel and tap) and a position it works out which pixel to read, and a pixel outside the
image is 0. Neighbouring programs read the same pixels at about the same time, so most of these reads are answered by
the second-level cache and the image crosses the bus once. Only the lower triangle is computed; the mirror image is
written with it, so the result is exactly symmetric. With few tiles the positions are split among programs, whose
partial sums a second kernel adds in a fixed order: results do not depend on scheduling.

This is a reduction of a layer's input, not an op on rows, so it claims no node: ``conv_gram`` is called where a tap
reduces the input of a convolution (``fxcurv/layers/reductions.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcurv.kernels.triton.family import DTYPES, Family, Geometry, Traffic, Variant, normal, precision, specialise

if TYPE_CHECKING:
    from fxcurv.layers.conv import ConvForm


def geometry(form: ConvForm, dtype: torch.dtype, how: str | None = None) -> Geometry | None:
    """What is baked in for a convolution's form; ``None`` for a dtype without kernels.

    Borders that are not zeros are laid around the image beforehand, so here they are no padding. how: "tf32" or "ieee"
    for float32; without it as torch is set to multiply.
    """
    if dtype not in DTYPES:
        return None
    zeros = form.mode == "zeros"
    return {
        "kernel": form.kernel,
        "stride": form.stride,
        "dilation": form.dilation,
        "pads": form.pads if zeros else ((0, 0),) * len(form.kernel),
        "groups": form.groups,
        "inputs": form.inputs,
        "bias": form.bias,
        "scale": form.scale,
        "dtype": DTYPES[dtype],
        "precision": how or precision(dtype),  # of the products
    }


def conv_gram(x: Tensor, form: ConvForm) -> Tensor | None:
    """Sum over examples and positions of p p^T for the patches p of x, the constant coordinate of a bias last.

    x: (b, C, *spatial) or (C, *spatial) on a GPU, float32, bfloat16 or float16, any strides. Returns (d, d) or
    (groups, d, d) in float32, equal to ``gram(form.rows_a(x))``; ``None`` where no kernel applies: another dtype, or
    2^31 output positions and more. Of stride 1 and with enough channels, by shifts of the image (``conv_shifts.py``).
    """
    from fxcurv.kernels.triton import conv_shifts  # which builds on this module

    values = geometry(form, x.dtype)
    if values is None:
        return None
    x = form.batched(x)
    if form.mode != "zeros" and any(map(any, form.pads)):
        x = F.pad(x, borders(form.pads), mode=form.mode)
    if x.shape[0] * math.prod(outputs(values, x)) >= 1 << 31:
        return None
    shifted = conv_shifts.geometry(form, x.dtype)
    if shifted is not None and conv_shifts.worth(shifted, x):
        return specialise(conv_shifts.CONV_SHIFTS, shifted)(x)  # type: ignore[no-any-return]
    return specialise(CONV_GRAM, values)(x)  # type: ignore[no-any-return]


def borders(pads: tuple[tuple[int, int], ...]) -> list[int]:
    """Sizes before and after each axis in the order of ``F.pad``."""
    return [side for pair in reversed(pads) for side in pair]


def outputs(values: Geometry, x: Tensor) -> list[int]:
    """Output positions along each axis of (b, C, *spatial)."""
    return [
        max(0, (size + sum(pads) - dilation * (kernel - 1) - 1) // stride + 1)
        for size, pads, dilation, kernel, stride in zip(
            x.shape[2:], values["pads"], values["dilation"], values["kernel"], values["stride"], strict=True
        )
    ]


def naive(x: Tensor, form: ConvForm) -> Tensor:
    """The same in float64, for zeros as borders: a tap of all patches is a strided slice of the padded images."""
    counts = outputs({key: getattr(form, key) for key in ("pads", "dilation", "kernel", "stride")}, x)
    x = F.pad(x.double(), borders(form.pads)) * form.scale
    taps = []
    for tap in product(*map(range, form.kernel)):
        steps = zip(tap, form.dilation, form.stride, counts, strict=True)
        slices = [slice(t * d, t * d + (n - 1) * s + 1 if n else t * d, s) for t, d, s, n in steps]
        taps.append(x[(slice(None), slice(None), *slices)].flatten(2))
    patches = torch.stack(taps, dim=2).unflatten(1, (form.groups, -1)).flatten(2, 3)  # (b, groups, inputs, positions)
    if form.bias:
        patches = torch.cat([patches, torch.ones_like(patches[:, :, :1])], dim=2)
    gram = torch.einsum("bgip,bgjp->gij", patches, patches)
    return gram.squeeze(0) if form.groups == 1 else gram


def cost(values: Geometry, x: Tensor, form: ConvForm) -> Traffic:
    """Images and result once; partial sums once out and in; every other read of a pixel is answered by the cache.

    Counted under the masks: a feature is read for the positions at which its tap lies inside the image, by all tiles of
    its row and of its column, one more than there are rows of tiles; a lone tile reads it once.
    """
    d, block, groups = values["inputs"] + values["bias"], values["block"], values["groups"]
    counts = outputs(values, x)
    positions = x.shape[0] * math.prod(counts)
    inside = x.shape[0] * math.prod(
        sum(_inside(tap * dilation - pads[0], stride, size, count) for tap in range(kernel))
        for size, count, kernel, stride, dilation, pads in zip(
            x.shape[2:], counts, *(values[key] for key in ("kernel", "stride", "dilation", "pads")), strict=True
        )
    )
    rows = -(-d // block)
    asked = float(x.shape[1] * inside * (rows + 1 if rows > 1 else 1) * x.dtype.itemsize)
    read = min(float(x.numel() * x.dtype.itemsize), asked)
    result = 4.0 * groups * d * d
    splits = _splits(values, x, positions, rows * (rows + 1) // 2)
    parts = splits * 2.0 * groups * d * (d + 1) if splits > 1 else 0.0
    flops = float(positions) * groups * d * (d + 1)
    return Traffic(read + parts, result + parts, flops, asked - read)


def _inside(start: int, stride: int, size: int, count: int) -> int:
    """How many of start, start + stride, ... (count of them) are in range(size)."""
    return len([None for place in range(start, start + count * stride, stride) if 0 <= place < size])


def _splits(values: Geometry, x: Tensor, positions: int, tiles: int) -> int:
    """As ``launch`` divides the positions."""
    d, size = values["inputs"] + values["bias"], x.numel() * x.dtype.itemsize
    splits = min(values["programs"] // (tiles * values["groups"]), positions // values["least"])
    if positions * values["groups"] * d * d < values["balance"] * size:
        splits = min(splits, size // (40 * values["groups"] * d * (d + 1)))
    chunk = round_up(-(-positions // max(1, splits)), values["step"])
    return max(1, -(-positions // max(1, chunk)))


def round_up(size: int, step: int) -> int:
    """The next multiple of ``step``."""
    return -(-size // step) * step


def _never(*types: Any) -> None:
    """Not an op of programs."""


CASES: dict[str, dict[str, Any]] = {
    "3x3": {"size": (2, 5, 7, 6), "kernel": (3, 3), "pads": ((1, 1), (1, 1))},
    "no-pad": {"size": (3, 3, 8, 5), "kernel": (3, 2), "bias": False},
    "one": {"size": (1, 1, 1, 1), "kernel": (1, 1)},
    "1x1": {"size": (5, 17, 4, 4), "kernel": (1, 1)},
    "1x1-strided": {"size": (2, 19, 7, 5), "kernel": (1, 1), "stride": (2, 2), "bias": False},
    "strided": {"size": (3, 4, 9, 11), "kernel": (3, 3), "stride": (2, 3), "pads": ((1, 1), (0, 2))},
    "dilated": {"size": (2, 3, 11, 9), "kernel": (3, 3), "dilation": (2, 3), "pads": ((2, 2), (3, 1))},
    "grouped": {"size": (3, 6, 5, 5), "kernel": (3, 3), "pads": ((1, 1), (1, 1)), "groups": 3},
    "depthwise": {"size": (2, 7, 6, 5), "kernel": (2, 3), "pads": ((0, 1), (1, 1)), "groups": 7, "bias": False},
    "scaled": {"size": (2, 3, 5, 5), "kernel": (3, 3), "pads": ((1, 1), (1, 1)), "scale": 0.37},
    "beyond": {"size": (2, 3, 2, 3), "kernel": (5, 5), "pads": ((3, 3), (2, 4))},
    "1d": {"size": (3, 5, 37), "kernel": (5,), "stride": (2,), "pads": ((2, 1),), "dilation": (2,)},
    "3d": {"size": (2, 3, 4, 5, 3), "kernel": (2, 3, 2), "stride": (1, 2, 1), "pads": ((1, 0), (1, 1), (0, 1))},
    "empty": {"size": (0, 3, 5, 5), "kernel": (3, 3)},
    "channels-last": {"size": (3, 5, 6, 7), "kernel": (3, 3), "pads": ((1, 1), (1, 1)), "order": (0, 2, 3, 1)},
    "sliced": {"size": (3, 5, 13, 8), "kernel": (3, 3), "pads": ((1, 1), (1, 1)), "every": 2},
}
"""Convolutions to prove; what is left out is 1, without borders and with a bias."""
LARGE: dict[str, dict[str, Any]] = {
    "resnet": {"size": (16, 64, 32, 32), "kernel": (3, 3), "pads": ((1, 1), (1, 1)), "bias": False},
    "volume": {"size": (1, 32, 16, 16, 16), "kernel": (3, 3, 3), "pads": ((1, 1),) * 3},
    "points": {"size": (16, 256, 14, 14), "kernel": (1, 1)},
}
"""Convolutions to compile only."""


def make(size: tuple[int, ...], kernel: tuple[int, ...], **given: Any) -> ConvForm:
    """The form of a case; a convolution to two channels a group."""
    from fxcurv.layers.conv import ConvForm

    groups, bias = given.get("groups", 1), given.get("bias", True)
    inputs = size[1] // groups * math.prod(kernel)
    ones = (1,) * len(kernel)
    return ConvForm(
        groups=groups,
        d_out=2,
        d_in=inputs + bias,
        bias=bias,
        permutation=tuple(range(len(size))),
        weight_shape=(2 * groups, size[1] // groups, *kernel),
        scale=given.get("scale", 1.0),
        kernel=kernel,
        stride=given.get("stride", ones),
        dilation=given.get("dilation", ones),
        pads=given.get("pads", ((0, 0),) * len(kernel)),
    )


def images(case: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, ConvForm]:
    """Images and the form of a case."""
    x = normal(*case["size"], dtype=dtype)
    if "order" in case:
        x = x.permute(case["order"]).contiguous().permute([case["order"].index(k) for k in range(x.ndim)])
    return x[:, :, :: case.get("every", 1)], make(**case)


def kind(dtype: torch.dtype, how: str) -> str:
    """A short name of dtype and way to multiply."""
    return "tf32" if how == "tf32" else DTYPES[dtype]


def variants() -> Iterator[Variant]:
    """Every case runs in float32 and compiles in tf32; the half precisions on some; large ones compile only."""

    def one(name: str, case: dict[str, Any], dtype: torch.dtype, how: str, **more: Any) -> Variant:
        values = geometry(make(**case), dtype, how)
        assert values is not None
        operands = partial(images, case, dtype)
        label = kind(dtype, how)
        return Variant(f"{name}-{label}", values, operands, dot=label != "fp32", **more)

    for name, case in CASES.items():
        yield one(name, case, torch.float32, "ieee", compile=name == "3x3")
        if name not in ("empty", "one"):
            yield one(name, case, torch.float32, "tf32", tolerance=1e-3, run=name == "3x3", quick=name == "3x3")
    for dtype in (torch.bfloat16, torch.float16):
        for name in ("3x3", "1d", "grouped"):
            yield one(name, CASES[name], dtype, "ieee")
    for name, case in LARGE.items():
        for dtype, how in ((torch.float32, "tf32"), (torch.bfloat16, "ieee"), (torch.float16, "ieee")):
            yield one(name, case, dtype, how, run=False)


CONV_GRAM = Family(
    name="conv_gram",
    op="",
    template="conv_gram.py.jinja",
    label="{kernel}_{dtype}",
    geometry=_never,
    naive=naive,
    variants=variants,
    cost=cost,
    doc="Gram matrix of the patches of a convolution, without patches in memory. A program multiplies pixels that it "
    "finds by position and tap, for one tile of the lower triangle, and writes the tile and its mirror image.",
)
