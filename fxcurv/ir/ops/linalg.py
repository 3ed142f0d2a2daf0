"""Factorisations: inverse, eigendecomposition, inverse root.

None raises and, where LAPACK's and the GPU library's ``_ex`` forms exist, none waits for the device: a matrix
that cannot be factorised gives a result full of NaN, which the program's finite check turns into "keep the old
one" and a repair on the host. The failure of one group does not touch the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxcurv.ir.op import Op, Trait
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.rules import (
    accumulator,
    need,
    need_flag,
    need_scalar,
    need_shape,
    promote,
    reads_as_diagonal,
    spread,
)
from fxcurv.ir.types import Diag, Mat, Orth, Type, Vec

STACKABLE = frozenset({Trait.BATCHABLE})
NAN = float("nan")


def shifted(A: Tensor, damping: Any) -> Tensor:
    """A + damping I for matrices (..., d, d); ``damping`` is a number, a scalar or one value a matrix."""
    result = A.clone(memory_format=torch.contiguous_format)
    line = result.diagonal(dim1=-2, dim2=-1)
    line.add_(spread(damping, line))
    return result


def symmetric(A: Tensor) -> Tensor:
    """(A + A^T) / 2, exactly symmetric."""
    return (A + A.mT) / 2


def _for_line(scalar: Any, values: Tensor) -> Any:
    """A scalar for the last dimension of ``values``, in their dtype."""
    return spread(scalar, values).to(values.dtype) if isinstance(scalar, Tensor) else scalar


def shifted_diagonal(values: Tensor, damping: Any) -> Tensor:
    """values + damping, all NaN in a group in which one entry is not a positive finite number."""
    x = values + _for_line(damping, values)
    usable = ((x > 0) & torch.isfinite(x)).all(dim=-1, keepdim=True)
    return torch.where(usable, x, NAN)


def _inverse(A: Tensor, damping: Tensor, diagonal: bool = False) -> Tensor:
    """(A + damping I)^-1 by Cholesky, exactly symmetric; elementwise for a Diag. NaN where it is not positive definite.

    A: Psd (d, d) or (G, d, d), or Diag (d,) or (G, d); damping: number, Scalar or one a group. The result has A's type.
    ``diagonal=True`` says that a tensor of shape (d, d) holds the diagonals of d groups.
    """
    if reads_as_diagonal(A, diagonal):
        return 1.0 / shifted_diagonal(A, damping)
    wide = accumulator(A.dtype)  # there is no half-precision factorisation
    factor, info = torch.linalg.cholesky_ex(shifted(A.to(wide), damping))
    identity = torch.eye(A.shape[-1], dtype=wide, device=A.device).expand(A.shape)
    solved = symmetric(torch.cholesky_solve(identity, factor))
    # An infinite pivot is no failure to LAPACK, and its inverse would be a plausible 0.
    usable = (info == 0) & torch.isfinite(factor.diagonal(dim1=-2, dim2=-1)).all(dim=-1)
    return torch.where(usable[..., None, None], solved, NAN).to(A.dtype).contiguous()


def _infer_inverse(A: Type, damping: Any, diagonal: bool = False) -> Type:
    need_flag("inverse", "A", A, diagonal)
    need_scalar("inverse", "damping", damping, A.batch)
    return A


def _cubic(A: Type, factor: float) -> float:
    return float(A.numel) if isinstance(A, Diag) else factor * A.numel * (A.shape[-1] or 1)


def _factors() -> Iterator[tuple[Tensor, tuple[int, ...], tuple[bool, ...]]]:
    """(factor, groups, flags) of the samples of all ops here."""
    draw = Draw(10)
    for d, groups in ((1, ()), (5, ()), (17, ()), (3, (4,)), (3, (3,))):
        yield draw.psd(d, *groups), groups, ()
    yield draw.singular(4), (), ()
    yield draw.positive(7), (), ()
    yield draw.positive(2, 5), (2,), ()
    yield draw.positive(3, 3), (3,), (True,)


def _inverse_samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(11)
    for factor, groups, flags in _factors():
        yield factor, draw.number(0.1), *flags
        if groups:
            yield factor, draw.number(0.1, *groups), *flags


inverse = Op(
    "inverse",
    "(Tensor A, Tensor damping, bool diagonal=False) -> Tensor",
    _inverse,
    _infer_inverse,
    _inverse_samples,
    flops=lambda A, damping, diagonal=False: _cubic(A, 7 / 3),
    traits=STACKABLE,
)


def decompose(A: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.linalg.eigh`` that fills a matrix's results with NaN where it is not finite or does not converge."""
    usable = torch.isfinite(A).all(dim=-1).all(dim=-1)
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    try:
        values, vectors = torch.linalg.eigh(torch.where(usable[..., None, None], A, identity))
    except torch.linalg.LinAlgError:
        if A.ndim == 2:
            return torch.full_like(A[0], NAN), torch.full_like(A, NAN)
        parts = [decompose(part) for part in A]  # one by one: only the failing matrix is lost
        return torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])
    values = torch.where(usable[..., None], values, NAN)
    return values, torch.where(usable[..., None, None], vectors, NAN).contiguous()


