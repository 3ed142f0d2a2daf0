"""Linear algebra of stationary chains: w_t = Psi w_{t-1} + noise, with Psi a Kronecker product (Martens et al. 2018).

A side of a layer is described by C0 = E[r_t r_t^T] and C1 = E[r_{t+1} r_t^T]. Damped, D = C0 + c I, its whitened
transition is H = D^-1/2 C1 D^-1/2, of norm at most 1. The covariance of a sum over time has eigenvalues that are
functions of x, a product of one eigenvalue (or squared singular value) of H of either side; near |x| = 1 these
functions are limits 0/0 or have poles, so x is kept EDGE away from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxcurv.ir.op import Op, Trait
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.linalg import NAN, STACKABLE, decompose, shifted, symmetric
from fxcurv.ir.ops.rules import accumulator, align, need, need_scalar, need_shape, promote
from fxcurv.ir.types import Mat, Orth, Psd, Type, Vec

EDGE = 1e-4
"""Distance that products of eigenvalues keep from -1 and 1, and smallest eigenvalue of a sum over time."""


def whitened(C0: Tensor, C1: Tensor, damping: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(D^-1/2, D^-1, D^-1/2 C1 D^-1/2) with D = C0 + damping I; NaN where D is not positive definite."""
    values, vectors = decompose(shifted(C0, damping))
    roots = torch.where(values > 0, values, NAN).rsqrt().unsqueeze(-2)
    half = symmetric((vectors * roots) @ vectors.mT)
    return half, symmetric((vectors * roots.square()) @ vectors.mT), half @ C1 @ half


