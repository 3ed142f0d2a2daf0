"""Triangles: symmetric matrices to packed lower triangles and back, every number read and written once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxcurv.ir.ops.storage import size_of
from fxcurv.kernels.triton.family import DTYPES, Family, Geometry, Traffic, Variant, normal

SIZES = ((1, ()), (2, ()), (13, (3,)), (31, ()), (38, (2,)))


def place(i: Tensor, j: Tensor, d: int) -> Tensor:
    """Where rectangular full packed form keeps entry (i, j), j <= i, of a d x d matrix."""
    half, odd = (d + 1) // 2, d % 2
    below = (i + 1 - odd) * half + j  # the first half of the columns, the rest of the triangle turned above it
    return torch.where(j < half, below, (j - half) * half + odd + i - half)


def _naive_pack(full: Tensor) -> Tensor:
    d = full.shape[-1]
    i, j = torch.tril_indices(d, d)
    packed = full.new_zeros(*full.shape[:-2], d * (d + 1) // 2, dtype=torch.float64)
    packed[..., place(i, j, d)] = full.double()[..., i, j]
    return packed


def _naive_unpack(packed: Tensor) -> Tensor:
    d = size_of(packed.shape[-1])
    i, j = torch.tril_indices(d, d)
    lower = packed.new_zeros(*packed.shape[:-1], d, d, dtype=torch.float64)
    lower[..., i, j] = packed.double()[..., place(i, j, d)]
    return lower + lower.tril(-1).mT


def triangle_geometry(direction: str, d: int, dtype: torch.dtype) -> Geometry:
    """direction: "pack" or "unpack"; d: rows of a matrix; dtype: a key of DTYPES."""
    return {"direction": direction, "d": d, "dtype": DTYPES[dtype]}


def _geometry(direction: str, result: Any, operand: Any) -> Geometry | None:
    """Matrices of a known size in float32, bfloat16 or float16."""
    d = (operand if direction == "pack" else result).shape[-1]
    return triangle_geometry(direction, d, operand.dtype) if d and operand.dtype in DTYPES else None


def _matrices(d: int, batch: tuple[int, ...], dtype: torch.dtype, layout: str = "") -> tuple[Tensor]:
    full = normal(*batch, d, d, dtype=dtype)
    return (full.mT if layout == "transposed" else full,)


def _vectors(d: int, batch: tuple[int, ...], dtype: torch.dtype, layout: str = "") -> tuple[Tensor]:
    packed = normal(*batch, d * (d + 1), dtype=dtype)
    return (packed[..., ::2] if layout == "transposed" else packed[..., : d * (d + 1) // 2].contiguous(),)


def _variants(direction: str, make: Any) -> Iterator[Variant]:
    for dtype, name in DTYPES.items():
        for d, batch in SIZES:
            geometry, operands = triangle_geometry(direction, d, dtype), partial(make, d, batch, dtype)
            yield Variant(f"{name}-{d}-{len(batch)}", geometry, operands, 0.0, quick=d == 38)
    geometry = triangle_geometry(direction, 19, torch.float32)
    yield Variant("strided", geometry, partial(make, 19, (2,), torch.float32, "transposed"), 0.0)


def _cost(values: Geometry, operand: Tensor) -> Traffic:
    d, size, packing = values["d"], operand.dtype.itemsize, values["direction"] == "pack"
    triangle = d * (d + 1) // 2
    matrices = operand.numel() // (d * d if packing else triangle)
    whole = matrices * d * d * size
    return Traffic(matrices * triangle * size, matrices * triangle * size if packing else whole, 0.0)


PACK, UNPACK = (
    Family(
        name=f"triangle_{direction}",
        op=f"{direction}_triangle",
        template="triangle.py.jinja",
        label="d{d}_{dtype}",
        geometry=partial(_geometry, direction),
        naive=naive,
        variants=partial(_variants, direction, make),
        cost=_cost,
        doc=doc,
        tuned="triangle",
    )
    for direction, naive, make, doc in (
        (
            "pack",
            _naive_pack,
            _matrices,
            """Lower triangles of symmetric matrices in rectangular full packed form. One program moves a tile; the part
            that is kept turned is turned on the chip, so that reads and writes run along rows.""",
        ),
        (
            "unpack",
            _naive_unpack,
            _vectors,
            """Symmetric matrices from lower triangles in rectangular full packed form. One program reads a tile once
            and writes it and its mirror image, both along rows.""",
        ),
    )
)