def _eigh(A: Tensor, diagonal: bool = False) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending and clipped at 0, and eigenvectors in columns: A = Q diag(e) Q^T. NaN on failure.

    A: Psd (d, d) or (G, d, d) -> Vec (d,) or (G, d), Orth. A Diag gives its own values in place and ones (the identity
    basis, a Diag). ``diagonal=True`` says that a tensor of shape (d, d) holds the diagonals of d groups.
    """
    if reads_as_diagonal(A, diagonal):
        usable = torch.isfinite(A).all(dim=-1, keepdim=True)
        values = torch.where(usable, A.clamp(min=0.0), NAN)
        return values, torch.where(usable, torch.ones_like(A), NAN)
    values, vectors = decompose(A.to(accumulator(A.dtype)))
    return values.clamp(min=0.0).to(A.dtype), vectors.to(A.dtype)


def _infer_eigh(A: Type, diagonal: bool = False) -> tuple[Type, Type]:
    need_flag("eigh", "A", A, diagonal)
    if isinstance(A, Diag):
        return Vec(A.shape, A.dtype), A
    return Vec(A.shape[:-1], A.dtype), Orth(A.shape, A.dtype)


eigh = Op(
    "eigh",
    "(Tensor A, bool diagonal=False) -> (Tensor, Tensor)",
    _eigh,
    _infer_eigh,
    lambda: ((factor, *flags) for factor, _, flags in _factors()),
    flops=lambda A, diagonal=False: _cubic(A, 9),
    traits=STACKABLE,
)


def _inverse_root(A: Tensor, root: float, epsilon: Tensor, diagonal: bool = False) -> Tensor:
    """(A + epsilon I)^(-1/root) by eigh, with eigenvalues of A + epsilon I floored at epsilon. NaN on failure.

    Shampoo's factors (Gupta et al. 2018): root = 2k for a tensor with k modes. A: Psd or Diag, of A's type.
    ``diagonal=True`` says that a tensor of shape (d, d) holds the diagonals of d groups.
    """
    if reads_as_diagonal(A, diagonal):
        usable = torch.isfinite(A).all(dim=-1, keepdim=True)
        return torch.where(usable, A.clamp(min=0.0) + _for_line(epsilon, A), NAN) ** (-1.0 / root)
    values, vectors = decompose(A.to(accumulator(A.dtype)))
    powers = (values.clamp(min=0.0) + _for_line(epsilon, values)) ** (-1.0 / root)
    return symmetric((vectors * powers.unsqueeze(-2)) @ vectors.mT).to(A.dtype)


def _infer_inverse_root(A: Type, root: float, epsilon: Any, diagonal: bool = False) -> Type:
    need_flag("inverse_root", "A", A, diagonal)
    need_scalar("inverse_root", "epsilon", epsilon, A.batch)
    return A


def _inverse_root_samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(12)
    for (factor, groups, flags), root in zip(_factors(), (2, 4, 4.0, 4, 2, 6, 4, 2, 4), strict=True):
        yield factor, float(root), draw.number(1e-2), *flags
        if groups:
            yield factor, float(root), draw.number(1e-2, *groups), *flags


inverse_root = Op(
    "inverse_root",
    "(Tensor A, float root, Tensor epsilon, bool diagonal=False) -> Tensor",
    _inverse_root,
    _infer_inverse_root,
    _inverse_root_samples,
    flops=lambda A, root, epsilon, diagonal=False: _cubic(A, 11),
    traits=STACKABLE,
)


def _outer(eG: Tensor, eA: Tensor) -> Tensor:
    """Eigenvalues of a Kronecker product: eG eA^T, (o,) and (i,) -> Mat (o, i), or each with a leading group."""
    return eG.unsqueeze(-1) * eA.unsqueeze(-2)


def _infer_outer(eG: Type, eA: Type) -> Type:
    need("outer", "eG", eG, Vec, Diag)
    need("outer", "eA", eA, Vec, Diag)
    need_shape("outer", "eA", eA, (*eG.batch, eA.shape[-1]))
    return Mat((*eG.shape, eA.shape[-1]), promote(eG, eA))


def _outer_samples() -> Iterator[tuple[Tensor, Tensor]]:
    draw = Draw(13)
    for groups, o, i in (((), 3, 5), ((), 1, 1), ((4,), 3, 2)):
        yield draw.positive(*groups, o), draw.positive(*groups, i)


outer = Op(
    "outer",
    "(Tensor eG, Tensor eA) -> Tensor",
    _outer,
    _infer_outer,
    _outer_samples,
    flops=lambda eG, eA: eG.numel * (eA.shape[-1] or 1),
    traits=STACKABLE | {Trait.LINEAR},
)
