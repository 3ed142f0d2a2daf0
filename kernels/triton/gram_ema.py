"""A Gram and what becomes of it in one go: its average with an old matrix, or its lower triangle packed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxcurv.ir.op import OPS
from fxcurv.ir.types import Rows, Scalar
from fxcurv.kernels.triton import gram
from fxcurv.kernels.triton.family import DTYPES, Family, Geometry, Traffic, Variant, normal


def _geometry(ema: str, result: Any, old: Any, rows: Any, factor: Any, weight: Any) -> Geometry | None:
    """Rows that ``gram`` takes and a float32 average whose two numbers are the same for all groups."""
    numbers = [None if isinstance(x, Scalar) else float(x) for x in (factor, weight)]
    if not isinstance(rows, Rows) or old.dtype != torch.float32 or gram.geometry(result, rows) is None:
        return None
    if any(isinstance(x, Scalar) and x.shape for x in (factor, weight)):
        return None
    return gram.gram_geometry(rows.shape[3] or 0, rows.dtype, rows.shape[2] or 0, ema, *numbers)


def _naive(ema: str, old: Tensor, rows: Tensor, factor: Any, weight: Any) -> Tensor:
    flat = rows.double().flatten(0, 1)
    total = torch.einsum("ngi,ngj->gij", flat, flat).reshape(old.shape)
    fresh = total * float(factor) if ema == "scale" else total / max(float(factor), 1.0)
    return old.double() if float(weight) == 1.0 else float(weight) * old.double() + (1.0 - float(weight)) * fresh


def _operands(shape: tuple[int, ...], dtype: torch.dtype, factor: float, weight: float, tensors: bool) -> Any:
    d, groups = shape[3], shape[2]
    old = normal(*((groups,) if groups > 1 else ()), d, d, seed=1)
    rows = normal(*shape, dtype=dtype)
    if weight == 1.0:
        rows[:1] = float("inf")  # a broken statistic is not looked at
    numbers = tuple(torch.tensor(x) for x in (factor, weight)) if tensors else (factor, weight)
    return (old + old.mT, rows, *numbers)


def _variants(ema: str) -> Iterator[Variant]:
    cases = (
        ((5, 3, 1, 7), 15.0, 0.95),  # one slice
        ((67, 3, 1, 17), 201.0, 0.5),  # several
        ((11, 1, 2, 19), 0.5, 0.9),
        ((29, 5, 1, 13), 2.0, 1.0),
        ((0, 1, 1, 3), 0.0, 0.25),
    )
    for dtype, name in DTYPES.items():
        for shape, factor, weight in cases:
            for tensors in (True, False) if name == "fp32" else (True,):
                baked = (None, None) if tensors else (factor, weight)
                yield Variant(
                    f"{name}-{'x'.join(map(str, shape))}" + ("" if tensors else "-baked"),
                    gram.gram_geometry(shape[3], dtype, shape[2], ema, *baked, exact=True),
                    partial(_operands, shape, dtype, factor, weight, tensors),
                )
    for dtype, d in ((torch.float32, 256), (torch.bfloat16, 97), (torch.float16, 300)):
        yield Variant(
            f"large-{d}",
            gram.gram_geometry(d, dtype, 1, ema, exact=False),
            partial(_operands, (96, 128, 1, d), dtype, 1.0, 0.5, True),
            dot=True,
            run=False,
            quick=d == 97,
        )


def _cost(values: Geometry, old: Tensor, rows: Tensor, *scalars: Any) -> Traffic:
    n = rows.shape[0] * rows.shape[1]
    model = gram.traffic(values, n, rows.shape[3], rows.dtype.itemsize)
    numbers = sum(4 for name in ("factor", "weight") if values[name] is None) * gram.programs_of(values, n)
    return Traffic(model.read, model.written, model.flops, model.reread + numbers)


DOC = """Average of a symmetric matrix with a {what} of r r^T over rows. The Gram is never in memory: the program that
has added up a tile of the lower triangle reads the old tile, averages, and writes the new one and its mirror image. A
weight of 1 keeps the old matrix exactly, whatever the rows hold."""

for _op, _ema, _what in (("gram_ema_mean", "mean", "mean"), ("gram_ema_scaled", "scale", "scaled sum")):
    Family(
        name=_op,
        op=_op,
        template="gram.py.jinja",
        label="d{d}_{dtype}",
        geometry=partial(_geometry, _ema),
        naive=partial(_naive, _ema),
        variants=partial(_variants, _ema),
        cost=_cost,
        doc=DOC.format(what=_what),
        tuned="gram",
    )


def _naive_packed(rows: Tensor) -> Tensor:
    flat = rows.double().flatten(0, 1)
    full = torch.einsum("ngi,ngj->gij", flat, flat)
    return OPS["pack_triangle"].reference(full.squeeze(0))


def _packed_variants() -> Iterator[Variant]:
    for dtype, name in DTYPES.items():
        shapes: tuple[tuple[int, ...], ...] = ((5, 3, 1, 7), (67, 3, 1, 18), (11, 1, 2, 19))
        for shape in shapes:
            yield Variant(
                f"{name}-{'x'.join(map(str, shape))}",
                gram.gram_geometry(shape[3], dtype, shape[2], packed=True, exact=True),
                partial(_rows, shape, dtype),
                quick=name == "bf16" and shape[3] == 18,
            )


def _rows(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor]:
    return (normal(*shape, dtype=dtype),)


def _never(*types: Any) -> None:
    """Packed storage is the choice of whoever keeps a sum, not an op."""


PACKED = Family(
    name="gram_packed",
    op="",
    template="gram.py.jinja",
    label="d{d}_{dtype}",
    geometry=_never,
    naive=_naive_packed,
    variants=_packed_variants,
    cost=lambda values, rows: gram.traffic(values, rows.shape[0] * rows.shape[1], rows.shape[3], rows.dtype.itemsize),
    doc="Sums of r r^T over rows, the lower triangle alone, packed. As ``gram``, without the mirror image.",
    tuned="gram",
)
