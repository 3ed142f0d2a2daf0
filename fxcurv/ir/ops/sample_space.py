"""Kronecker factors kept as the rows they are sums of: A = X^T X with X (m, d) and m < d (Tang et al. 2021, SKFAC).

The rows carry the normalisation, so that the factor is X^T X and nothing else, and there is a fixed number of them:
rows of zeros fill up and change no sum. In one direction of V that the rows span, (X^T X + c I)^-1 V is a difference of
numbers that are |X|^2 / c times larger, so everything here is computed in float64 from what is kept in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import Op, Trait
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.linalg import NAN, shifted
from fxcurv.ir.ops.rules import accumulator, count_of, grouped, need, need_rows, need_scalar, need_shape, spread
from fxcurv.ir.ops.statistics import ungroup, wide
from fxcurv.ir.types import Diag, Mat, Psd, Scalar, Type

STACKABLE = frozenset({Trait.BATCHABLE})
GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
ROUNDINGS = 32.0  # a sum over n rows is off by about sqrt(n) roundings of |Xg| |Xa|


def chosen(examples: int, positions: int, capacity: int, device: torch.device) -> Tensor | None:
    """Which of (examples * positions) rows to keep where they are more than ``capacity``, ``None`` for all of them.

    Of every example equally many positions, evenly spaced; where they begin moves from example to example by the golden
    ratio, so that no column of an image is left out. More examples than rows: evenly spaced ones. A function of sizes.
    """
    if examples * positions <= capacity:
        return None
    kept, each = min(examples, capacity), max(1, capacity // examples)
    number = torch.arange(kept, device=device)
    gap = positions / each
    start = (number.to(torch.float64) * GOLDEN).frac() * gap
    place = (start.unsqueeze(1) + gap * torch.arange(each, device=device)).long().clamp(max=positions - 1)
    return ((number * examples // kept).unsqueeze(1) * positions + place).flatten()


def filled(rows: Tensor, capacity: int) -> Tensor:
    """Rows (G, n, d) with n <= capacity as (capacity, d) or (G, capacity, d), zeros below."""
    return ungroup(F.pad(rows, (0, 0, 0, capacity - rows.shape[1])).contiguous())


def _keep_rows(rows: Tensor, capacity: int) -> Tensor:
    """At most ``capacity`` rows: Rows (b, s, G, d) -> Mat (capacity, d) or (G, capacity, d), with zeros below.

    Where there are more, evenly spaced ones (the same for equal b and s), multiplied by sqrt(b s / kept): X^T X stays
    an estimate of the whole sum of r r^T. Spatial sub-sampling of Tang et al. 2021 with the scale of K-FAC-expand.
    """
    b, s = rows.shape[:2]
    flat, index = wide(rows).flatten(0, 1), chosen(b, s, capacity, rows.device)
    if index is not None:
        flat = flat[index] * math.sqrt(b * s / index.shape[0])
    return filled(flat.transpose(0, 1), capacity)


def _infer_keep_rows(rows: Type, capacity: int) -> Type:
    need_rows("keep_rows", ("rows", rows))
    if capacity < 1:
        raise FxcurvError(f"op 'keep_rows' keeps {capacity} rows; give it room for one at least.")
    return Mat(grouped(rows.shape[2], capacity, rows.shape[3]), accumulator(rows.dtype))


def _keep_samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(80)
    for shape in ((5, 1, 1, 3), (2, 7, 1, 4), (3, 2, 5, 2), (1, 1, 1, 1), (0, 3, 1, 2), (9, 4, 2, 1)):
        yield draw.normal(*shape), 6


keep_rows = Op("keep_rows", "(Tensor rows, int capacity) -> Tensor", _keep_rows, _infer_keep_rows, _keep_samples)


def _push_rows(old: Tensor, new: Tensor, weight: Tensor) -> Tensor:
    """A window of weighted rows moves on: [sqrt(1 - weight) new; sqrt(weight) old], the last rows of ``old`` dropped.

    X^T X is then weight * old^T old + (1 - weight) * new^T new but for what fell out. old: Mat (.., k m, d), new: Mat
    (.., m, d); weight: that of the old value, and at 1 the window stays as it is. Tang et al. 2021 keep the rows.
    """
    weight = torch.as_tensor(weight, dtype=old.dtype, device=old.device)
    moved = torch.cat([(1.0 - weight).sqrt() * new, weight.sqrt() * old], dim=-2)[..., : old.shape[-2], :]
    return torch.where(weight == 1.0, old, moved.to(old.dtype))


def _infer_push_rows(old: Type, new: Type, weight: Any) -> Type:
    need("push_rows", "old", old, Mat)
    need_shape("push_rows", "new", need("push_rows", "new", new, Mat), (*old.batch, new.shape[-2], old.shape[-1]))
    need_scalar("push_rows", "weight", weight)
    return old


def _push_samples() -> Iterator[tuple[Tensor, ...]]:
    draw = Draw(81)
    for groups, m, k, d in (((), 3, 1, 4), ((), 2, 3, 5), ((2,), 2, 2, 3)):
        for weight in (0.0, 0.7, 1.0):
            yield draw.normal(*groups, k * m, d), draw.normal(*groups, m, d), torch.tensor(weight, dtype=torch.float64)


push_rows = Op(
    "push_rows", "(Tensor old, Tensor new, Tensor weight) -> Tensor", _push_rows, _infer_push_rows, _push_samples
)


def _factor_diagonal(X: Tensor) -> Tensor:
    """The diagonal of X^T X: Mat (m, d) or (G, m, d) -> Diag (d,) or (G, d); its mean is all that a damping needs."""
    return X.square().sum(dim=-2)


factor_diagonal = Op(
    "factor_diagonal", "(Tensor X) -> Tensor", _factor_diagonal,
    lambda X: Diag((*X.batch, X.shape[-1]), need("factor_diagonal", "X", X, Mat).dtype),
    lambda: ((X,) for X, _ in _row_samples()), lambda X: 2.0 * X.numel, STACKABLE,
)  # fmt: skip


def small_factor(K: Tensor, damping: Any) -> Tensor:
    """Cholesky factor of K + damping I in float64; NaN where it is not positive definite."""
    lower, info = torch.linalg.cholesky_ex(shifted(K, damping))
    usable = (info == 0) & torch.isfinite(lower.diagonal(dim1=-2, dim2=-1)).all(dim=-1)
    return torch.where(usable[..., None, None], lower, NAN)


def _whitened_rows(X: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """(H, c) with H = L^-1 X, L L^T = X X^T + c I, in float64: (X^T X + c I)^-1 = (I - H^T H) / c (Woodbury).

    X: Mat (m, d) or (G, m, d); damping c: number, Scalar or one a group; it comes with H because the two belong
    together. NaN where the kernel is not positive definite.
    """
    X = X.to(torch.float64)
    H = torch.linalg.solve_triangular(small_factor(X @ X.mT, damping), X, upper=False)
    return H.contiguous(), torch.as_tensor(damping, device=X.device).to(torch.float64, copy=True)


def _damped_rows(X: Tensor, damping: Tensor) -> Tensor:
    """X (X^T X + c I)^-1 in float64, without cancellation: (X X^T + c I)^-1 X where that kernel is the smaller one.

    X: Mat (m, d) or (G, m, d); damping c: number, Scalar or one a group.
    """
    X = X.to(torch.float64)
    if X.shape[-2] <= X.shape[-1]:
        return torch.cholesky_solve(X, small_factor(X @ X.mT, damping)).contiguous()
    return torch.cholesky_solve(X.mT, small_factor(X.mT @ X, damping)).mT.contiguous()


def _infer_damped(name: str) -> Callable[[Type, Any], Type]:
    def infer(X: Type, damping: Any) -> Type:
        need(name, "X", X, Mat)
        need_scalar(name, "damping", damping, X.batch)
        return Mat(X.shape, torch.float64)

    return infer


def _infer_whitened(X: Type, damping: Any) -> tuple[Type, Type]:
    shape = damping.shape if isinstance(damping, Type) else ()
    return _infer_damped("whitened_rows")(X, damping), Scalar(shape, torch.float64)


def _row_samples() -> Iterator[tuple[Tensor, Tensor]]:
    draw = Draw(82)
    for groups, m, d in (((), 3, 5), ((), 1, 1), ((), 6, 2), ((4,), 2, 3)):
        yield draw.normal(*groups, m, d), draw.number(0.3)
        if groups:
            yield draw.normal(*groups, m, d), draw.number(0.3, *groups)


def _kernel_flops(X: Type, damping: Any) -> float:
    m, d = X.shape[-2] or 1, X.shape[-1] or 1
    small = min(m, d)
    return X.numel / (m * d) * (2.0 * small * m * d + small**3 / 3 + 2.0 * small * m * d)


whitened_rows = Op(
    "whitened_rows", "(Tensor X, Tensor damping) -> (Tensor, Tensor)", _whitened_rows, _infer_whitened, _row_samples,
    _kernel_flops, STACKABLE,
)  # fmt: skip
damped_rows = Op(
    "damped_rows", "(Tensor X, Tensor damping) -> Tensor", _damped_rows, _infer_damped("damped_rows"), _row_samples,
    _kernel_flops, STACKABLE,
)  # fmt: skip


def _one_side(V: Tensor, side: Sequence[Tensor]) -> Tensor:
    """V times the inverse of a side: [M] is that inverse or its diagonal, [H, c] stands for (I - H^T H) / c."""
    first = side[0].to(V.dtype)
    if len(side) == 2:
        return (V - (V @ first.mT) @ first) / spread(side[1], V)
    return V * first.unsqueeze(-2) if first.ndim < V.ndim else V @ first


def _rows_solve(V: Tensor, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """(X_G^T X_G + c_G I)^-1 V (X_A^T X_A + c_A I)^-1 with each side as [H, c] of ``whitened_rows``.

    A side may also be [M], the inverse of a dense factor or of its diagonal. V: Mat (o, i) or (G, o, i), of whose type
    the result is; between the sides nothing is rounded.
    """
    wide_V = V.to(torch.float64)
    return _one_side(_one_side(wide_V, right).mT, left).mT.to(V.dtype).contiguous()


def _need_side(V: Type, name: str, side: Sequence[Type], size: int | None) -> None:
    if len(side) == 1:
        need("rows_solve", name, side[0], Psd, Diag)
        need_shape("rows_solve", name, side[0], (*V.batch, *(size,) * (1 if isinstance(side[0], Diag) else 2)))
        return
    if len(side) != 2:
        raise FxcurvError(f"operand '{name}' of op 'rows_solve' is [inverse] or [rows, damping], got {list(side)}.")
    need_shape("rows_solve", name, need("rows_solve", name, side[0], Mat), (*V.batch, side[0].shape[-2], size))
    need_scalar("rows_solve", name, side[1], V.batch)


def _infer_rows_solve(V: Type, left: Sequence[Type], right: Sequence[Type]) -> Type:
    need("rows_solve", "V", V, Mat)
    _need_side(V, "left", left, V.shape[-2])
    _need_side(V, "right", right, V.shape[-1])
    return V


def _solve_samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(83)
    for groups, o, i in (((), 3, 5), ((), 1, 1), ((4,), 3, 2)):
        V, c = draw.normal(*groups, o, i), draw.number(0.3, *groups)
        yield V, [draw.normal(*groups, 2, o), c], [draw.normal(*groups, 3, i), c]
        yield V, [draw.psd(o, *groups)], [draw.normal(*groups, 3, i), c]
        yield V, [draw.normal(*groups, 2, o), c], [draw.positive(*groups, i)]


def _side_cost(V: Type, side: Sequence[Type]) -> float:
    d = side[0].shape[-2 if len(side) == 2 else -1] or 1
    return V.numel * (1.0 if isinstance(side[0], Diag) else 2.0 * d * len(side))


rows_solve = Op(
    "rows_solve", "(Tensor V, Tensor[] left, Tensor[] right) -> Tensor", _rows_solve, _infer_rows_solve, _solve_samples,
    lambda V, left, right: _side_cost(V, left) + _side_cost(V, right), frozenset({Trait.LINEAR}),
)  # fmt: skip


def _rows_between(XG: Tensor, XA: Tensor, scale: Tensor) -> Tensor:
    """scale * XG^T XA in float64: Mat (m, o), (m, i) -> (o, i), or with groups in front."""
    return (XG.to(torch.float64).mT @ XA.to(torch.float64) * torch.as_tensor(scale)).contiguous()


def _unexplained(V: Tensor, XG: Tensor, XA: Tensor, scale: Tensor) -> Tensor:
    """V - scale * XG^T XA, and exactly 0 in a group where that is no more than rounding: V is the rows' own product.

    Rounding is what is below 32 units in the last place of V's type, times scale |XG| |XA|.
    """
    rest = V.to(torch.float64) - _rows_between(XG, XA, scale)
    size = [x.to(torch.float64).square().sum(dim=(-2, -1), keepdim=True).sqrt() for x in (rest, XG, XA)]
    bound = ROUNDINGS * torch.finfo(V.dtype).eps * torch.as_tensor(scale) * size[1] * size[2]
    return torch.where(size[0] <= bound, 0.0, rest).to(V.dtype)


def _infer_between(XG: Type, XA: Type, scale: Any) -> Type:
    need("rows_between", "XG", XG, Mat)
    need_shape("rows_between", "XA", need("rows_between", "XA", XA, Mat), (*XG.shape[:-1], XA.shape[-1]))
    need_scalar("rows_between", "scale", scale)
    return Mat((*XG.batch, XG.shape[-1], XA.shape[-1]), torch.float64)


def _infer_unexplained(V: Type, XG: Type, XA: Type, scale: Any) -> Type:
    need_shape("unexplained", "V", need("unexplained", "V", V, Mat), _infer_between(XG, XA, scale).shape)
    return V


def _between_samples() -> Iterator[tuple[Tensor, ...]]:
    draw = Draw(84)
    for groups, m, o, i in (((), 4, 3, 5), ((), 1, 1, 1), ((3,), 2, 4, 3)):
        yield draw.normal(*groups, m, o), draw.normal(*groups, m, i), draw.number(0.7)


def _unexplained_samples() -> Iterator[tuple[Tensor, ...]]:
    for XG, XA, scale in _between_samples():
        product = _rows_between(XG, XA, scale)
        yield product * (1 + 1e-15), XG, XA, scale
        yield product + 1e-3, XG, XA, scale


def _between_flops(XG: Type, XA: Type, scale: Any) -> float:
    return 2.0 * XG.numel * count_of(XA.shape[-1])


rows_between = Op(
    "rows_between", "(Tensor XG, Tensor XA, Tensor scale) -> Tensor", _rows_between, _infer_between, _between_samples,
    _between_flops,
)  # fmt: skip
unexplained = Op(
    "unexplained", "(Tensor V, Tensor XG, Tensor XA, Tensor scale) -> Tensor", _unexplained, _infer_unexplained,
    _unexplained_samples, lambda V, *rest: _between_flops(*rest) + 3.0 * V.numel,
)  # fmt: skip
