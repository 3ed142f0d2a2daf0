"""Empirical Fisher matrices kept as a few pairs of rows: F = sum over j, k of P-weighted u_j u_k^T, u = g (x) a.

Mu et al. 2022 (HyLo). A batch of n pairs is reduced to r, and with them comes P, the r x r matrix with which the kept
pairs stand for all of them: M = (I + P K)^-1 P with K[j, k] = (a_j . a_k)(g_j . g_k), and

    U = (V - sum over j of z_j g_j a_j^T) / lambda,    z = M r,    r_j = g_j^T V a_j,

is the direction. P = I / lambda for pairs that stand for themselves, M then being (K + lambda I)^-1. The
normalisation is in the rows, so that F = sum of u u^T; pairs of zeros fill up. All algebra is in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcurv import sampling
from fxcurv.errors import FxcurvError
from fxcurv.ir.op import Op, Trait
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.rules import accumulator, align, grouped, need, need_rows, need_scalar, need_shape, promote, times
from fxcurv.ir.ops.sample_space import chosen, filled, small_factor
from fxcurv.ir.ops.statistics import ungroup, wide
from fxcurv.ir.types import Mat, Psd, Type

SMALL = 1e-10  # a pair is spanned by the others when this share of its squared norm is left
Kept = tuple[Tensor, Tensor, Tensor]


def _by_group(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs (G, n, i) and (G, n, o) of rows (b, s, G, i) and (b, s, G, o); every position is a pair.

    There is none where one side has no examples: the output of a layer that was not reached, whose input others read.
    """
    a, g = (rows.flatten(0, 1).transpose(0, 1) for rows in align(wide(a), wide(g)))
    return (a, g) if a.shape[1] and g.shape[1] else (a[:, :0], g[:, :0])


def pair_kernel(a: Tensor, g: Tensor) -> Tensor:
    """K[j, k] = (a_j . a_k)(g_j . g_k) in float64 of pairs (.., n, i) and (.., n, o)."""
    a, g = a.to(torch.float64), g.to(torch.float64)
    return (a @ a.mT) * (g @ g.mT)


def _themselves(a: Tensor, g: Tensor, rank: int, damping: Any) -> Kept:
    """Pairs that stand for themselves, with P = I / damping."""
    eye = torch.eye(rank, dtype=torch.float64, device=a.device).expand(a.shape[0], rank, rank)
    lam = torch.as_tensor(damping, dtype=torch.float64, device=a.device)
    return filled(a, rank), filled(g, rank), ungroup(eye / lam)


def _spaced_pairs(a: Tensor, g: Tensor, rank: int, damping: Tensor) -> Kept:
    """(Xa, Xg, P): all pairs where there are at most ``rank``, else evenly spaced ones with the scale of all.

    a: Rows (b, s, G, i), g: Rows (b, s, G, o), every position a pair -> Mat (rank, i), Mat (rank, o) and, in float64,
    Psd (rank, rank), or each with G.
    """
    x, y = _by_group(a, g)
    index = chosen(a.shape[0], a.shape[1], rank, a.device)
    if index is not None and x.shape[1]:
        scale = (x.shape[1] / index.shape[0]) ** 0.5
        x, y = x[:, index], y[:, index] * scale
    return _themselves(x, y, rank, damping)


def _sampled_pairs(
    a: Tensor, g: Tensor, rank: int, damping: Tensor, seed: Tensor, step: Tensor, stream: int, replacement: bool
) -> Kept:
    """(Xa, Xg, P): pairs drawn with probabilities proportional to |a|^2 |g|^2 (KIS), in each group by itself.

    Without replacement, the largest of log p + Gumbel noise; all where there are at most ``rank``, else each counts as
    n / rank pairs. With replacement, ``rank`` draws divided by sqrt(rank p): F is unbiased and its trace exact. The
    noise is a function of (seed, step, stream) and position. Shapes as in ``spaced_pairs``. Mu et al. 2022; Efraimidis
    & Spirakis 2006 for the noise.
    """
    x, y = _by_group(a, g)
    groups, n = x.shape[:2]
    mass = (x.square().sum(-1) * y.square().sum(-1)).to(torch.float64)
    if n == 0 or (n <= rank and not replacement):
        return _themselves(x, y, rank, damping)
    on_host = seed.device.type == "cpu" and not torch.compiler.is_compiling()
    key = [int(seed), int(step)] if on_host else [seed, step]
    columns = rank if replacement else n
    noise = sampling.uniform((*key, stream), groups, columns, device=x.device, dtype=torch.float64)
    if replacement:
        edges = mass.cumsum(-1)
        total = edges[:, -1:]
        index = torch.searchsorted(edges, noise * total, right=True).clamp(max=n - 1)
        share = mass.gather(1, index)
        scale = torch.where(share > 0, total / (rank * torch.where(share > 0, share, 1.0)), 0.0).sqrt()
    else:
        index = (mass.log() - (-noise.log()).log()).topk(rank, dim=-1).indices
        scale = torch.full_like(noise[:, :rank], (n / rank) ** 0.5)
    x, y = (rows.gather(1, index.unsqueeze(-1).expand(-1, -1, rows.shape[2])) for rows in (x, y))
    return _themselves(x, y * scale.unsqueeze(-1).to(y.dtype), rank, damping)


