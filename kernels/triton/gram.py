"""Gram matrices of rows: each entry of the lower triangle computed once, long sums in slices, always in one order."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxcurv.ir.types import Rows
from fxcurv.kernels.triton.family import DTYPES, Family, Geometry, Traffic, Variant, normal, precision


def gram_geometry(
    d: int,
    dtype: torch.dtype,
    groups: int = 1,
    ema: str = "",
    factor: float | None = None,
    weight: float | None = None,
    *,
    packed: bool = False,
    exact: bool | None = None,
) -> Geometry:
    """d: features of the result; rows have as many, or one less where the last is a constant 1 that is not in memory.

    packed: the lower triangle alone. ema: "mean" (factor: the count) or "scale" for an average with an old matrix; its
    numbers are read from memory where they are ``None``. exact: multiply float32 as such (``None``: as torch does).
    """
    chosen = precision(dtype) if exact is None else "ieee" if exact or dtype != torch.float32 else "tf32"
    return {
        "d": d,
        "groups": groups,
        "dtype": DTYPES[dtype],
        "precision": chosen,
        "packed": packed,
        "ema": ema,
        "factor": factor,
        "weight": weight,
    }


def geometry(result: Any, rows: Any) -> Geometry | None:
    """Rows of float32, bfloat16 or float16 with known groups and features."""
    groups, d = rows.shape[2:]
    if not isinstance(rows, Rows) or rows.dtype not in DTYPES or not groups or not d:
        return None
    return gram_geometry(d, rows.dtype, groups)


def _naive(rows: Tensor) -> Tensor:
    flat = rows.double().reshape(-1, *rows.shape[2:])
    result = torch.einsum("ngi,ngj->gij", flat, flat)
    return result[0] if len(result) == 1 else result


def _unwritten(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor]:
    return (torch.empty(shape, dtype=dtype),)


def _naive_constant(rows: Tensor) -> Tensor:
    return _naive(torch.cat([rows.double(), torch.ones(*rows.shape[:3], 1, dtype=torch.float64)], dim=-1))


def _rows(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "") -> tuple[Tensor]:
    b, s, g, d = shape
    if layout == "channels":  # positions last in memory, as a convolution leaves its output gradient
        return (normal(b, d * g, s, dtype=dtype).reshape(b, g, d, s).permute(0, 3, 1, 2),)
    if layout == "sliced":
        return (normal(b, s, g, 2 * d, dtype=dtype)[..., ::2],)
    return (normal(b, s, g, d, dtype=dtype),)


SHAPES = (
    (5, 1, 1, 3),
    (1, 1, 1, 1),
    (37, 1, 1, 16),
    (7, 13, 1, 17),
    (3, 67, 1, 31),
    (131, 1, 1, 37),
    (0, 3, 1, 5),
    (89, 7, 1, 5),
)
GROUPED = ((5, 7, 3, 2), (29, 5, 2, 19))


def variants() -> Iterator[Variant]:
    """Shapes with one and several tiles, one and several slices, every dtype, strided rows; large ones to compile."""
    for dtype, name in DTYPES.items():
        for b, s, g, d in SHAPES + GROUPED:
            label = f"{name}-{b}x{s}x{g}x{d}"
            yield Variant(label, gram_geometry(d, dtype, g, exact=True), partial(_rows, b, s, g, d, dtype=dtype))
        for d in (1, 17):
            operands = partial(_rows, 53, 3, 1, d - 1, dtype=dtype)
            yield Variant(f"{name}-constant-{d}", gram_geometry(d, dtype, exact=True), operands, naive=_naive_constant)
        if dtype == torch.float32:
            tf32 = gram_geometry(37, dtype, exact=False)
            yield Variant("tf32-131x1x1x37", tf32, partial(_rows, 131, 1, 1, 37), tolerance=1e-3)
        for layout in ("channels", "sliced"):
            operands = partial(_rows, 6, 11, 2, 17, dtype=dtype, layout=layout)
            yield Variant(f"{name}-{layout}", gram_geometry(17, dtype, 2, exact=True), operands)
    for dtype, exact in ((torch.float32, True), (torch.float32, False), (torch.bfloat16, True), (torch.float16, True)):
        for d in (12, 32, 64, 127, 577, 1024):
            geometry_ = gram_geometry(d, dtype, exact=exact)
            name = "tf32" if not exact else DTYPES[dtype]
            dot = dtype != torch.float32 or not exact
            quick = (name, d) in {("tf32", 577), ("bf16", 577), ("fp16", 64), ("fp32", 64)}
            make = partial(_unwritten, (64, 128, 1, d), dtype)
            yield Variant(f"{name}-large-{d}", geometry_, make, dot=dot, run=False, quick=quick)


def _cost(values: Geometry, rows: Tensor) -> Traffic:
    return traffic(values, rows.shape[0] * rows.shape[1], rows.shape[3], rows.dtype.itemsize)


def slices_of(values: Geometry, n: int) -> int:
    """Slices into which ``launch`` cuts n rows."""
    side = _steps(values["d"], values["block"])
    tiles = side * (side + 1) // 2
    slices = max(1, min(max(1, values["programs"] // (tiles * values["groups"])), n // values["slice_rows"]))
    chunk = _steps(_steps(n, slices), values["block_k"]) * values["block_k"]
    return max(1, _steps(n, max(1, chunk)))


def _steps(total: int, size: int) -> int:
    """How many pieces of a size cover a total."""
    return -(-total // size)


def programs_of(values: Geometry, n: int) -> int:
    """Programs that leave a tile: those of the last kernel that ``launch`` starts."""
    side = _steps(values["d"], values["block"])
    tiles = side * (side + 1) // 2 * values["groups"]
    return int(tiles * (values["block"] // values["strip"] if slices_of(values, n) > 1 else 1))


def traffic(values: Geometry, n: int, width: int, itemsize: int) -> Traffic:
    """Bytes and operations for n rows of width columns; tiles of a slice run together, the cache serves all but one."""
    d, groups = values["d"], values["groups"]
    side, triangle = _steps(d, values["block"]), groups * d * (d + 1) // 2
    slices = slices_of(values, n)
    once = n * groups * width * itemsize
    partials = 4 * slices * triangle if slices > 1 else 0
    out = 4 * (triangle if values["packed"] else groups * d * d)
    old = 4 * triangle if values["ema"] else 0
    return Traffic(
        read=once + old,
        written=partials + out,
        flops=n * groups * d * (d + 1),
        reread=(once * side if side > 1 else 0) + partials,
    )


GRAM = Family(
    name="gram",
    op="gram",
    template="gram.py.jinja",
    label="d{d}_{dtype}",
    geometry=geometry,
    naive=_naive,
    variants=variants,
    cost=_cost,
    doc="""Sums of r r^T over rows, the lower triangle once and mirrored. One program owns a tile of the triangle and a
slice of the rows; where slices are several, a second kernel adds them in order, so results do not change from run to
run. Rows are read where they lie, whatever their strides. Claims the gram of fp32, bf16 and fp16 rows, accumulated in
fp32; fp32 is multiplied as tf32 where torch.get_float32_matmul_precision() allows it.""",
)
