"""A spectrum applied in an eigenbasis: U = QG [(QG^T V QA) / (S + damping)] QA^T, with <U, V> for a KL clip.

Small matrices (both sides at most 64, 32 in full float32) run all four products, the division and the sum in one
program a matrix. For larger ones the four products stay products: the first and third are cuBLAS's, the second and
fourth are generated with an epilogue, so that the division and the sum cost no pass over memory of their own:

    T = QG^T V  (cuBLAS) · R = (T QA) / (S + damping)  (here) · W = QG R  (cuBLAS) · U = W QA^T, <U, V>  (here)

In full float32 a generated product is slower than cuBLAS by more than an epilogue saves, so there the parts run as they
are: ``eig_apply`` chooses by dtype and by how torch may multiply.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxcurv.kernels.triton.family import DTYPES, Family, Geometry, Traffic, Variant, normal, precision, specialise
from fxcurv.kernels.triton.kron_apply import HOW, TOLERANCE, _cost, _never, kind, sandwich, variants
from fxcurv.kernels.triton.kron_apply import operands as sides


def eig_apply(V: Tensor, QG: Tensor, QA: Tensor, S: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """U = QG [(QG^T V QA) / (S + damping)] QA^T and <U, V> in float32.

    V, S: (o, i) or (G, o, i); QG: (.., o, o), QA: (.., i, i); damping: one number or
    one a group (G,). All of one dtype, on a GPU.
    """
    values = sandwich("eig_apply", V.shape[-2], V.shape[-1], V.dtype)
    if values is not None:
        return specialise(EIG_APPLY, values)(V, QG, QA, S, damping)  # type: ignore[no-any-return]
    turned = product_divide(QG.mT @ V, QA, S, damping)
    return product_dot(QG @ turned, QA.mT, V)


def epilogue(name: str, dtype: torch.dtype, how: str | None = None) -> Geometry | None:
    """Geometry of a product with something after it. name: "product_divide" or "product_dot"."""
    if dtype not in DTYPES:
        return None
    what = {"product_divide": "divide", "product_dot": "dot"}[name]
    return {"name": name, "epilogue": what, "dtype": DTYPES[dtype], "precision": how or precision(dtype)}


def _worth(dtype: torch.dtype) -> bool:
    """Whether a generated product keeps up with cuBLAS: on tensor cores."""
    return dtype in DTYPES and (dtype != torch.float32 or precision(dtype) == "tf32")


def product_divide(left: Tensor, right: Tensor, S: Tensor, damping: Tensor) -> Tensor:
    """left right / (S + damping): (.., m, k) (.., k, n) -> (.., m, n)."""
    values = epilogue("product_divide", left.dtype) if _worth(left.dtype) else None
    if values is not None:
        return specialise(PRODUCT_DIVIDE, values)(left, right, S, damping)  # type: ignore[no-any-return]
    shaped = damping.reshape(damping.shape + (1,) * (S.ndim - damping.ndim))
    return ((left @ right) / (S + shaped)).to(left.dtype)


def product_dot(left: Tensor, right: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """U = left right, (.., m, n), and <U, V> in float32 (float64 for float64)."""
    values = epilogue("product_dot", left.dtype) if _worth(left.dtype) else None
    if values is not None:
        return specialise(PRODUCT_DOT, values)(left, right, V)  # type: ignore[no-any-return]
    U = left @ right
    wide = torch.promote_types(U.dtype, torch.float32)
    return U, torch.dot(U.reshape(-1).to(wide), V.reshape(-1).to(wide))


def _spectrum(o: int, i: int, groups: tuple[int, ...], dtype: torch.dtype, strided: bool = False) -> tuple[Tensor, ...]:
    V, left, right = sides(o, i, groups, dtype, strided)
    S = normal(*groups, o, i, seed=3).square() + 0.1
    damping = normal(*groups, 1, seed=4).squeeze(-1).abs() + 0.5
    return V, left, right, S.to(dtype), damping


def _divided(x: Tensor, S: Tensor, damping: Tensor) -> Tensor:
    return x / (S.double() + damping.double().reshape(damping.shape + (1,) * (S.ndim - damping.ndim)))


def _naive(V: Tensor, QG: Tensor, QA: Tensor, S: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    basis_g, basis_a, gradient = QG.double(), QA.double(), V.double()
    inside = _divided(torch.einsum("...po,...pq,...qi->...oi", basis_g, gradient, basis_a), S, damping)
    U = torch.einsum("...op,...pq,...iq->...oi", basis_g, inside, basis_a)
    return U, (U * gradient).sum()


EIG_APPLY = Family(
    name="eig_apply",
    op="",
    template="sandwich.py.jinja",
    label="{block_o}x{block_i}_{dtype}",
    geometry=_never,
    naive=_naive,
    variants=partial(variants, "eig_apply", _spectrum),
    cost=_cost,
    tuned="sandwich",
    doc="A spectrum applied to small gradients in an eigenbasis, with <U, V>. One program a matrix runs four products, "
    "the damped division and the sum for a KL clip, up to 64 x 64.",
)

SHAPES = ((3, 5, 7, ()), (1, 1, 1, ()), (37, 41, 53, ()), (16, 32, 48, ()), (17, 19, 5, (3,)), (67, 1, 2, (2,)))


def _divide_operands(m: int, k: int, n: int, groups: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    left, right = normal(*groups, m, k, seed=1) / k**0.5, normal(*groups, n, k, seed=2).mT
    S, damping = normal(*groups, m, n, seed=3).square() + 0.1, normal(*groups, 1, seed=4).squeeze(-1).abs() + 0.5
    return left.to(dtype), right.to(dtype), S.to(dtype), damping


def _dot_operands(m: int, k: int, n: int, groups: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    left, right, _, _ = _divide_operands(m, k, n, groups, dtype)
    return left, right, normal(*groups, n, m, dtype=dtype).mT


def _naive_divide(left: Tensor, right: Tensor, S: Tensor, damping: Tensor) -> Tensor:
    return _divided(torch.einsum("...ij,...jk->...ik", left.double(), right.double()), S, damping)


def _naive_dot(left: Tensor, right: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    U = torch.einsum("...ij,...jk->...ik", left.double(), right.double())
    return U, (U * V.double()).sum()


def _variants(name: str, make: Any) -> Iterator[Variant]:
    for dtype, how in HOW:
        label, values = kind(dtype, how), epilogue(name, dtype, how)
        assert values is not None
        for m, k, n, groups in SHAPES:
            given = partial(make, m, k, n, groups, dtype)
            yield Variant(f"{label}-{m}x{k}x{n}", values, given, TOLERANCE[label], label != "fp32", compile=m == 37)
        given = partial(make, 512, 256, 384, (), dtype)
        yield Variant(f"{label}-large", values, given, dot=label != "fp32", run=False, quick=label == "tf32")


def _product_cost(values: Geometry, left: Tensor, right: Tensor, other: Tensor, *damping: Tensor) -> Traffic:
    """Every operand and the result once; a row of tiles asks for all of ``right``, a column for all of ``left``."""
    m, k, n, size = *left.shape[-2:], right.shape[-1], left.dtype.itemsize
    groups = left.shape[0] if left.ndim > 2 else 1
    down, across = -(-m // values["block_m"]), -(-n // values["block_n"])
    read = float(groups * size * (m * k + k * n + m * n))
    again = float(groups * size * (m * k * (across - 1) + k * n * (down - 1)))
    sums = 4.0 * groups * down * across
    written, flops = float(size * groups * m * n), 2.0 * groups * m * n * k
    if values["epilogue"] == "divide":  # every tile reads the damping
        return Traffic(read + 4.0 * groups, written, flops, again + sums - 4.0 * groups)
    return Traffic(read, written + sums, flops, again)


PRODUCT_DIVIDE = Family(
    name="product_divide",
    op="",
    template="product.py.jinja",
    label="{dtype}",
    geometry=_never,
    naive=_naive_divide,
    variants=partial(_variants, "product_divide", _divide_operands),
    cost=_product_cost,
    tuned="product",
    doc="A matrix product divided by a damped spectrum before it is written. The second of the four products of an "
    "eigenbasis apply.",
)
PRODUCT_DOT = Family(
    name="product_dot",
    op="",
    template="product.py.jinja",
    label="{dtype}",
    geometry=_never,
    naive=_naive_dot,
    variants=partial(_variants, "product_dot", _dot_operands),
    cost=_product_cost,
    tuned="product",
    doc="A matrix product and its inner product with another matrix. The last product of an apply, with the sum that a "
    "KL clip needs; tiles leave their sums, so the order of addition never changes.",
)