def _sampled_fake(a: Tensor, g: Tensor, rank: int, damping: Tensor, *rest: Any) -> Kept:
    return _spaced_pairs(a, g, rank, damping)


def _interpolated_pairs(a: Tensor, g: Tensor, rank: int, damping: Tensor, by_norm: bool) -> Kept:
    """(Xa, Xg, P): an interpolative decomposition of the kernel of all pairs (KID), in each group by itself.

    The rank pairs S are pivots of a Cholesky factorisation: K = L L^T + E with E zero in the rows and columns S. Pivots
    are those with most left of |a|^2 |g|^2, or, with ``by_norm``, with most at the start (the order of the paper). The
    others are u = sum_j Y_j u_j, Y = K_SS^-1 K_S:, and P = Y (E + damping I)^-1 Y^T. For Y the paper takes least
    squares in columns of K; here it is that of the u themselves, which makes E symmetric and positive, and so
    U^T V > 0. A pivot of which the others leave nothing is a pair of zeros. Shapes as in ``spaced_pairs``. Mu et al.
    2022.
    """
    x, y = _by_group(a, g)
    groups, n = x.shape[:2]
    if n == 0:
        return _themselves(x, y, rank, torch.full_like(torch.as_tensor(damping), float("inf")))
    K = pair_kernel(x, y)
    start = left = K.diagonal(dim1=-2, dim2=-1).clone()
    order = start.argsort(dim=-1, descending=True, stable=True)
    columns = [torch.zeros_like(start)] * rank
    index, live = [], []
    for k in range(min(rank, n)):
        pivot = order[:, k] if by_norm else left.argmax(dim=-1)
        at = pivot.view(groups, 1, 1)
        found, whole = left.gather(1, pivot.unsqueeze(1)), start.gather(1, pivot.unsqueeze(1))
        good = found > SMALL * whole
        lower = torch.stack(columns, -1)
        mine = lower.gather(1, at.expand(-1, 1, rank))
        column = K.gather(2, at.expand(-1, n, 1)).squeeze(-1) - (lower @ mine.mT).squeeze(-1)
        columns[k] = torch.where(good, column / torch.where(good, found, 1.0).sqrt(), 0.0)
        left = (left - columns[k].square()).clamp(min=0.0).scatter(1, pivot.unsqueeze(1), 0.0)
        index.append(pivot)
        live.append(good.squeeze(1))
    lower = torch.stack(columns, -1)
    places, alive = torch.stack(index, 1), torch.stack(live, 1)
    used = places.shape[1]
    corner = lower.gather(1, places.unsqueeze(-1).expand(-1, -1, rank))[..., :used].tril()
    corner = torch.where(
        (alive.unsqueeze(1) & alive.unsqueeze(2)), corner, torch.diag_embed(alive.logical_not().to(K.dtype))
    )
    Y = torch.linalg.solve_triangular(corner.mT, lower[..., :used].mT, upper=True)
    E = K - lower @ lower.mT
    half = torch.linalg.solve_triangular(small_factor((E + E.mT) / 2, damping), Y.mT, upper=False)
    P = F.pad(half.mT @ half, (0, rank - used, 0, rank - used))
    taken = (rows.gather(1, places.unsqueeze(-1).expand(-1, -1, rows.shape[2])) for rows in (x, y))
    first, second = (filled(rows * alive.unsqueeze(-1), rank) for rows in taken)
    return first, second, ungroup(P)


