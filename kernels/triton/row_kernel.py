"""The kernel matrix of per-example gradients: both Gram matrices of the rows live in registers only."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxcurv.ir.types import Rows
from fxcurv.kernels.triton.family import DTYPES, Family, Geometry, Traffic, Variant, normal, precision


def row_kernel_geometry(i: int, o: int, dtype: torch.dtype, groups: int = 1, how: str | None = None) -> Geometry:
    """i, o: features of the two sides; how: "tf32" or "ieee" for float32, as torch multiplies where ``None``."""
    return {"i": i, "o": o, "groups": groups, "dtype": DTYPES[dtype], "precision": how or precision(dtype)}


def geometry(result: Any, a: Any, g: Any) -> Geometry | None:
    """Rows of one dtype with known groups and features."""
    groups, i = a.shape[2:]
    if not isinstance(a, Rows) or a.dtype != g.dtype or a.dtype not in DTYPES or not all((groups, i, g.shape[3])):
        return None
    return row_kernel_geometry(i, g.shape[3], a.dtype, groups)


def _naive(a: Tensor, g: Tensor) -> Tensor:
    gradients = torch.einsum("bsgo,bsgi->bgoi", g.double(), a.double()).flatten(2)
    result = torch.einsum("mgk,ngk->gmn", gradients, gradients)
    return result[0] if len(result) == 1 else result


def _operands(
    b: int, s: int, groups: int, i: int, o: int, dtype: torch.dtype, layout: str = ""
) -> tuple[Tensor, Tensor]:
    a, g = normal(b, s, groups, i, dtype=dtype), normal(b, s, groups, o, dtype=dtype, seed=1)
    if layout == "channels":  # positions last in memory, as a convolution leaves its output gradient
        g = normal(b, groups * o, s, dtype=dtype, seed=1).reshape(b, groups, o, s).permute(0, 3, 1, 2)
    return a, g


SHAPES = ((5, 1, 1, 3, 2), (1, 1, 1, 1, 1), (37, 1, 1, 17, 5), (19, 3, 1, 7, 21), (3, 5, 2, 2, 3), (16, 1, 3, 16, 1))
TOLERANCE = {"fp32": 2e-5, "tf32": 4e-3, "bf16": 2e-5, "fp16": 2e-5}
"""Half-precision rows are multiplied exactly and added in float32."""


def variants() -> Iterator[Variant]:
    """One and several tiles and positions, every dtype, strided rows; large ones to compile."""
    for dtype, how in (*((dtype, "ieee") for dtype in DTYPES), (torch.float32, "tf32")):
        kind = "tf32" if how == "tf32" else DTYPES[dtype]
        for b, s, groups, i, o in SHAPES:
            yield Variant(
                f"{kind}-{b}x{s}x{groups}-{i}-{o}",
                row_kernel_geometry(i, o, dtype, groups, how),
                partial(_operands, b, s, groups, i, o, dtype),
                TOLERANCE[kind],
                compile=False,
            )
        for b, i, o in ((256, 256, 64), (100, 1000, 1000)):
            yield Variant(
                f"{kind}-large-{b}-{i}-{o}",
                row_kernel_geometry(i, o, dtype, 1, how),
                partial(_operands, b, 1, 1, i, o, dtype),
                dot=kind != "fp32",
                run=False,
                quick=b == 256 and kind in ("fp32", "tf32"),
            )
    operands = partial(_operands, 7, 4, 2, 5, 3, torch.float32, "channels")
    yield Variant("channels", row_kernel_geometry(5, 3, torch.float32, 2, "ieee"), operands)


def _cost(values: Geometry, a: Tensor, g: Tensor) -> Traffic:
    """Each side of a tile reads its rows once for every position of the other; a block is in tiles + 1 sides."""
    b, s = a.shape[:2]
    tiles = -(-b // values["block"])
    once = sum(x.numel() * x.dtype.itemsize for x in (a, g))
    flops = 2.0 * values["groups"] * (b * s) * (b * s + 1) / 2 * (values["i"] + values["o"] + 1)
    return Traffic(once, 4 * values["groups"] * b * b, flops, once * (s * (tiles + 1) - 1))


ROW_KERNEL = Family(
    name="row_kernel",
    op="row_kernel",
    template="row_kernel.py.jinja",
    label="i{i}_o{o}_{dtype}",
    geometry=geometry,
    naive=_naive,
    variants=variants,
    cost=_cost,
    doc="""Inner products of per-example gradients from rows, the lower triangle once and mirrored. One program owns a
tile of examples; for every pair of positions it forms both inner products in registers, multiplies them and adds, so
neither Gram matrix nor any gradient is ever in memory. Work grows with the square of the positions: for long sequences
and narrow layers forming the gradients is cheaper. Claims fp32, bf16 and fp16 rows, added in fp32.""",
)
