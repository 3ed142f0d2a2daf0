"""Every op agrees in float64 with its formula, written out independently in numpy and loops.

A new op needs one line in ``ORACLES``.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

import fxcurv.ir.ops  # noqa: F401  (registers the ops)
from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS, Op, Trait
from fxcurv.ir.ops import moments
from fxcurv.ir.types import Mat

PURE = {
    name: op
    for name, op in OPS.items()
    if op.reference.__module__.startswith("fxcurv.ir.ops.") and Trait.ORACLE not in op.traits
}


def sample(op: Op, index: int) -> tuple[Any, ...]:
    return list(op.samples())[index]


def as_numpy(operand: Any) -> Any:
    if isinstance(operand, torch.Tensor):
        return operand.numpy()
    return [as_numpy(item) for item in operand] if isinstance(operand, (list, tuple)) else operand


def by_group(result: np.ndarray) -> np.ndarray:
    return result[0] if result.shape[0] == 1 else result


def full(M: np.ndarray, matrix: bool) -> np.ndarray:
    """A (batch of) dense matrix from a matrix or a diagonal."""
    return M if matrix else M[..., None] * np.eye(M.shape[-1])


def example_gradients(a: np.ndarray, g: np.ndarray) -> np.ndarray:
    b, s, groups, i = a.shape
    out = np.zeros((b, groups, g.shape[3], i))
    for n, t, k in product(range(b), range(s), range(groups)):
        out[n, k] += np.outer(g[n, t, k], a[n, t, k])
    return out


def oracle_loss_averages(loss: float, k: float, fast: float, slow: float, quick: float, lasting: float) -> np.ndarray:
    if not math.isfinite(loss):
        return np.array([k, fast, slow])
    old = [min(1 - 1 / (k + 1), weight) for weight in (quick, lasting)]
    return np.array([k + 1, old[0] * fast + (1 - old[0]) * loss, old[1] * slow + (1 - old[1]) * loss])


def oracle_gram(rows: np.ndarray) -> np.ndarray:
    out = np.zeros((rows.shape[2], rows.shape[3], rows.shape[3]))
    for n, t, k in product(*map(range, rows.shape[:3])):
        out[k] += np.outer(rows[n, t, k], rows[n, t, k])
    return by_group(out)


def oracle_second_moment(a: np.ndarray, g: np.ndarray, QA: np.ndarray, QG: np.ndarray) -> np.ndarray:
    groups = a.shape[2]
    QA, QG = (
        full(Q, Q.ndim == (3 if groups > 1 else 2)).reshape(groups, d, d)
        for Q, d in ((QA, a.shape[3]), (QG, g.shape[3]))
    )
    E = example_gradients(a, g)
    return by_group(np.stack([sum((QG[k].T @ E[n, k] @ QA[k]) ** 2 for n in range(len(E))) for k in range(groups)]))


def oracle_grad_gram(a: np.ndarray, g: np.ndarray) -> np.ndarray:
    E = example_gradients(a, g)
    flat = E.reshape(*E.shape[:2], -1)
    return by_group(np.stack([sum(np.outer(v[k], v[k]) for v in flat) for k in range(a.shape[2])]))


def is_matrix(A: np.ndarray, flag: bool) -> bool:
    return A.ndim > 1 and A.shape[-1] == A.shape[-2] and not flag


def lead(s: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.asarray(s).reshape(np.shape(s) + (1,) * (x.ndim - np.ndim(s)))


def diagonal_of(A: np.ndarray, flag: bool) -> np.ndarray:
    return np.einsum("...ii->...i", A) if is_matrix(A, flag) else A


def oracle_inverse(A: np.ndarray, damping: np.ndarray, flag: bool = False) -> np.ndarray:
    if not is_matrix(A, flag):
        return 1 / (A + lead(damping, A))
    return np.linalg.inv(A + lead(damping, A) * np.eye(A.shape[-1]))


def oracle_inverse_root(A: np.ndarray, root: float, eps: np.ndarray, flag: bool = False) -> np.ndarray:
    dense = full(A, is_matrix(A, flag))
    dense = dense + lead(eps, dense) * np.eye(A.shape[-1])
    U, s, Vt = np.linalg.svd(dense)  # the samples are PSD, so singular values are eigenvalues
    out = (U * s[..., None, :] ** (-1 / root)) @ Vt
    return out if is_matrix(A, flag) else np.einsum("...ii->...i", out)


def oracle_pi(A: np.ndarray, G: np.ndarray, flag_a: bool = False, flag_g: bool = False) -> np.ndarray:
    a, g = diagonal_of(A, flag_a).mean(-1), diagonal_of(G, flag_g).mean(-1)
    return np.vectorize(lambda x, y: math.sqrt(x / y) if x > 0 and y > 0 else 1.0)(a, g)


def kron(V: np.ndarray, L: np.ndarray, R: np.ndarray) -> np.ndarray:
    """(L (x) R) vec(V), vec row-major, that is L V R^T, through the explicit Kronecker product in each group."""
    L, R = full(L, L.ndim == V.ndim), full(R, R.ndim == V.ndim)
    if V.ndim == 2:
        return (np.kron(L, R) @ V.reshape(-1)).reshape(len(L), len(R))
    return np.stack([kron(v, left, right) for v, left, right in zip(V, L, R, strict=True)])


def t(M: np.ndarray, V: np.ndarray) -> np.ndarray:
    return np.swapaxes(M, -1, -2) if M.ndim == V.ndim else M


def oracle_unit_apply(V: np.ndarray, M: np.ndarray) -> np.ndarray:
    M = full(M, M.ndim == V.ndim)
    if V.ndim == 2:
        return (M @ V.reshape(-1)).reshape(V.shape)
    return np.stack([oracle_unit_apply(v, m) for v, m in zip(V, M, strict=True)])


def unfold(T: np.ndarray, mode: int) -> np.ndarray:
    return np.stack([np.take(T, j, axis=mode).reshape(-1) for j in range(T.shape[mode])])


def oracle_mode_apply(T: np.ndarray, M: np.ndarray, mode: int) -> np.ndarray:
    M = full(M, M.ndim == 2)
    out = np.zeros_like(T)
    for j, k in product(range(len(M)), repeat=2):
        index = [slice(None)] * T.ndim
        index[mode] = j
        out[tuple(index)] += M[j, k] * np.take(T, k, axis=mode)
    return out


def oracle_matricize(W: np.ndarray, perm: list[int], shape: list[int]) -> np.ndarray:
    flat = [
        W[tuple(index[perm.index(axis)] for axis in range(W.ndim))] for index in np.ndindex(*(W.shape[p] for p in perm))
    ]
    return np.array(flat).reshape(shape)


def oracle_tensorize(M: np.ndarray, perm: list[int], shape: list[int]) -> np.ndarray:
    out = np.zeros(shape)
    for value, index in zip(M.reshape(-1), np.ndindex(*(shape[p] for p in perm)), strict=True):
        out[tuple(index[perm.index(axis)] for axis in range(len(shape)))] = value
    return out


def oracle_clip(dots: list[np.ndarray], lr: float, kappa: float) -> float:
    total = sum(float(x) for x in dots if math.isfinite(x))
    return 1.0 if total <= 0 or lr == 0 else min(1.0, math.sqrt(kappa / (lr**2 * total)))


def oracle_match(wanted: list[np.ndarray], given: list[np.ndarray]) -> float:
    top, bottom = (sum(float(x) for x in values if math.isfinite(x)) for values in (wanted, given))
    return math.sqrt(top / bottom) if bottom > 0 else 1.0


def oracle_block_gram(rows: np.ndarray, size: int) -> np.ndarray:
    d, groups = rows.shape[3], rows.shape[2]
    n, whole = -(-d // size), oracle_gram(rows).reshape(groups, d, d)
    out = np.zeros((groups, n, size, size))
    for k, i, j in product(range(groups), range(d), range(d)):
        if i // size == j // size:
            out[k, i // size, i % size, j % size] = whole[k, i, j]
    return by_group(out)


def block_diagonal(M: np.ndarray, V: np.ndarray, d: int) -> np.ndarray:
    """A side of blocks as the matrix that it stands for; any other as it is."""
    if M.ndim <= V.ndim:
        return M
    if M.ndim == 4:
        return np.stack([block_diagonal(m, v, d) for m, v in zip(M, V, strict=True)])
    out = np.zeros((len(M) * M.shape[-1],) * 2)
    for k, block in enumerate(M):
        out[k * len(block) : (k + 1) * len(block), k * len(block) : (k + 1) * len(block)] = block
    return out[:d, :d]


def oracle_block_apply(V: np.ndarray, G: np.ndarray, A: np.ndarray) -> np.ndarray:
    return kron(V, block_diagonal(G, V, V.shape[-2]), block_diagonal(A, V, V.shape[-1]))


def oracle_block_trace(factors: list[np.ndarray], groups: int) -> float:
    def trace(f: np.ndarray) -> float:
        return float(f.sum() if f.ndim == 1 else np.trace(f, axis1=-2, axis2=-1).sum())

    return sum(math.prod(trace(f[k] if groups > 1 else f) for f in factors) for k in range(groups))


def oracle_trace_rule(new: float, old: float, over: float, n: float, move: float, settle: float) -> np.ndarray:
    moved = math.inf if old == 0 else abs(new - old) / old
    take = n > 0 and not over and moved > move
    return np.array([take, new if take else old, bool(over) or (n > 0 and moved < settle)], dtype=float)


def oracle_weighted(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    out = np.zeros((x.shape[2], x.shape[3], x.shape[3]))
    for n, s, k in product(*map(range, x.shape[:3])):
        out[k] += (w[n, s, k] ** 2).sum() * np.outer(x[n, s, k], x[n, s, k])
    return by_group(out)


def oracle_masked(x: np.ndarray, y: np.ndarray, damping: np.ndarray, dims: int) -> np.ndarray:
    top = y.max(axis=tuple(range(-dims, 0)), keepdims=True) + 0 * y
    kept, damping = y > 1e-10 * top, lead(damping, y) + 0 * y
    entries = zip(*(v.flat for v in (x, y, damping, kept)), strict=True)
    return np.array([p / (q + c) if k else 0.0 for p, q, c, k in entries]).reshape(x.shape)


def oracle_recompose(values: np.ndarray, Q: np.ndarray) -> np.ndarray:
    if Q.ndim == values.ndim:
        return values
    return Q @ (values[..., None] * np.swapaxes(Q, -1, -2))


def oracle_ema(old: np.ndarray, new: np.ndarray, weight: np.ndarray) -> np.ndarray:
    w = np.broadcast_to(lead(weight, old), old.shape)
    return np.array(
        [o if v == 1 else v * o + (1 - v) * n for o, n, v in zip(old.flat, new.flat, w.flat, strict=True)]
    ).reshape(old.shape)


def aligned(function: Any) -> Any:
    return lambda x, y: function(lead(x, y) if x.ndim < y.ndim else x, lead(y, x) if y.ndim < x.ndim else y)


def oracle_lagged_gram(rows: np.ndarray) -> np.ndarray:
    out = np.zeros((rows.shape[2], rows.shape[3], rows.shape[3]))
    for n, step, k in product(range(rows.shape[0]), range(rows.shape[1] - 1), range(rows.shape[2])):
        out[k] += np.outer(rows[n, step + 1, k], rows[n, step, k])
    return by_group(out)


def oracle_finite_gain(G: np.ndarray, A: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """The double sum over two times of one sequence, T = ``steps`` a whole number."""
    x, times = G[..., :, None] * A[..., None, :], range(int(steps))
    return steps / sum(x ** abs(one - two) for one, two in product(times, times))


def oracle_row_product(g: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.einsum("bsgo,bsgi->oi", g, x)


def oracle_sides_rows(
    g: np.ndarray, x: np.ndarray, v: list[np.ndarray], left: list[np.ndarray], right: np.ndarray
) -> np.ndarray:
    V = np.concatenate([oracle_row_product(g, x), *(column[:, None] for column in v)], 1)
    return np.einsum("ko,oi,ij->kj", left[0].T if left else np.eye(len(V)), V, right)


def triangle_place(d: int, i: int, j: int) -> int:
    """Where rectangular full packed form keeps the entry (i, j), i >= j, of a d x d matrix."""
    k, odd = (d + 1) // 2, d % 2
    if i < k:
        return (i + 1 - odd) * k + j
    return (j - k) * k + i - k + odd if j >= k else (k + 1 - odd) * k + (i - k) * k + j


def oracle_pack_triangle(A: np.ndarray) -> np.ndarray:
    d = A.shape[-1]
    out = np.full((*A.shape[:-2], d * (d + 1) // 2), np.nan)
    for i, j in np.ndindex(d, d):
        if i >= j:
            out[..., triangle_place(d, i, j)] = A[..., i, j]
    return out


def oracle_unpack_triangle(P: np.ndarray) -> np.ndarray:
    d = next(d for d in range(P.shape[-1] + 1) if d * (d + 1) // 2 == P.shape[-1])
    out = np.zeros((*P.shape[:-1], d, d))
    for i, j in np.ndindex(d, d):
        out[..., i, j] = P[..., triangle_place(d, max(i, j), min(i, j))]
    return out


def oracle_two_term_gain(G: np.ndarray, A: np.ndarray, floor: np.ndarray, sign: int, safeguard: str) -> np.ndarray:
    def one(x: float) -> float:
        if safeguard == "absolute":
            return 1 + abs(x)
        return 1 + x if 1 + x >= floor else floor if safeguard == "floor" else 1.0

    return 1 / np.vectorize(one)(sign * np.einsum("...o,...i->...oi", G, A))


def oracle_decayed(k: np.ndarray, start: np.ndarray, end: np.ndarray, steps: int, warmup: int) -> float:
    value = float(start)
    for _ in range(max(0, int(k) - warmup)):
        value -= 2 * math.log10(start / end) / steps * (value - float(end))
    return value


def oracle_channel_gram(rows: np.ndarray, taps: int) -> np.ndarray:
    channels = rows.shape[3] // taps
    out = np.zeros((rows.shape[2], channels + 1, channels + 1))
    for n, s, k, tap in product(*map(range, rows.shape[:3]), range(taps)):
        p = np.append(rows[n, s, k, : channels * taps].reshape(channels, taps)[:, tap], 1.0)
        out[k] += np.outer(p, p) / taps
    return by_group(out)


ORACLES: dict[str, Any] = {
    "channel_gram": oracle_channel_gram,
    "patch_diagonal": lambda M, taps, one: np.concatenate(
        [np.repeat(np.einsum("...ii->...i", M)[..., :-1], taps, -1), M[..., -1, -1:][..., :one]], -1
    ),
    "every_position": lambda r, step: np.stack([r[:, s] for s in range(0, r.shape[1], step)], 1),
    "mean_positions": lambda r: r.sum(1, keepdims=True) / r.shape[1],
    "sum_positions": lambda r: sum(r[:, s : s + 1] for s in range(r.shape[1])),
    "gram": oracle_gram,
    "diag_gram": lambda r: np.einsum("...ii->...i", oracle_gram(r)),
    "row_sum": lambda r: by_group(np.einsum("bsgd->gd", r)),
    "count": lambda r: r.shape[0] * r.shape[1],
    "second_moment": oracle_second_moment,
    "block_gram": oracle_block_gram,
    "block_apply": oracle_block_apply,
    "block_trace": oracle_block_trace,
    "trace_rule": oracle_trace_rule,
    "grad_square": lambda a, g: by_group((example_gradients(a, g) ** 2).sum(0)),
    "grad_gram": oracle_grad_gram,
    "lagged_gram": oracle_lagged_gram,
    "examples": lambda r: r.shape[0],
    "subset_examples": lambda r, share: r[np.arange(math.ceil(share * len(r))) * len(r) // math.ceil(share * len(r))],
    "two_term_gain": oracle_two_term_gain,
    "chain_gain": lambda G, A: 1 / (1 - G[..., :, None] * A[..., None, :]),
    "finite_chain_gain": oracle_finite_gain,
    "explained": lambda P, C: np.einsum("...ij,...kj->...ik", P, C),
    "sides_apply": lambda V, G, A: kron(V, G, A),
    "sides_apply_transposed": lambda V, G, A: kron(V, t(G, V), t(A, V)),
    "mean": lambda x, n: x / lead(np.maximum(n, 1), x),
    "ema_weight": lambda k, n, rho: min(k / (k + 1), rho) if n > 0 else 1.0,
    "tick": lambda k, n: k + 1 if n > 0 else k,
    "ema": oracle_ema,
    "moving": oracle_ema,
    "ema_scaled": lambda old, x, c, w: oracle_ema(old, x * lead(c, x), w),
    "ema_mean": lambda old, x, n, w: oracle_ema(old, x / lead(np.maximum(n, 1), x), w),
    "gram_ema_mean": lambda old, r, n, w: oracle_ema(old, oracle_gram(r) / max(float(n), 1.0), w),
    "gram_ema_scaled": lambda old, r, c, w: oracle_ema(old, oracle_gram(r) * float(c), w),
    "diagonal": lambda A: diagonal_of(A, False),
    "pack_triangle": oracle_pack_triangle,
    "unpack_triangle": oracle_unpack_triangle,
    "bias_correct": lambda x, beta, k: x / (1 - beta**k) if k else x,
    "add": aligned(np.add),
    "sub": aligned(np.subtract),
    "mul": aligned(np.multiply),
    "div": aligned(np.divide),
    "square": lambda x: x * x,
    "sqrt": np.sqrt,
    "neg": lambda x: 0 - x,
    "mean_diagonal": lambda A, flag=False: diagonal_of(A, flag).sum(-1) / A.shape[-1],
    "bias_factor": lambda beta, k: 1.0 - beta**k if k else 1.0,
    "pi_split": oracle_pi,
    "inverse": oracle_inverse,
    "inverse_root": oracle_inverse_root,
    "outer": lambda g, a: np.einsum("...o,...i->...oi", g, a),
    "kron_apply": lambda V, G, A: kron(V, G, A),  # A is symmetric
    "right_apply": lambda V, A: kron(V, np.ones(V.shape[:-1]), A),
    "rotate": lambda V, QG, QA: kron(V, t(QG, V), t(QA, V)),
    "rotate_back": lambda V, QG, QA: kron(V, QG, QA),
    "unit_apply": oracle_unit_apply,
    "mode_gram": lambda T, m: unfold(T, m) @ unfold(T, m).T,
    "mode_diag": lambda T, m: np.array([(row**2).sum() for row in unfold(T, m)]),
    "mode_apply": oracle_mode_apply,
    "row_product": oracle_row_product,
    "sides_rows": oracle_sides_rows,
    "matricize": oracle_matricize,
    "tensorize": oracle_tensorize,
    "append_column": lambda M, v: np.concatenate([M, v.reshape(M.shape[:-1])[..., None]], -1),
    "border": lambda A: np.pad(A, [(0, 0)] * (A.ndim - 2) + [(0, 1)] * min(A.ndim, 2)),
    "weight_columns": lambda M: np.delete(M, -1, axis=-1),
    "last_column": lambda M: np.take(M, -1, axis=-1).ravel(),
    "dot": lambda x, y: sum(float(p) * float(q) for p, q in zip(x.flat, y.flat, strict=True)),
    "norm": lambda x: math.sqrt(sum(float(p) ** 2 for p in x.flat)),
    "clip_kl": oracle_clip,
    "match_norm": oracle_match,
    "weighted_gram": oracle_weighted,
    "weighted_diag_gram": lambda x, w: np.einsum("...ii->...i", oracle_weighted(x, w)),
    "entries_mean": lambda x, dims: x.mean(tuple(range(-dims, 0))),
    "at_least": lambda x, floor: np.where(x > lead(floor, x), x, lead(floor, x)),
    "or_one": np.vectorize(lambda x: x if 0 < x < math.inf else 1.0),
    "masked_divide": oracle_masked,
    "recompose": oracle_recompose,
    "largest": lambda xs: max(0.0, *(float(v) for x in xs for v in x.flat if math.isfinite(v))),
    "finite": lambda xs: all(np.isfinite(x).all() for x in xs),
    "scale": lambda x, c: x * lead(c, x),
    "copy": lambda x: x,
    "one_like": lambda x: x * 0 + 1,
    "safe_ratio": np.vectorize(lambda p, q: p / q if q > 0 else 0.0),
    "damped_divide": lambda x, y, damping: x / (y + damping),
    "power": lambda x, exponent: np.exp(exponent * np.log(x)),
    "trailing_mean": lambda x, dims: x * 0 + x.mean(tuple(range(-dims, 0)), keepdims=True),
    "pack": lambda xs: np.concatenate([x.ravel() for x in xs]),
    "stack": lambda xs: np.array(list(xs)),
    "unstack": lambda x: np.array([x[i] for i in range(len(x))]),
    "dot_each": lambda x, y: np.array([(p * q).sum() for p, q in zip(x, y, strict=True)]),
    "finite_each": lambda xs: np.array([all(np.isfinite(x[i]).all() for x in xs) for i in range(len(xs[0]))]),
    "last_column_each": lambda M: np.array([np.take(m, -1, axis=-1).ravel() for m in M]),
    "loss_averages": lambda *numbers: oracle_loss_averages(*map(float, numbers)),
    "loss_rule": lambda fast, slow, best, over, k, below, after: np.array(
        [max(best, slow - fast), 1.0 if over or (k >= after and slow - fast < below * max(best, slow - fast)) else 0.0]
    ),
    "mode_mean": lambda T, m: np.array([row.mean() for row in unfold(T, m)]),
    "outer_all": lambda vs: np.array([math.prod(values) for values in product(*vs)]),
    "mode_gram_each": lambda T, m: np.array([unfold(x, m) @ unfold(x, m).T for x in T]),
    "mode_diag_each": lambda T, m: np.array([(unfold(x, m) ** 2).sum(1) for x in T]),
    "mode_apply_each": lambda T, M, m: np.array([oracle_mode_apply(x, y, m) for x, y in zip(T, M, strict=True)]),
    "push_rows": lambda old, new, w: (
        old if w == 1 else np.concatenate([math.sqrt(1 - w) * new, math.sqrt(w) * old], -2)[..., : old.shape[-2], :]
    ),
    "factor_diagonal": lambda X: np.einsum("...md,...md->...d", X, X),
    "damped_rows": lambda X, c: X @ np.linalg.inv(t(X, X) @ X + lead(c, X) * np.eye(X.shape[-1])),
    "rows_between": lambda G, A, c: c * np.einsum("...mo,...mi->...oi", G, A),
    "unexplained": lambda V, G, A, c: (lambda rest: rest * (np.abs(rest).max() > 1e-9))(
        V - c * np.einsum("...mo,...mi->...oi", G, A)
    ),
    "pairs_solve": lambda V, A, G, M, c: (
        (V - np.einsum("...jo,...jk,...kp,...kq,...pq,...ji->...oi", G, M, G, A, V, A)) / c
    ),
    "reweighted": lambda A, G, M, c: c * np.einsum("...jo,...jk,...ji->...oi", G, M, A),
    "either": lambda flag, x, y: x if flag == 1 else y,
    "within_steps": lambda step, a, b, c: float(step) in (*range(a), *range(b + 1, c + 1)),
    "decayed": oracle_decayed,
    "pull_back": lambda G, W, S, n: (W.T @ full(G, G.ndim == 2) @ W * S)[:n, :n],
    "unpack": lambda v, offset, shape: np.array([v[offset + k] for k in range(math.prod(shape))]).reshape(shape),
}
SLOPES: dict[str, Any] = {
    "tanh": lambda x: 1 - x * x,
    "sigmoid": lambda x: x * (1 - x),
    "relu": lambda x: (x > 0) * 1.0,
    "leaky_relu": lambda x: np.where(x > 0, 1.0, 0.01),
    "softplus": lambda x: 1 - np.exp(-x),
}
ORACLES |= {f"slopes_{name}": slope for name, slope in SLOPES.items()}
# Not unique, random, or in a precision that numpy lacks: tested by what holds.
INDIRECT = {"eigh", "chain_modes", "symmetric_chain_modes", "signs", "track_basis", "cast"}
# Tested against dense inverses, roots and per-example gradients: test_rank1, test_newton, test_row_kernel, passes.
INDIRECT |= {"rank1_update", "rank1_apply", "rank1_right_apply", "stabilize", "newton_root", "newton_schulz"}
INDIRECT |= {"fit_squared", "fit_matching"}  # test_local
INDIRECT |= {"row_kernel", "pointwise"}
INDIRECT |= {"centred", "uncorrelated_apply"}  # against the dense solve: tests/methods/test_kfc.py
INDIRECT |= {"keep_rows", "whitened_rows", "rows_solve", "norm_switch"}  # test_sample_space
INDIRECT |= {"spaced_pairs", "sampled_pairs", "interpolated_pairs", "pairs_kernel"}  # test_sample_pairs
INDIRECT |= {"top_kron", "top_two_kron", "pencil_modes"}  # against singular values and dense inverses: test_top_kron


def test_every_op_has_an_oracle() -> None:
    assert set(PURE) == set(ORACLES) | INDIRECT


@pytest.mark.parametrize("name", ORACLES)
def test_agrees_with_formula(name: str) -> None:
    for operands in PURE[name].samples():
        expected = ORACLES[name](*map(as_numpy, operands))
        result = PURE[name](*operands)
        result = torch.stack(result) if isinstance(result, tuple) else result
        np.testing.assert_allclose(result.numpy(), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["bf16", "f16", "f32", "f64"])
def test_cast_rounds_to_the_nearest(name: str) -> None:
    bits = {"bf16": 8, "f16": 11, "f32": 24, "f64": 53}[name]
    x = torch.linspace(0.1, 7.3, 50, dtype=torch.float64)
    scale = torch.exp2(torch.floor(torch.log2(x)) - (bits - 1))  # one unit in the last place
    assert torch.equal(OPS["cast"](x, name).double(), torch.round(x / scale) * scale)
    with pytest.raises(FxcurvError, match="'i64'; choose bf16, f16, f32 or f64"):
        OPS["cast"].infer(Mat((2, 3)), "i64")


@pytest.mark.parametrize("index", range(len(list(OPS["track_basis"].samples()))))
def test_a_tracked_basis_is_orthogonal_and_comes_closer(index: int) -> None:
    A, Q = sample(OPS["track_basis"], index)
    values, basis = OPS["track_basis"](A, Q)
    assert torch.allclose(basis.mT @ basis, torch.eye(A.shape[-1]).double().expand(A.shape), atol=1e-12)
    upper = basis.mT @ A @ sorted_columns(A, Q)
    assert torch.allclose(upper.tril(-1), torch.zeros_like(upper), atol=1e-12)
    assert torch.allclose(values, upper.diagonal(dim1=-2, dim2=-1).abs())
    for _ in range(2000):
        values, basis = OPS["track_basis"](A, basis)
    assert torch.allclose(values, torch.linalg.eigvalsh(A).flip(-1), rtol=1e-8)
    assert torch.allclose((basis * values.unsqueeze(-2)) @ basis.mT, A, atol=1e-8)


def sorted_columns(A: torch.Tensor, Q: torch.Tensor) -> torch.Tensor:
    order = torch.einsum("...ik,...ij,...jk->...k", Q, A, Q).argsort(-1, descending=True)
    return torch.take_along_dim(Q, order.unsqueeze(-2), -1)


@pytest.mark.parametrize("line", [[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 3.0, 0.0]], ids=["zero", "rank 2"])
def test_a_tracked_basis_of_a_singular_matrix_is_orthogonal(line: list[float]) -> None:
    A = torch.diag(torch.tensor(line))
    values, basis = OPS["track_basis"](A, torch.eye(4))
    assert torch.allclose(basis.T @ basis, torch.eye(4), atol=1e-6)
    assert torch.allclose(values, A.diagonal().sort(descending=True)[0], atol=1e-6)


@pytest.mark.parametrize("index", range(len(list(OPS["eigh"].samples()))))
def test_eigh_decomposes(index: int) -> None:
    A, *flags = sample(OPS["eigh"], index)
    values, vectors = OPS["eigh"](A, *flags)
    assert (values >= 0).all()
    if not is_matrix(A.numpy(), bool(flags)):
        torch.testing.assert_close(values, A)
        torch.testing.assert_close(vectors, torch.ones_like(A))
        return
    torch.testing.assert_close((vectors * values.unsqueeze(-2)) @ vectors.mT, A)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(A.shape[-1], dtype=A.dtype).expand(A.shape))
    assert (values.diff(dim=-1) >= 0).all()


def test_eigh_clips_negative_round_off() -> None:
    A = torch.diag(torch.tensor([-1e-9, 1.0], dtype=torch.float64))
    assert OPS["eigh"](A)[0].tolist() == [0.0, 1.0]
    assert OPS["eigh"](torch.tensor([-1e-9, 1.0]))[0].tolist() == [0.0, 1.0]


def test_per_example_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(7, 3, 2, 4, generator=generator, dtype=torch.float64)
    g = torch.randn(7, 3, 2, 5, generator=generator, dtype=torch.float64)
    whole = OPS["grad_square"](a, g), OPS["grad_gram"](a, g)
    sizes = []
    monkeypatch.setattr(moments, "CHUNK", 2 * 2 * 4 * 5)
    for part in moments.per_example(a, g):
        sizes.append(part.shape[0])
    assert sizes == [2, 2, 2, 1]
    torch.testing.assert_close((OPS["grad_square"](a, g), OPS["grad_gram"](a, g)), whole)