def _infer_pairs(name: str) -> Callable[..., tuple[Type, ...]]:
    def infer(a: Type, g: Type, rank: int, damping: Any, *rest: Any) -> tuple[Type, ...]:
        need_rows(name, ("a", a), ("g", g))
        need_scalar(name, "damping", damping)
        if rank < 1:
            raise FxcurvError(f"op '{name}' keeps {rank} pairs; give it room for one at least.")
        groups, dtype = a.shape[2], accumulator(promote(a, g))
        sides = (Mat(grouped(groups, rank, rows.shape[3]), dtype) for rows in (a, g))
        return (*sides, Psd(grouped(groups, rank, rank), torch.float64))

    return infer


def _pair_samples(*rest: Any) -> Callable[[], Iterator[tuple[Any, ...]]]:
    def samples() -> Iterator[tuple[Any, ...]]:
        draw = Draw(85)
        for b, s, groups, i, o in ((5, 1, 1, 3, 2), (3, 4, 1, 2, 5), (3, 2, 2, 3, 2), (1, 1, 1, 1, 1), (7, 1, 2, 2, 3)):
            yield draw.normal(b, s, groups, i), draw.normal(b, s, groups, o), 4, draw.number(0.3), *rest

    return samples


def _pair_flops(a: Type, g: Type, *rest: Any) -> float:
    return float(a.numel + g.numel)


def _interpolation_flops(a: Type, g: Type, rank: int, *rest: Any) -> float:
    n = times(a.shape[0], a.shape[1]) or 1
    return 2.0 * n * (a.numel + g.numel) + (a.shape[2] or 1) * (n**3 / 3 + 4.0 * n * n * rank)


_KEPT = "(Tensor a, Tensor g, int rank, Tensor damping"
_NOISE = (torch.tensor(3.0, dtype=torch.float64), torch.tensor(11.0, dtype=torch.float64), 2, False)
spaced_pairs, interpolated_pairs, sampled_pairs = (
    Op(
        name, f"{_KEPT}{more}) -> (Tensor, Tensor, Tensor)", run, _infer_pairs(name), _pair_samples(*rest), flops,
        fake=fake,
    )
    for name, more, run, rest, flops, fake in (
        ("spaced_pairs", "", _spaced_pairs, (), _pair_flops, None),
        ("interpolated_pairs", ", bool by_norm", _interpolated_pairs, (False,), _interpolation_flops, None),
        (
            "sampled_pairs", ", Tensor seed, Tensor step, int stream, bool replacement", _sampled_pairs, _NOISE,
            _pair_flops, _sampled_fake,
        ),
    )
)  # fmt: skip


def _pairs_kernel(XA: Sequence[Tensor], XG: Sequence[Tensor], P: Sequence[Tensor]) -> Tensor:
    """M = (I + P K)^-1 P in float64 with K the kernel of all pairs and P block-diagonal: one block for each worker.

    XA, XG, P: what each worker kept, Mat (r_w, i), Mat (r_w, o) and Psd (r_w, r_w), or each with G -> Psd (r, r), r the
    sum of r_w. It equals P - P K (I + P K)^-1 P. Mu et al. 2022, the all-gather of KID and KIS.
    """
    blocks = [p.to(torch.float64) for p in P]
    total, first, padded = sum(p.shape[-1] for p in blocks), 0, []
    for block in blocks:
        before, after = first, total - first - block.shape[-1]
        padded.append(F.pad(block, (before, after, before, after)))
        first += block.shape[-1]
    whole = torch.stack(padded).sum(0)
    system = whole @ pair_kernel(torch.cat(list(XA), -2), torch.cat(list(XG), -2))
    system = system + torch.eye(total, dtype=system.dtype, device=system.device)
    M = torch.linalg.solve_ex(system, whole)[0]
    return ((M + M.mT) / 2).contiguous()


def _infer_kernel(XA: Sequence[Type], XG: Sequence[Type], P: Sequence[Type]) -> Type:
    for a, g, p in zip(XA, XG, P, strict=True):
        _need_pairs("pairs_kernel", a, g, p)
    return Psd((*P[0].batch, *(sum(p.shape[-1] or 0 for p in P),) * 2), torch.float64)


