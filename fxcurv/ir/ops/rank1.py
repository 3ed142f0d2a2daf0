"""Curvature from vectors: inverses that a rank-one term updates, and inverses of a rank-one term plus a multiple of I.

V is the normal-form gradient, (o, i) or (G, o, i); a vector has its last dimension less, (i,) or (G, i).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import Op, Trait
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.rules import accumulator, align, need, need_flag, need_scalar, need_shape, promote, spread
from fxcurv.ir.types import Diag, Mat, Psd, Type, Vec

STACKABLE = frozenset({Trait.BATCHABLE})
LINEAR = STACKABLE | {Trait.LINEAR}


def _rank1_update(AI: Tensor, v: Tensor, gamma: Tensor, printed: bool = False) -> Tensor:
    """The inverse of gamma A + (1 - gamma) v v^T from AI = A^-1 and v, by Sherman-Morrison: O(d^2), exactly symmetric.

    (AI - c u u^T) / gamma with u = AI v, c = (1 - gamma) / (gamma + (1 - gamma) v^T u). With ``printed=True`` what
    Mozaffari et al. 2023 (MKOR) print: gamma AI + (1 - gamma) / (gamma^2 (1 + gamma (1 - gamma) v^T u)) u u^T, which
    stays positive definite for any sequence of v but is no inverse: along v it grows where the exact one shrinks.
    AI: Psd (d, d) or (G, d, d); v: Vec (d,) or (G, d); gamma: number, Scalar or one a group, weight of the OLD factor.
    A Diag of v's shape is the inverse of a diagonal factor: every coordinate is updated as a matrix of one row.
    """
    if AI.ndim == v.ndim:
        return _rank1_update(AI[..., None, None], v[..., None], gamma, printed)[..., 0, 0]
    dtype = accumulator(AI.dtype)
    inverse, vector = AI.to(dtype), v.to(dtype)
    u = (inverse @ vector.unsqueeze(-1)).squeeze(-1)
    quadratic = (vector * u).sum(dim=-1)
    old = spread(gamma, quadratic)
    new = 1.0 - old
    if printed:
        kept, taken = old, new / (old**2 * (1.0 + old * new * quadratic))
    else:
        kept, taken = 1.0 / old, -new / (old * (old + new * quadratic))
    outer = u.unsqueeze(-1) * u.unsqueeze(-2)  # scaled as a whole: u_i u_j = u_j u_i to the last bit
    return (spread(kept, inverse) * inverse + spread(taken, inverse) * outer).to(AI.dtype)


def _infer_rank1_update(AI: Type, v: Type, gamma: Any, printed: bool = False) -> Type:
    need("rank1_update", "AI", AI, Psd, Diag)
    size = AI.shape if isinstance(AI, Diag) else AI.shape[:-1]
    need_shape("rank1_update", "v", need("rank1_update", "v", v, Vec), size)
    need_scalar("rank1_update", "gamma", gamma, AI.batch)
    return type(AI)(AI.shape, AI.dtype)


def _update_samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(41)
    for d, groups in ((1, ()), (5, ()), (17, ()), (3, (4,))):
        for printed in (False, True):
            yield draw.psd(d, *groups), draw.normal(*groups, d), draw.number(0.6), printed
    yield draw.psd(3, 4), draw.normal(4, 3), draw.number(0.5, 4)
    yield draw.positive(5), draw.normal(5), draw.number(0.6)
    yield draw.positive(3, 3), draw.normal(3, 3), draw.number(0.5, 3), True


rank1_update = Op(
    "rank1_update",
    "(Tensor AI, Tensor v, Tensor gamma, bool printed=False) -> Tensor",
    _rank1_update,
    _infer_rank1_update,
    _update_samples,
    flops=lambda AI, v, gamma, printed=False: 6 * AI.numel,
    traits=STACKABLE,
)


def _stabilize(AI: Tensor, limit: Tensor, zeta: Tensor, diagonal: bool = False) -> Tensor:
    """zeta AI + (1 - zeta) I where the largest |entry| of AI is above ``limit``, else AI (MKOR's stabilizer).

    AI: Psd (d, d) or (G, d, d), each matrix for itself; limit, zeta: numbers, Scalars or one a group.
    ``diagonal=True`` says that AI is a Diag (d,) or (G, d).
    """
    dtype = accumulator(AI.dtype)
    wide = AI.to(dtype)
    largest = wide.abs().amax(dim=-1 if diagonal else (-2, -1))
    ones = torch.ones(AI.shape[-1], dtype=dtype, device=AI.device)
    identity = ones if diagonal else torch.diag(ones)
    weight = torch.where(largest > spread(limit, largest), spread(zeta, largest), torch.ones_like(largest))
    return (spread(weight, wide) * wide + spread(1.0 - weight, wide) * identity).to(AI.dtype)


def _infer_stabilize(AI: Type, limit: Any, zeta: Any, diagonal: bool = False) -> Type:
    need_flag("stabilize", "AI", AI, diagonal)
    if isinstance(AI, Diag) and not diagonal:
        raise FxcurvError(f"op 'stabilize' would read {AI} as a matrix; pass diagonal=True with it.")
    need_scalar("stabilize", "limit", limit, AI.batch)
    need_scalar("stabilize", "zeta", zeta, AI.batch)
    return type(AI)(AI.shape, AI.dtype)


def _stabilize_samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(42)
    for d, groups, limit in ((1, (), 0.0), (5, (), 0.0), (5, (), 1e9), (3, (4,), 1.0)):
        yield draw.psd(d, *groups), draw.number(limit), draw.number(0.7)
        yield draw.positive(*groups, d), draw.number(limit), draw.number(0.7), True


stabilize = Op(
    "stabilize",
    "(Tensor AI, Tensor limit, Tensor zeta, bool diagonal=False) -> Tensor",
    _stabilize,
    _infer_stabilize,
    _stabilize_samples,
    flops=lambda AI, limit, zeta, diagonal=False: 4 * AI.numel,
    traits=STACKABLE,
)


def _rank1_apply(V: Tensor, a: Tensor, g: Tensor, damping: Tensor) -> Tensor:
    """((g g^T) (x) (a a^T) + damping I)^-1 vec(V): V / damping less its part along g a^T, in V's shape.

    (V - (g^T V a) / (damping + |a|^2 |g|^2) g a^T) / damping: Eva (Zhang, Shi & Li 2023), a and g the mean input and
    output gradient; with the row and column means of the gradient in their place Eva-s for a matrix.
    V: Mat (o, i) or (G, o, i); a: Vec (i,), g: Vec (o,), each with a leading G; damping: number, Scalar or one a group.
    """
    V, a, g = align(V, a, g)
    wide = accumulator(V.dtype)
    X, x, y = V.to(wide), a.to(wide), g.to(wide)
    along = (y * (X @ x.unsqueeze(-1)).squeeze(-1)).sum(dim=-1)
    share = along / (spread(damping, along) + x.square().sum(dim=-1) * y.square().sum(dim=-1))
    outer = y.unsqueeze(-1) * x.unsqueeze(-2)
    return ((X - spread(share, X) * outer) / spread(damping, X)).to(V.dtype)


def _infer_rank1_apply(V: Type, a: Type, g: Type, damping: Any) -> Type:
    need("rank1_apply", "V", V, Mat)
    need_shape("rank1_apply", "a", need("rank1_apply", "a", a, Vec), (*V.batch, V.shape[-1]))
    need_shape("rank1_apply", "g", need("rank1_apply", "g", g, Vec), V.shape[:-1])
    need_scalar("rank1_apply", "damping", damping, V.batch)
    return Mat(V.shape, promote(V, a, g))


def _rank1_right_apply(V: Tensor, a: Tensor, damping: Tensor) -> Tensor:
    """V (a a^T + damping I)^-1: (V - (V a) a^T / (damping + |a|^2)) / damping, Eva-f (Zhang, Shi & Li 2023).

    V: Mat (o, i) or (G, o, i); a: Vec (i,) or (G, i), the mean input; damping: number, Scalar or one a group.
    """
    V, a = align(V, a)
    wide = accumulator(V.dtype)
    X, x = V.to(wide), a.to(wide)
    norm = x.square().sum(dim=-1)
    share = 1.0 / (spread(damping, norm) + norm)
    along = X @ x.unsqueeze(-1)
    return ((X - spread(share, X) * (along * x.unsqueeze(-2))) / spread(damping, X)).to(V.dtype)


def _infer_rank1_right_apply(V: Type, a: Type, damping: Any) -> Type:
    need("rank1_right_apply", "V", V, Mat)
    need_shape("rank1_right_apply", "a", need("rank1_right_apply", "a", a, Vec), (*V.batch, V.shape[-1]))
    need_scalar("rank1_right_apply", "damping", damping, V.batch)
    return Mat(V.shape, promote(V, a))


def _apply_samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(43)
    for groups, o, i in (((), 3, 5), ((), 1, 1), ((), 7, 2), ((4,), 3, 2)):
        for damping in (draw.number(0.3), draw.number(0.3, *groups)):
            yield draw.normal(*groups, o, i), draw.normal(*groups, i), draw.normal(*groups, o), damping


rank1_apply = Op(
    "rank1_apply",
    "(Tensor V, Tensor a, Tensor g, Tensor damping) -> Tensor",
    _rank1_apply,
    _infer_rank1_apply,
    _apply_samples,
    flops=lambda V, a, g, damping: 6 * V.numel,
    traits=LINEAR,
)
rank1_right_apply = Op(
    "rank1_right_apply",
    "(Tensor V, Tensor a, Tensor damping) -> Tensor",
    _rank1_right_apply,
    _infer_rank1_right_apply,
    lambda: ((V, a, damping) for V, a, _, damping in _apply_samples()),
    flops=lambda V, a, damping: 6 * V.numel,
    traits=LINEAR,
)
