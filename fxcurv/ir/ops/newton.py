"""Inverse roots and orthogonal factors by matrix products alone: what a GPU does fast and without telling the host.

Both iterate a fixed number of times at most, and what is decided on the way (whether a matrix has converged) is decided
where it lies. A root that did not converge is NaN, which the finite check turns into "keep the old one".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import Op, Trait
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.linalg import NAN, shifted, symmetric
from fxcurv.ir.ops.rules import accumulator, need, need_scalar
from fxcurv.ir.types import Mat, Psd, Type

STACKABLE = frozenset({Trait.BATCHABLE})
DONE = 1e-6
"""Largest |entry| of M - I at which a root has converged."""
WORSE = 1.2
"""Growth of the error that ends the iteration, with the root before it."""
FAILED = 0.05
"""Error of the last root above which it is no root (Distributed Shampoo tries again with ten times the ridge)."""


def _newton_root(A: Tensor, root: int, epsilon: Tensor, steps: int) -> Tensor:
    """(A + epsilon I)^(-1/root) by the coupled Newton iteration, exactly symmetric; NaN where it fails.

    With B = A + epsilon I, z = (1 + p) / (2 |B|_F), M = z B, X = z^(1/p) I: T = ((p + 1) I - M) / p, M <- T^p M,
    X <- X T, until max|M - I| <= 1e-6, at most ``steps`` times, or until that error grows 1.2-fold (then the X before
    counts); above 0.05 at the end the result is NaN. root = 1 is the Newton-Schulz iteration for the inverse. Each
    matrix stops by itself. A: Psd (d, d) or (G, d, d); epsilon: number, Scalar or one a group; root >= 1.
    Anil et al. 2020 (Distributed Shampoo); Guo & Higham 2006. In fp32 the error is about 1e-6 at condition 1e3 (11
    steps) and 6e-4 at 1e6 (18 steps).
    """
    dtype = accumulator(A.dtype)
    B = shifted(A.to(dtype), epsilon)
    identity = torch.eye(A.shape[-1], dtype=dtype, device=A.device).expand(B.shape)
    z = ((1.0 + root) / (2.0 * torch.linalg.matrix_norm(B)))[..., None, None]
    M, X = z * B, z ** (1.0 / root) * identity
    error = _distance(M, identity)
    running = error > DONE  # False for NaN too
    for _ in range(steps):
        T = ((root + 1.0) * identity - M) / root
        following, found = _power(T, root) @ M, X @ T
        new_error = _distance(following, identity)
        better = running & (new_error <= WORSE * error)
        M, X = torch.where(better, following, M), torch.where(better, found, X)
        error = torch.where(better, new_error, error)
        running = better & (error > DONE)
    return torch.where(error <= FAILED, symmetric(X), NAN).to(A.dtype).contiguous()


def _distance(M: Tensor, identity: Tensor) -> Tensor:
    """max|M - I| of each matrix, (.., 1, 1)."""
    return (M - identity).abs().amax(dim=(-2, -1), keepdim=True)


def _power(T: Tensor, exponent: int) -> Tensor:
    """T^exponent by repeated squaring."""
    result: Tensor | None = None
    while True:
        if exponent & 1:
            result = T if result is None else result @ T
        exponent >>= 1
        if not exponent:
            assert result is not None
            return result
        T = T @ T


def products(root: int) -> int:
    """Matrix products of one step of ``newton_root``."""
    return root.bit_length() - 1 + root.bit_count() - 1 + 2


def _infer_newton_root(A: Type, root: int, epsilon: Any, steps: int) -> Type:
    need("newton_root", "A", A, Psd)
    need_scalar("newton_root", "epsilon", epsilon, A.batch)
    if root < 1 or steps < 1:
        raise FxcurvError(f"op 'newton_root' takes root and steps of at least 1, got root {root} and {steps} steps.")
    return Psd(A.shape, A.dtype)


def _root_samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(44)
    for d, groups, root in ((1, (), 2), (5, (), 4), (17, (), 1), (3, (4,), 6), (4, (), 3)):
        yield draw.psd(d, *groups), root, draw.number(1e-2), 30
    yield draw.psd(3, 4), 2, draw.number(1e-2, 4), 30


newton_root = Op(
    "newton_root",
    "(Tensor A, int root, Tensor epsilon, int steps) -> Tensor",
    _newton_root,
    _infer_newton_root,
    _root_samples,
    flops=lambda A, root, epsilon, steps: 2.0 * steps * products(root) * A.numel * (A.shape[-1] or 1),
    traits=STACKABLE,
)

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of X <- a X + (b S + c S^2) X, S = X X^T (Jordan et al. 2024)."""


def _newton_schulz(V: Tensor, steps: int) -> Tensor:
    """V with all its singular values near 1 (0.7 to 1.2), by ``steps`` quintic Newton-Schulz steps from V / |V|_F.

    X <- a X + (b S + c S^2) X, S = X X^T with a, b, c = 3.4445, -4.7750, 2.0315 (Muon, Jordan et al. 2024; spectral
    descent in Distributed Shampoo, 5 steps). A zero matrix stays zero. V: Mat (o, i) or (G, o, i), of V's type.
    """
    dtype = accumulator(V.dtype)
    X = V.to(dtype)
    X = X / torch.linalg.matrix_norm(X)[..., None, None].clamp(min=torch.finfo(dtype).tiny)
    wide = X.shape[-2] <= X.shape[-1]
    X = X if wide else X.mT
    a, b, c = QUINTIC
    for _ in range(steps):
        S = X @ X.mT
        X = a * X + (b * S + c * (S @ S)) @ X
    return (X if wide else X.mT).to(V.dtype).contiguous()


def _infer_newton_schulz(V: Type, steps: int) -> Type:
    need("newton_schulz", "V", V, Mat)
    if steps < 0:
        raise FxcurvError(f"op 'newton_schulz' takes no negative number of steps, got {steps}.")
    return Mat(V.shape, V.dtype)


def _schulz_samples() -> Iterator[tuple[Tensor, int]]:
    draw = Draw(45)
    for groups, o, i in (((), 3, 5), ((), 1, 1), ((), 7, 2), ((4,), 3, 2)):
        yield draw.normal(*groups, o, i), 5


def _schulz_flops(V: Type, steps: int) -> float:
    short, long = sorted((V.shape[-2] or 1, V.shape[-1] or 1))
    matrices = V.numel // (short * long)
    return 2.0 * steps * matrices * (2 * short * short * long + short**3)


newton_schulz = Op(
    "newton_schulz",
    "(Tensor V, int steps) -> Tensor",
    _newton_schulz,
    _infer_newton_schulz,
    _schulz_samples,
    flops=_schulz_flops,
    traits=STACKABLE,
)