def _need_pairs(op: str, XA: Type, XG: Type, M: Type) -> None:
    need_shape(op, "XA", need(op, "XA", XA, Mat), (*M.batch, M.shape[-1], XA.shape[-1]))
    need_shape(op, "XG", need(op, "XG", XG, Mat), (*M.batch, M.shape[-1], XG.shape[-1]))


def _kernel_samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(86)
    for groups, sizes, i, o in (((), (3,), 4, 2), ((), (3, 2), 4, 2), ((2,), (1, 3), 2, 3)):
        yield tuple([make(m) for m in sizes] for make in (
            lambda m, s=groups, d=i: draw.normal(*s, m, d),
            lambda m, s=groups, d=o: draw.normal(*s, m, d),
            lambda m, s=groups: draw.psd(m, *s),
        ))  # fmt: skip


pairs_kernel = Op(
    "pairs_kernel",
    "(Tensor[] XA, Tensor[] XG, Tensor[] P) -> Tensor",
    _pairs_kernel,
    _infer_kernel,
    _kernel_samples,
    flops=lambda XA, XG, P: 5.0 * sum(p.shape[-1] or 1 for p in P) ** 3,
)


def _pairs_solve(V: Tensor, XA: Tensor, XG: Tensor, M: Tensor, damping: Tensor) -> Tensor:
    """U = (V - XG^T diag(z) XA) / damping, z = M r, r_j = g_j^T V a_j: of the type of V, computed in float64.

    V: Mat (o, i), XA: Mat (r, i), XG: Mat (r, o), M: Psd (r, r), or each with G. Mu et al. 2022, equation of SNGD.
    """
    wide_V, a, g, M = (x.to(torch.float64) for x in (V, XA, XG, M))
    along = ((g @ wide_V) * a).sum(dim=-1, keepdim=True)
    return ((wide_V - g.mT @ ((M @ along) * a)) / torch.as_tensor(damping)).to(V.dtype).contiguous()


def _infer_solve(V: Type, XA: Type, XG: Type, M: Type, damping: Any) -> Type:
    _need_pairs("pairs_solve", XA, XG, M)
    need_shape("pairs_solve", "V", need("pairs_solve", "V", V, Mat), (*M.batch, XG.shape[-1], XA.shape[-1]))
    need_scalar("pairs_solve", "damping", damping)
    return V


def _solve_samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(87)
    for groups, r, i, o in (((), 3, 4, 2), ((), 1, 1, 1), ((2,), 3, 2, 3)):
        a, g = draw.normal(*groups, r, i), draw.normal(*groups, r, o)
        yield draw.normal(*groups, o, i), a, g, draw.psd(r, *groups), draw.number(0.3)


def _reweighted(XA: Tensor, XG: Tensor, M: Tensor, scale: Tensor) -> Tensor:
    """scale * XG^T diag(w) XA in float64 with w = M 1: the direction for V = scale * XG^T XA, without cancellation.

    For M = (K + damping I)^-1, w solves (K + damping I) w = 1: the gradient with every example weighted anew.
    """
    weights = M.to(torch.float64).sum(dim=-1, keepdim=True)
    return (XG.to(torch.float64).mT @ (weights * XA.to(torch.float64)) * torch.as_tensor(scale)).contiguous()


def _infer_reweighted(XA: Type, XG: Type, M: Type, scale: Any) -> Type:
    _need_pairs("reweighted", XA, XG, M)
    need_scalar("reweighted", "scale", scale)
    return Mat((*M.batch, XG.shape[-1], XA.shape[-1]), torch.float64)


pairs_solve = Op(
    "pairs_solve", "(Tensor V, Tensor XA, Tensor XG, Tensor M, Tensor damping) -> Tensor", _pairs_solve, _infer_solve,
    _solve_samples, lambda V, XA, XG, M, c: 4.0 * V.numel * (M.shape[-1] or 1), frozenset({Trait.LINEAR}),
)  # fmt: skip
reweighted = Op(
    "reweighted", "(Tensor XA, Tensor XG, Tensor M, Tensor scale) -> Tensor", _reweighted, _infer_reweighted,
    lambda: ((a, g, M, c) for _, a, g, M, c in _solve_samples()),
    lambda XA, XG, M, c: 2.0 * XG.numel * (XA.shape[-1] or 1),
)  # fmt: skip
