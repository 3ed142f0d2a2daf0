"""Grams of many layers in one launch: layers of equal width, each with its own number of rows, none of them copied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxcurv.kernels.triton.family import (
    DTYPES,
    Family,
    Geometry,
    Specialised,
    Traffic,
    Variant,
    interpreting,
    normal,
    precision,
    specialise,
)

MOST = 32
"""Layers of one launch: their addresses are arguments, so nothing is copied to the device first."""


def grouped_geometry(d: int, width: int, dtype: torch.dtype, layers: int, exact: bool | None = None) -> Geometry:
    """d: features of the results; width: of the rows in memory, d or d - 1 (a constant 1 follows); layers: in all."""
    chosen = precision(dtype) if exact is None else "ieee" if exact or dtype != torch.float32 else "tf32"
    return {
        "d": d,
        "width": width,
        "layers": min(layers, MOST),
        "dtype": DTYPES[dtype],
        "precision": chosen,
        "packed": False,
        "ema": "",
    }


def grouped_gram(d: int, width: int, dtype: torch.dtype, layers: int) -> Specialised:
    """The kernel for lists of rows (.., width) of so many layers: list of tensors -> (layers, d, d) float32."""
    return specialise(GROUPED, grouped_geometry(d, width, dtype, layers))


def together(kernel: object, rows: Sequence[Tensor], d: int) -> Tensor | None:
    """Grams of several layers in one launch, (layers, d, d); ``None`` where the kernel for one of them cannot run here.

    kernel: what runs for one layer alone. rows: of each layer, (.., d), or (.., d - 1) before a constant 1.
    """
    generated = isinstance(kernel, Specialised) and kernel.family == "gram"
    if not generated or rows[0].dtype not in DTYPES or not (rows[0].is_cuda or interpreting()):
        return None
    result: Tensor = grouped_gram(d, rows[0].shape[-1], rows[0].dtype, len(rows))(list(rows))
    return result


def _naive(rows: Sequence[Tensor]) -> Tensor:
    return torch.stack([x.double().flatten(0, -2).mT @ x.double().flatten(0, -2) for x in rows])


def _naive_constant(rows: Sequence[Tensor]) -> Tensor:
    return _naive([torch.cat([x.double(), torch.ones(*x.shape[:-1], 1, dtype=torch.float64)], dim=-1) for x in rows])


def _operands(counts: Sequence[int], width: int, dtype: torch.dtype, sliced: bool = False) -> tuple[list[Tensor]]:
    step = 2 if sliced else 1
    return ([normal(n, 3, 1, width * step, dtype=dtype, seed=k)[..., ::step] for k, n in enumerate(counts)],)


def variants() -> Iterator[Variant]:
    """One layer, several with unequal numbers of rows (none, one), more layers than one launch takes, every dtype."""
    for dtype, name in DTYPES.items():
        for counts, d in (((5,), 7), ((1, 0, 13, 6), 17), ((3, 2), 1)):
            geometry = grouped_geometry(d, d, dtype, len(counts), exact=True)
            label = f"{name}-{'_'.join(map(str, counts))}x{d}"
            yield Variant(label, geometry, partial(_operands, counts, d, dtype), quick=d == 17 and name == "fp32")
        geometry = grouped_geometry(19, 18, dtype, 2, exact=True)
        yield Variant(f"{name}-constant", geometry, partial(_operands, (9, 4), 18, dtype), naive=_naive_constant)
    geometry = grouped_geometry(5, 5, torch.float32, 3, exact=True)
    yield Variant("more-than-one-launch", geometry, partial(_operands, (4, 1, 7, 2, 3, 5, 6), 5, torch.float32))
    yield Variant("sliced", geometry, partial(_operands, (4, 1, 7), 5, torch.float32, True))
    for dtype, name in ((torch.float32, "tf32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        geometry = grouped_geometry(33, 33, dtype, MOST, exact=False)
        operands = partial(_operands, (64,) * MOST, 33, dtype)
        yield Variant(f"{name}-large", geometry, operands, dot=True, run=False, quick=name == "bf16")


def _cost(values: Geometry, rows: Sequence[Tensor]) -> Traffic:
    d, side = values["d"], -(-values["d"] // values["block"])
    counts = [x.numel() // values["width"] if values["width"] else 0 for x in rows]
    once = sum(counts) * values["width"] * rows[0].dtype.itemsize
    reread = once * side if side > 1 else 0
    return Traffic(once, 4 * len(rows) * d * d, sum(counts) * d * (d + 1), reread)


def _never(*types: Any) -> None:
    """Rows of several layers meet where statistics are put together, not in an op."""


GROUPED = Family(
    name="grouped_gram",
    op="",
    template="grouped_gram.py.jinja",
    label="d{d}_{dtype}",
    geometry=_never,
    naive=_naive,
    variants=variants,
    cost=_cost,
    doc="""Sums of r r^T of many layers in one launch. The rows of every layer are read where they lie: their addresses
and numbers are arguments of the kernel, so no table has to reach the device first. One program owns a tile of the lower
triangle of one layer.""",
    tuned="gram",
)
