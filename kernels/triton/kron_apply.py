"""Products from both sides, L V R: inverse Kronecker factors and eigenbases applied to a gradient.

What gets a kernel, and what does not:

* **Small matrices** (both sides at most 64, 32 in full float32): one program runs the whole chain, so a matrix costs
  one launch in place of two and nothing in between is written; a stack of equal layers is one launch. This is where a
  step of many small layers spends its time. ``kron_apply``, ``rotate`` and ``rotate_back`` are the same kernel with
  sides turned.
* **Larger matrices**: two products of their own, which cuBLAS does best; no kernel claims them. For the second product
  there is a reason to be its own kernel only where something follows it: the product <U, V> of a KL clip
  (``kron_apply_dot``) or the division by a spectrum (``eig_apply.py``), which else read the result once more. That
  holds for tf32 and half precision, where a generated product keeps up with cuBLAS; in full float32 it does not, and
  the parts run one by one.

A diagonal side is point-wise work and stays with the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxcurv.ir.types import Diag, Mat
from fxcurv.kernels.triton.family import (
    DTYPES,
    Family,
    Geometry,
    Traffic,
    Variant,
    normal,
    precision,
    specialise,
)

LIMIT = 64
"""Largest side of a matrix whose chain one program holds in registers, on tensor cores."""
HOW = ((torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee"), (torch.float16, "ieee"))
"""Dtypes and, for float32, the two ways to multiply."""
TOLERANCE = {"fp32": 2e-5, "tf32": 4e-3, "bf16": 2e-2, "fp16": 2e-3}
"""Largest relative error by kind: results and what lies between products are rounded to it."""


def kind(dtype: torch.dtype, how: str) -> str:
    """A short name of dtype and way to multiply."""
    return "tf32" if how == "tf32" else DTYPES[dtype]


def padded(size: int) -> int:
    """The block that holds ``size``: a power of two, 16 at least as tensor cores want it."""
    return max(16, 1 << (size - 1).bit_length())


def sandwich(name: str, o: int, i: int, dtype: torch.dtype, how: str | None = None) -> Geometry | None:
    """Geometry of a chain in one program, ``None`` where it does not fit. name: of the family.

    Without tensor cores the operands of a product of 64 x 64 fill a thread's registers, so there the limit is half.
    """
    how = how or precision(dtype)
    limit = LIMIT // 2 if dtype == torch.float32 and how == "ieee" else LIMIT
    if dtype not in DTYPES or max(o, i) > limit:
        return None
    return {
        "name": name,
        "title": TITLES[name],
        "turn": {"rotate": "to", "rotate_back": "back"}.get(name, ""),
        "spectrum": name == "eig_apply",
        "dot": name in ("eig_apply", "kron_apply_dot"),
        "block_o": padded(o),
        "block_i": padded(i),
        "dtype": DTYPES[dtype],
        "precision": how,
    }


TITLES = {
    "kron_apply": "left V right, (o, i) or (groups, o, i), for",
    "kron_apply_dot": "left V right, (o, i) or (groups, o, i), and its product with V in float32, for",
    "rotate": "left^T V right, (o, i) or (groups, o, i), for",
    "rotate_back": "left V right^T, (o, i) or (groups, o, i), for",
    "eig_apply": "left ((left^T V right) / (S + damping)) right^T and its product with V in float32, for",
}


def claim(name: str) -> Callable[..., Geometry | None]:
    """The geometry rule of an op on (V, left, right): small matrices of one dtype, both sides full."""

    def geometry(result: Any, V: Any, left: Any, right: Any) -> Geometry | None:
        """Matrices of at most 64 x 64 (32 x 32 in full float32), all of one dtype, neither side a diagonal."""
        sides = (left, right)
        known = isinstance(V, Mat) and all(V.shape) and len(V.shape) <= 3
        if not known or any(isinstance(side, Diag) or side.dtype != V.dtype for side in sides):
            return None
        return sandwich(name, V.shape[-2], V.shape[-1], V.dtype)

    return geometry


def _cost(values: Geometry, V: Tensor, left: Tensor, right: Tensor, *spectrum: Tensor) -> Traffic:
    """Every operand once, every result once; what a chain of four products reads again is still in the cache."""
    o, i = V.shape[-2:]
    groups = V.numel() // (o * i)
    operands = (V, left, right, *spectrum[:1])
    read = sum(x.numel() * x.dtype.itemsize for x in operands) + (groups * 4 if spectrum else 0)
    written = V.numel() * V.dtype.itemsize + (groups * 4 if values["dot"] else 0)
    again = sum(x.numel() * x.dtype.itemsize for x in (V, left, right)) if spectrum else 0
    return Traffic(read, written, 2.0 * groups * o * i * (o + i) * (2 if spectrum else 1), again)


def _naive(form: str, V: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return torch.einsum(form, left.double(), V.double(), right.double())


def _naive_dot(V: Tensor, GI: Tensor, AI: Tensor) -> tuple[Tensor, Tensor]:
    U = torch.einsum("...op,...pq,...qi->...oi", GI.double(), V.double(), AI.double())
    return U, (U * V.double()).sum()


SIZES = (
    (3, 5, ()),
    (1, 1, ()),
    (17, 13, ()),
    (16, 16, (3,)),
    (31, 29, (2,)),
    (32, 32, ()),
    (31, 47, (2,)),
    (64, 64, ()),
    (1, 37, (5,)),
    (61, 2, ()),
)


def operands(o: int, i: int, groups: tuple[int, ...], dtype: torch.dtype, strided: bool = False) -> tuple[Tensor, ...]:
    """V and two sides without symmetry, so that a transpose shows; sides of norm near 1."""
    V = normal(*groups, o, i, dtype=dtype)
    left, right = normal(*groups, o, o, seed=1) / o**0.5, normal(*groups, i, i, seed=2) / i**0.5
    if strided:
        V, left = normal(*groups, i, o, dtype=dtype).mT, left.mT
    return V, left.to(dtype), right.to(dtype)


def variants(name: str, make: Callable[..., tuple[Tensor, ...]] = operands) -> Iterator[Variant]:
    """Sizes in every dtype and precision, strided operands; the largest blocks compile for the default tests."""
    for dtype, how in HOW:
        for o, i, groups in SIZES:
            label, values = kind(dtype, how), sandwich(name, o, i, dtype, how)
            if values is None:
                continue
            yield Variant(
                f"{label}-{o}x{i}-{len(groups)}",
                values,
                partial(make, o, i, groups, dtype),
                tolerance=TOLERANCE[label],
                dot=label != "fp32",
                compile=(o, i) in ((17, 13), (31, 29), (31, 47), (64, 64)),
                quick=(o, i) == (64, 64) and label == "tf32",
            )
    values = sandwich(name, 19, 23, torch.float32, "ieee")
    assert values is not None
    yield Variant("strided", values, partial(make, 19, 23, (2,), torch.float32, True), compile=False)


def _family(name: str, op: str, naive: Callable[..., Any], doc: str) -> Family:
    return Family(
        name=name,
        op=op,
        template="sandwich.py.jinja",
        label="{block_o}x{block_i}_{dtype}",
        geometry=claim(name) if op else _never,
        naive=naive,
        variants=partial(variants, name),
        cost=_cost,
        doc=doc,
        tuned="sandwich",
    )


def _never(*types: Any) -> None:
    """Not an op of programs."""


KRON_APPLY = _family(
    "kron_apply",
    "kron_apply",
    partial(_naive, "...op,...pq,...qi->...oi"),
    "Inverse Kronecker factors applied to small gradients. One program a matrix runs both products, up to 64 x 64.",
)
ROTATE = _family(
    "rotate",
    "rotate",
    partial(_naive, "...po,...pq,...qi->...oi"),
    "Small gradients turned into an eigenbasis. One program a matrix runs both products, up to 64 x 64.",
)
ROTATE_BACK = _family(
    "rotate_back",
    "rotate_back",
    partial(_naive, "...op,...pq,...iq->...oi"),
    "Small gradients turned back from an eigenbasis. One program a matrix runs both products, up to 64 x 64.",
)
KRON_APPLY_DOT = _family(
    "kron_apply_dot",
    "",
    _naive_dot,
    "Inverse Kronecker factors applied to small gradients, with <U, V>. One program a matrix, up to 64 x 64; the sum "
    "for a KL clip is taken where U still is on the chip.",
)


def kron_apply_dot(V: Tensor, GI: Tensor, AI: Tensor) -> tuple[Tensor, Tensor]:
    """U = GI V AI and <U, V> in float32, without reading U again.

    V: (o, i) or (G, o, i); GI: (.., o, o), AI: (.., i, i), one dtype, on a GPU. Any size: small matrices in one
    program, else the first product by cuBLAS and the second with the sum in its epilogue.
    """
    values = sandwich("kron_apply_dot", V.shape[-2], V.shape[-1], V.dtype)
    if values is not None:
        return specialise(KRON_APPLY_DOT, values)(V, GI, AI)  # type: ignore[no-any-return]
    from fxcurv.kernels.triton.eig_apply import product_dot

    return product_dot(GI @ V, AI, V)
