"""Gradients through the inverse of a rank-one term plus damping (Eva, Eva-f): one or two walks over the gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxcurv.ir.types import Mat, Scalar
from fxcurv.kernels.triton.family import DTYPES, Family, Geometry, Traffic, Variant, normal

WHOLE = 64
"""Sides of a matrix that one program holds, with both vectors."""
WIDE = 1024
"""Columns of rows that one program holds, with the input's vector alone."""
NUMBERS = 4096
"""Entries of a tile, or of the rows that one program holds."""
TOLERANCE = {"fp32": 2e-5, "bf16": 1e-2, "fp16": 2e-3}
"""Results are rounded to the gradient's own type."""


def _padded(size: int) -> int:
    return max(1, 1 << (size - 1).bit_length())


def rank1_geometry(form: str, o: int, i: int, dtype: torch.dtype, damping: float | None = None) -> Geometry:
    """form: "both" for Eva, "right" for Eva-f; damping: ``None`` where it is read from memory."""
    both = form == "both"
    whole = max(o, i) <= WHOLE if both else i <= WIDE
    block_i = _padded(i) if whole else 0
    columns = 0 if whole else min(256, _padded(i))
    rows = _padded(o) if both and whole else min(_padded(o), max(1, NUMBERS // (block_i or columns)))
    parts = -(-o // rows)
    return {
        "form": form,
        "o": o,
        "i": i,
        "dtype": DTYPES[dtype],
        "damping": damping,
        "whole": whole,
        "rows": rows,
        "columns": columns,
        "block_i": block_i,
        "parts": parts,
        "parts_block": _padded(parts),
        "num_warps": max(1, min(8, rows * (block_i or columns) // 512)),
    }


def claim(form: str) -> Callable[..., Geometry | None]:
    """The geometry rule: operands of one dtype and known sizes, one damping or one a matrix."""

    def geometry(result: Any, V: Any, *rest: Any) -> Geometry | None:
        *vectors, damping = rest
        known = isinstance(V, Mat) and V.dtype in DTYPES and None not in V.shape and 0 not in V.shape
        if not known or any(vector.dtype != V.dtype for vector in vectors):
            return None
        if isinstance(damping, Scalar) and damping.shape not in ((), V.batch):
            return None
        number = None if isinstance(damping, Scalar) else float(damping)
        return rank1_geometry(form, V.shape[-2], V.shape[-1], V.dtype, number)

    return geometry


def _naive_both(V: Tensor, a: Tensor, g: Tensor, damping: Tensor | float) -> Tensor:
    value, x, y = V.double(), a.double(), g.double()
    lam = torch.as_tensor(damping, dtype=torch.float64).reshape(-1, *(1,) * (V.ndim - 1))
    lam = lam[0] if V.ndim == 2 else lam
    along = torch.einsum("...o,...oi,...i->...", y, value, x)[..., None, None]
    norm = (x.square().sum(-1) * y.square().sum(-1))[..., None, None]
    return (value - along / (lam + norm) * torch.einsum("...o,...i->...oi", y, x)) / lam


def _naive_right(V: Tensor, a: Tensor, damping: Tensor | float) -> Tensor:
    value, x = V.double(), a.double()
    lam = torch.as_tensor(damping, dtype=torch.float64).reshape(-1, *(1,) * (V.ndim - 1))
    lam = lam[0] if V.ndim == 2 else lam
    along = torch.einsum("...oi,...i->...o", value, x)
    return (value - torch.einsum("...o,...i->...oi", along, x) / (lam + x.square().sum(-1)[..., None, None])) / lam


def _operands(
    form: str,
    o: int,
    i: int,
    batch: tuple[int, ...],
    dtype: torch.dtype,
    damping: float | None,
    transposed: bool = False,
) -> tuple[Any, ...]:
    V = normal(*batch, i, o, dtype=dtype).mT if transposed else normal(*batch, o, i, dtype=dtype)
    number: Any = torch.linspace(0.5, 0.9, batch[0]) if batch else torch.tensor(0.8)
    vectors = (normal(*batch, i, dtype=dtype, seed=1), normal(*batch, o, dtype=dtype, seed=2))
    return V, *vectors[: 1 + (form == "both")], number if damping is None else damping


SIZES = {
    "both": ((3, 5, ()), (1, 1, ()), (17, 64, (3,)), (61, 2, ()), (67, 31, ()), (3, 301, (2,)), (130, 70, ())),
    "right": ((3, 5, ()), (1, 1, ()), (37, 64, (3,)), (5, 1031, (2,)), (67, 31, ()), (9, 1100, ())),
}


def variants(form: str) -> Iterator[Variant]:
    """Whole matrices (or rows) and tiles, damping in memory and baked in, every dtype, strided gradients."""
    for dtype, kind in DTYPES.items():
        for o, i, batch in SIZES[form]:
            damping = 0.3 if o in (61, 67) else None
            yield Variant(
                f"{kind}-{o}x{i}-{len(batch)}",
                rank1_geometry(form, o, i, dtype, damping),
                partial(_operands, form, o, i, batch, dtype, damping),
                TOLERANCE[kind],
                compile=False,
            )
        for o, i, batch in ((64, 64, (60,)), (256, 256, ()), (1000, 785, ()), (512, 4608, ())):
            yield Variant(
                f"{kind}-large-{o}x{i}",
                rank1_geometry(form, o, i, dtype),
                partial(_operands, form, o, i, batch, dtype, None),
                run=False,
                quick=kind == "fp32" and o in (64, 512),
            )
    values = rank1_geometry(form, 70, 90, torch.float32)
    operands = partial(_operands, form, 70, 90, (2,), torch.float32, None, True)
    yield Variant("transposed", values, operands, compile=False)


def _cost(values: Geometry, V: Tensor, a: Tensor, *rest: Any) -> Traffic:
    """The second walk reads the gradient again, and vectors and sums as often as there are programs."""
    o, i, size = values["o"], values["i"], V.dtype.itemsize
    both, whole, parts = values["form"] == "both", values["whole"], values["parts"]
    batch = V.numel() // (o * i)
    tiles = 1 if whole else -(-i // values["columns"])
    numbers = 4 * batch if values["damping"] is None else 0
    once = batch * (o * i + i + (o if both else 0)) * size + numbers
    flops = (6.0 if both else 5.0) * V.numel()
    if whole:
        return Traffic(once, V.numel() * size, flops, (parts - 1) * (i * size * batch + numbers))
    sums = 12 * parts if both else 4 * (o + 1)
    read_sums = parts * tiles * (8 * parts + 4) if both else tiles * (4 * o + 4 * parts)
    vectors = (2 * parts - 1) * i + (tiles * o if both else 0)
    again = o * i * size + vectors * size + read_sums
    return Traffic(once, batch * (o * i * size + sums), flops, batch * again + numbers * (parts * tiles - 1))


DOCS = {
    "both": """Eva's rank-one inverse applied to gradients of fp32, bf16 or fp16, in fp32 inside. Up to 64 x 64 one
program takes a matrix, a stack of them is one launch. Beyond, a first kernel leaves sums of its rows and a second one
subtracts; it finds the gradient in the second-level cache where that is large enough.""",
    "right": """Eva-f's rank-one inverse from the right applied to gradients of fp32, bf16 or fp16, in fp32 inside. Up
to 1024 columns a program holds its rows and reads them once; beyond, a first kernel leaves their products with the
vector and a second one subtracts.""",
}


def _family(form: str, name: str, naive: Callable[..., Tensor]) -> Family:
    return Family(
        name=name,
        op=name,
        template="rank1_apply.py.jinja",
        label="{o}x{i}_{dtype}",
        geometry=claim(form),
        naive=naive,
        variants=partial(variants, form),
        cost=_cost,
        doc=DOCS[form],
    )


RANK1_APPLY = _family("both", "rank1_apply", _naive_both)
RANK1_RIGHT_APPLY = _family("right", "rank1_right_apply", _naive_right)