def _chain_modes(C0: Tensor, C1: Tensor, damping: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(P, K, mu) of one side: P = C1^T D^-1, K = D^-1/2 E, H^T H = E diag(mu) E^T with mu clipped to [0, 1].

    D = C0 + damping I, H = D^-1/2 C1 D^-1/2. C0: Psd (d, d) or (G, d, d); C1: Mat like it; mu: Vec (d,) or (G, d).
    Martens et al. 2018, "option 2". NaN where D is not positive definite.
    """
    wide = accumulator(C0.dtype)
    half, inverse, transition = whitened(C0.to(wide), C1.to(wide), damping)
    mu, vectors = decompose(symmetric(transition.mT @ transition))
    results = (C1.to(wide).mT @ inverse, half @ vectors, mu.clamp(0.0, 1.0))
    return results[0].to(C0.dtype), results[1].to(C0.dtype), results[2].to(C0.dtype)


def _symmetric_chain_modes(C0: Tensor, C1: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """(L, psi) of one side whose C1 counts as symmetric: L = D^-1/2 U, H = U diag(psi) U^T, psi clipped to [-1, 1].

    D = C0 + damping I, H = D^-1/2 (C1 + C1^T)/2 D^-1/2. Types as in ``chain_modes``. Martens et al. 2018, "option 1".
    """
    wide = accumulator(C0.dtype)
    half, _, transition = whitened(C0.to(wide), symmetric(C1.to(wide)), damping)
    psi, vectors = decompose(symmetric(transition))
    return (half @ vectors).to(C0.dtype), psi.clamp(-1.0, 1.0).to(C0.dtype)


def _products(G: Tensor, A: Tensor) -> Tensor:
    """G A^T in float64, kept away from -1 and 1."""
    return (G.double().unsqueeze(-1) * A.double().unsqueeze(-2)).clamp(-1.0 + EDGE, 1.0 - EDGE)


def _chain_gain(muG: Tensor, muA: Tensor) -> Tensor:
    """1 / (1 - muG muA^T), Mat (o, i) or (G, o, i): the middle factor of the inverse of an endless sum over time.

    muG: Vec (o,), muA: Vec (i,), in [0, 1], each with a leading G for groups; products are kept below 1 - EDGE.
    """
    return (1.0 / (1.0 - _products(muG, muA))).to(torch.promote_types(muG.dtype, muA.dtype))


def _finite_chain_gain(psiG: Tensor, psiA: Tensor, steps: Tensor) -> Tensor:
    """1 / f(x) for x = psiG psiA^T, Mat (o, i) or (G, o, i), f(x) = sum over |d| < T of (1 - |d|/T) x^|d|.

    f = ((1 - x^2) - 2 x (1 - x^T) / T) / (1 - x)^2 is what a sequence of T steps makes of one step's variance: 1 for
    T = 1 or x = 0. It is floored at EDGE (it is 0 at x = -1 for even T). steps: mean length E[T], Scalar; between two
    whole numbers the lengths are taken to be these two, whose mean it is. Psi: Vec (o,), (i,), with a leading G.
    """
    x = _products(psiG, psiA)
    T = torch.as_tensor(steps, dtype=torch.float64, device=x.device).clamp(min=1.0)
    low = T.floor()
    powers = x.pow(low) * (1.0 - (T - low) * (1.0 - x))  # (1 - r) x^low + r x^(low + 1)
    sums = ((1.0 - x.square()) - 2.0 * x * (1.0 - powers) / T) / (1.0 - x).square()
    return (1.0 / sums.clamp(min=EDGE)).to(torch.promote_types(psiG.dtype, psiA.dtype))


def _sides_apply(V: Tensor, G: Tensor, A: Tensor) -> Tensor:
    """G V A^T: the Kronecker product of two general matrices applied to a gradient, Mat (o, i) or (G, o, i).

    G: (p, o), A: (q, i) -> Mat (p, q); square for a layer's own sides.
    """
    V, G, A = align(V, G, A)
    return G @ V @ A.mT


def _sides_apply_transposed(V: Tensor, G: Tensor, A: Tensor) -> Tensor:
    """G^T V A: the transpose of ``sides_apply``, Mat (o, i) or (G, o, i); G: (o, p), A: (i, q) -> Mat (p, q)."""
    V, G, A = align(V, G, A)
    return G.mT @ V @ A


def _infer_modes(name: str, vectors: int) -> Callable[[Type, Type, Any], tuple[Type, ...]]:
    def infer(C0: Type, C1: Type, damping: Any) -> tuple[Type, ...]:
        need(name, "C0", C0, Psd)
        need_shape(name, "C1", need(name, "C1", C1, Mat), C0.shape)
        need_scalar(name, "damping", damping, C0.batch)
        return (*(Mat(C0.shape, C0.dtype) for _ in range(vectors)), Vec(C0.shape[:-1], C0.dtype))

    return infer


def _infer_gain(name: str) -> Callable[..., Type]:
    def infer(G: Type, A: Type, *steps: Any) -> Type:
        need(name, "G", G, Vec)
        need_shape(name, "A", need(name, "A", A, Vec), (*G.batch, A.shape[-1]))
        for one in steps:
            need_scalar(name, "steps", one)
        return Mat((*G.shape, A.shape[-1]), promote(G, A))

    return infer


def _infer_sides(name: str, met: int) -> Callable[[Type, Type, Type], Type]:
    """met: the dimension of a side, -1 or -2, that meets V; the other one is the result's."""

    def infer(V: Type, G: Type, A: Type) -> Type:
        need(name, "V", V, Mat)
        for operand, side, size in (("G", G, V.shape[-2]), ("A", A, V.shape[-1])):
            core = (None, size) if met == -1 else (size, None)
            need_shape(name, operand, need(name, operand, side, Mat, Psd, Orth), (*V.batch, *core))
        left = -3 - met
        return Mat((*V.batch, G.shape[left], A.shape[left]), promote(V, G, A))

    return infer


def toeplitz(draw: Draw, d: int, *groups: int) -> tuple[Tensor, Tensor]:
    """C0 and C1 of a random chain of 9 steps, well conditioned."""
    rows = draw.normal(*groups, 9 * d, d)
    rows = rows + 0.7 * rows.roll(1, -2) @ draw.orth(d, *groups)
    return rows.mT @ rows / (9 * d), rows[..., 1:, :].mT @ rows[..., :-1, :] / (9 * d)


def _mode_samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(31)
    for d, groups in ((1, ()), (4, ()), (9, ()), (3, (4,)), (3, (3,))):
        yield (*toeplitz(draw, d, *groups), draw.number(0.1))
    yield (*toeplitz(draw, 3, 2), draw.number(0.1, 2))
    yield draw.singular(4), torch.zeros(4, 4, dtype=torch.float64), draw.number(0.1)


def _gain_samples() -> Iterator[tuple[Tensor, Tensor]]:
    draw = Draw(32)
    for groups, o, i in (((), 3, 5), ((), 1, 1), ((4,), 3, 2)):
        yield 0.95 * draw.normal(*groups, o).sin().abs(), 0.95 * draw.normal(*groups, i).sin().abs()


def _finite_gain_samples() -> Iterator[tuple[Tensor, ...]]:
    draw = Draw(33)
    for (G, A), steps in zip(_gain_samples(), (7.0, 1.0, 2.0), strict=True):
        yield G, A * draw.normal(*A.shape).sign(), draw.number(steps)


def _side_samples(transposed: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    draw = Draw(34)
    square = [(groups, o, i, o, i) for groups, o, i in (((), 3, 5), ((), 1, 1), ((4,), 3, 2), ((3,), 3, 3))]
    for groups, o, i, p, q in (*square, ((), 3, 5, 4, 2)):
        left, right = draw.normal(*groups, p, o), draw.normal(*groups, q, i)
        yield draw.normal(*groups, o, i), *((left.mT, right.mT) if transposed else (left, right))


def _side_flops(V: Type, G: Type, A: Type) -> float:
    return 2.0 * V.numel * ((V.shape[-1] or 1) + (V.shape[-2] or 1))


chain_modes = Op(
    "chain_modes",
    "(Tensor C0, Tensor C1, Tensor damping) -> (Tensor, Tensor, Tensor)",
    _chain_modes,
    _infer_modes("chain_modes", 2),
    _mode_samples,
    flops=lambda C0, C1, damping: 34.0 * C0.numel * (C0.shape[-1] or 1),
    traits=STACKABLE,
)
symmetric_chain_modes = Op(
    "symmetric_chain_modes",
    "(Tensor C0, Tensor C1, Tensor damping) -> (Tensor, Tensor)",
    _symmetric_chain_modes,
    _infer_modes("symmetric_chain_modes", 1),
    _mode_samples,
    flops=lambda C0, C1, damping: 30.0 * C0.numel * (C0.shape[-1] or 1),
    traits=STACKABLE,
)
chain_gain = Op(
    "chain_gain",
    "(Tensor muG, Tensor muA) -> Tensor",
    _chain_gain,
    _infer_gain("chain_gain"),
    _gain_samples,
    flops=lambda muG, muA: 3.0 * muG.numel * (muA.shape[-1] or 1),
    traits=STACKABLE,
)
finite_chain_gain = Op(
    "finite_chain_gain",
    "(Tensor psiG, Tensor psiA, Tensor steps) -> Tensor",
    _finite_chain_gain,
    _infer_gain("finite_chain_gain"),
    _finite_gain_samples,
    flops=lambda psiG, psiA, steps: 15.0 * psiG.numel * (psiA.shape[-1] or 1),
)
sides_apply, sides_apply_transposed = (
    Op(
        name,
        "(Tensor V, Tensor G, Tensor A) -> Tensor",
        reference,
        _infer_sides(name, met),
        partial(_side_samples, met == -2),
        flops=_side_flops,
        traits=frozenset({Trait.LINEAR, Trait.BATCHABLE}),
    )
    for name, reference, met in (
        ("sides_apply", _sides_apply, -1),
        ("sides_apply_transposed", _sides_apply_transposed, -2),
    )
)
