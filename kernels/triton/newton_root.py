"""Inverse roots of small symmetric matrices: the whole coupled Newton iteration in one program a matrix.

Larger matrices are a sequence of products, which cuBLAS does best: the op's reference runs for them, and stacks of them
are batched products. In full float32 on purpose, whatever torch allows elsewhere: in tf32 the iteration stops at an
error of 1e-3 and counts as failed long before (Distributed Shampoo runs it at the highest precision).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxcurv.ir.ops.newton import DONE, FAILED, WORSE, products
from fxcurv.ir.types import Psd, Scalar
from fxcurv.kernels.triton.family import DTYPES, Family, Geometry, Traffic, Variant, normal

LIMIT = 32
"""Rows of a matrix that one program holds four times over. With 64 a product without tensor cores spills registers,
whatever the number of warps."""
TOLERANCE = {"fp32": 5e-5, "bf16": 1e-2, "fp16": 2e-3}
"""Results are rounded to the matrix's own type."""


def root_geometry(d: int, root: int, steps: int, dtype: torch.dtype, epsilon: float | None = None) -> Geometry:
    """epsilon: ``None`` where it is read from memory."""
    return {
        "d": d,
        "root": root,
        "steps": steps,
        "dtype": DTYPES[dtype],
        "epsilon": epsilon,
        "done": DONE,
        "worse": WORSE,
        "failed": FAILED,
    }


def geometry(result: Any, A: Any, root: int, epsilon: Any, steps: int) -> Geometry | None:
    """Matrices of at most LIMIT rows; one epsilon, or one a matrix."""
    if not isinstance(A, Psd) or A.dtype not in DTYPES or None in A.shape or not 0 < (A.shape[-1] or 0) <= LIMIT:
        return None
    if isinstance(epsilon, Scalar) and epsilon.shape not in ((), A.batch):
        return None
    number = None if isinstance(epsilon, Scalar) else float(epsilon)
    return root_geometry(A.shape[-1] or 0, root, steps, A.dtype, number)


def _naive(A: Tensor, root: int, epsilon: Tensor | float, steps: int) -> Tensor:
    """One matrix after the other, as the iteration is published; whether it converges is for the op's tests."""
    matrices = A.double().reshape(-1, *A.shape[-2:])
    shifts = torch.as_tensor(epsilon, dtype=torch.float64).reshape(-1).expand(len(matrices))
    found = [_one_root(matrix, root, shift, steps) for matrix, shift in zip(matrices, shifts, strict=True)]
    return torch.stack(found).reshape(A.shape)


def _one_root(matrix: Tensor, root: int, shift: Tensor, steps: int) -> Tensor:
    eye = torch.eye(len(matrix), dtype=torch.float64)
    start = matrix + shift * eye
    z = (1 + root) / (2 * start.norm())
    M, X = z * start, z ** (1 / root) * eye
    error = (M - eye).abs().max()
    while error > DONE and steps:
        T, steps = ((root + 1) * eye - M) / root, steps - 1
        M = torch.linalg.matrix_power(T, root) @ M
        following = (M - eye).abs().max()
        if not following <= WORSE * error:
            break
        X, error = X @ T, following
    return (X + X.mT) / 2 if error <= FAILED else torch.full_like(X, float("nan"))


def _operands(
    d: int, batch: tuple[int, ...], root: int, dtype: torch.dtype, epsilon: float | None, kind: str = ""
) -> tuple[Any, ...]:
    basis = torch.linalg.qr(normal(*batch, d, d).double())[0]
    values = torch.logspace(-2, 0, d, dtype=torch.float64)  # condition 100
    matrices = torch.einsum("...ik,k,...jk->...ij", basis, values, basis)
    if kind == "failing":
        matrices[0, 0, 0] = float("nan")
        matrices[1] -= 0.5 * torch.eye(d)  # indefinite
    number: Any = torch.linspace(0.01, 0.02, batch[0]) if batch else torch.tensor(0.01)
    A = matrices.to(dtype)
    return A.mT if kind == "transposed" else A, root, number if epsilon is None else epsilon, 40


SIZES = ((1, ()), (5, (3,)), (16, ()), (17, (2,)), (29, ()), (31, (2,)))


def variants() -> Iterator[Variant]:
    """All block sizes and several roots, epsilon in memory and baked in, every dtype, matrices without a root."""
    for dtype, kind in DTYPES.items():
        for (d, batch), root in zip(SIZES, (1, 2, 3, 4, 6, 2), strict=True):
            epsilon = 0.01 if d in (5, 29) else None
            yield Variant(
                f"{kind}-root{root}-{d}-{len(batch)}",
                root_geometry(d, root, 40, dtype, epsilon),
                partial(_operands, d, batch, root, dtype, epsilon),
                TOLERANCE[kind],
                compile=dtype == torch.float32 and d in (16, 17),
            )
        yield Variant(
            f"{kind}-large-32",
            root_geometry(32, 4, 40, dtype),
            partial(_operands, 32, (60,), 4, dtype, None),
            run=False,
            quick=kind == "fp32",
        )
    for special in ("transposed", "failing"):
        operands = partial(_operands, 9, (3,), 2, torch.float32, None, special)
        yield Variant(special, root_geometry(9, 2, 40, torch.float32), operands, TOLERANCE["fp32"], compile=False)


def _cost(values: Geometry, A: Tensor, root: int, epsilon: Any, steps: int) -> Traffic:
    """Operations are those of a dozen steps, what a condition of a thousand takes."""
    size, batch = A.numel() * A.dtype.itemsize, A.numel() // values["d"] ** 2
    numbers = 4 * batch if values["epsilon"] is None else 0
    return Traffic(size + numbers, size, 2.0 * min(12, steps) * products(root) * A.numel() * values["d"])


NEWTON_ROOT = Family(
    name="newton_root",
    op="newton_root",
    template="newton_root.py.jinja",
    label="d{d}_root{root}_{dtype}",
    geometry=geometry,
    naive=_naive,
    variants=variants,
    cost=_cost,
    doc="""Inverse roots of symmetric matrices by the coupled Newton iteration, one program a matrix. It holds the
matrix, the root and their powers in registers, looks at the error itself and stops when it is small enough, so a stack
of matrices is one launch and no step too many. Claims matrices of up to 32 rows of fp32, bf16 or fp16; fp32 inside.""",
)
