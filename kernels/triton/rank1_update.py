"""Inverses that a rank-one term updates, without any matrix product: two walks over the matrix, or one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxcurv.ir.types import Psd, Scalar
from fxcurv.kernels.triton.family import DTYPES, Family, Geometry, Traffic, Variant, normal

WHOLE = 64
"""Rows of a matrix that one program holds."""
TOLERANCE = {"fp32": 2e-5, "bf16": 1e-2, "fp16": 2e-3}
"""Results are rounded to the matrix's own type."""


def rank1_geometry(d: int, dtype: torch.dtype, printed: bool = False, gamma: float | None = None) -> Geometry:
    """gamma: ``None`` where it is read from memory; printed: see the op."""
    return {"d": d, "dtype": DTYPES[dtype], "printed": printed, "gamma": gamma}


def geometry(result: Any, AI: Any, v: Any, gamma: Any, printed: bool = False) -> Geometry | None:
    """Matrices and vectors of one dtype and known sizes; one gamma, or one a matrix."""
    known = isinstance(AI, Psd) and AI.dtype in DTYPES and v.dtype == AI.dtype and None not in AI.shape
    if not known or (isinstance(gamma, Scalar) and gamma.shape not in ((), AI.batch)):
        return None
    return rank1_geometry(AI.shape[-1], AI.dtype, printed, None if isinstance(gamma, Scalar) else float(gamma))


def _naive(AI: Tensor, v: Tensor, gamma: Tensor | float, printed: bool = False) -> Tensor:
    inverse, vector = AI.double(), v.double()
    gamma = torch.as_tensor(gamma, dtype=torch.float64).reshape(-1, *(1,) * (AI.ndim - 1))
    gamma = gamma[0] if AI.ndim == 2 else gamma
    image = torch.einsum("...ij,...j->...i", inverse, vector)
    square = torch.einsum("...i,...i->...", vector, image)[..., None, None]
    outer = torch.einsum("...i,...j->...ij", image, image)
    if printed:
        return gamma * inverse + (1 - gamma) / (gamma**2 * (1 + gamma * (1 - gamma) * square)) * outer
    return (inverse - (1 - gamma) / (gamma + (1 - gamma) * square) * outer) / gamma


def _operands(
    d: int, batch: tuple[int, ...], dtype: torch.dtype, printed: bool, gamma: float | None, transposed: bool = False
) -> tuple[Any, ...]:
    root = normal(*batch, d, d)
    inverse = (root @ root.mT / d + 0.1 * torch.eye(d)).to(dtype)
    number: Any = torch.linspace(0.5, 0.9, batch[0]) if batch else torch.tensor(0.8)
    number = gamma if gamma is not None else number
    return inverse.mT if transposed else inverse, normal(*batch, d, dtype=dtype, seed=1), number, printed


def variants() -> Iterator[Variant]:
    """Whole matrices and tiles, both forms, gamma in memory and baked in, every dtype."""
    for dtype, kind in DTYPES.items():
        for d, batch in ((1, ()), (5, (3,)), (16, ()), (37, (2,)), (64, ()), (67, ()), (97, (2,))):
            for printed in (False, True):
                gamma = 0.7 if d in (5, 67) else None
                yield Variant(
                    f"{kind}-{'printed' if printed else 'exact'}-{d}-{len(batch)}",
                    rank1_geometry(d, dtype, printed, gamma),
                    partial(_operands, d, batch, dtype, printed, gamma),
                    TOLERANCE[kind],
                    compile=False,
                )
        for d, batch in ((16, (60,)), (32, (60,)), (64, (60,)), (300, ()), (1024, ())):
            yield Variant(
                f"{kind}-large-{d}",
                rank1_geometry(d, dtype),
                partial(_operands, d, batch, dtype, False, None),
                run=False,
                quick=kind == "fp32" and d in (64, 1024),
            )
    operands = partial(_operands, 70, (2,), torch.float32, False, None, True)
    yield Variant("transposed", rank1_geometry(70, torch.float32), operands, compile=False)


def _cost(values: Geometry, AI: Tensor, v: Tensor, gamma: Any, printed: bool = False) -> Traffic:
    """The second walk reads the triangle again, and every program of it both vectors."""
    d, size = values["d"], AI.dtype.itemsize
    batch = AI.numel() // (d * d)
    once = batch * (d * d + d) * size
    numbers = 4 * batch if values["gamma"] is None else 0
    if d <= WHOLE:
        return Traffic(once + numbers, batch * d * d * size, 6.0 * AI.numel())
    side = -(-d // values["block"])
    tiles = side * (side + 1) // 2
    parts = -(-d // values["rows"])
    again = d * (d + 1) // 2 * size + tiles * d * (size + 4) + 4 * d * (side + 1) + (parts - 1) * d * size
    again += (tiles - 1) * 4 if numbers else 0
    return Traffic(once + numbers, batch * (d * d * size + 4 * d), 6.0 * AI.numel(), batch * again)


RANK1_UPDATE = Family(
    name="rank1_update",
    op="rank1_update",
    template="rank1_update.py.jinja",
    label="{dtype}_d{d}",
    geometry=geometry,
    naive=_naive,
    variants=variants,
    cost=_cost,
    doc="""Sherman-Morrison on inverses of fp32, bf16 or fp16, in fp32 inside. Up to 64 rows one program takes a matrix,
a stack of them is one launch. Beyond, a first kernel multiplies with the vector and a second one walks over the lower
triangle, which the second-level cache still holds, and writes it with its mirror image: exactly symmetric results.""",
)
