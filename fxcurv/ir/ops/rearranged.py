"""The rearranged Fisher block of a layer as a linear map between symmetric matrices, without forming either.

A block F = w sum (a a^T) (x) (g g^T) has the rearrangement Z = w sum vec(a a^T) vec(g g^T)^T: the Frobenius distance
of F from R (x) S is that of Z from vec(R) vec(S)^T, so that the best Kronecker products are the leading singular
triplets of Z (Van Loan & Pitsianis 1993). Z maps S to w sum (g^T S g) a a^T. Positions t, t' of one example are paired
with a weight that depends on |t - t'|; a Kronecker product may be taken off.

Two representations of the same map, chosen by cost: :class:`Dense` keeps the matrices, at n (i^2 + o^2) an application
for n rows; :class:`Coordinates` keeps the n coefficients of the matrices a a^T and g g^T, with the squares of the inner
products of rows as metric, at n^2 an application. Wide layers and small batches want the second.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.ir.ops.rules import align
from fxcurv.ir.ops.statistics import wide

TABLE = 1 << 22
"""Most inner products of rows, of one group, that are kept at one time."""
APPLICATIONS = 20
"""Applications of the map and of its transpose for which the representation is chosen."""


def lag_weights(positions: int, window: int, hard: bool) -> list[float]:
    """Weights of pairs of positions at distance d = 0, ..., window: 1 - d / (window + 1), or 1 with ``hard``."""
    lags = range(min(window, max(positions, 1) - 1) + 1)
    return [1.0 if hard else 1.0 - lag / (window + 1) for lag in lags]


def times(x: Tensor, scale: Tensor) -> Tensor:
    """``x`` with a factor for every group, its leading dimension."""
    return x * scale.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


class Rearranged(ABC):
    """Abstract: Z between "a" vectors and "g" vectors, each of which stands for a symmetric matrix a group."""

    @abstractmethod
    def enter(self, S: Tensor) -> Tensor:
        """Z vec(S) for a matrix (G, o, o)."""

    @abstractmethod
    def forward(self, v: Tensor) -> Tensor:
        """Z v."""

    @abstractmethod
    def back(self, u: Tensor) -> Tensor:
        """Z^T u."""

    @abstractmethod
    def inner(self, x: Tensor, y: Tensor, side: str) -> Tensor:
        """Inner products (G,) of two vectors of a side."""

    @abstractmethod
    def leave(self, x: Tensor, side: str) -> Tensor:
        """The matrix (G, d, d) that a vector of a side stands for."""

    def unit(self, x: Tensor, side: str) -> tuple[Tensor, Tensor]:
        """(x / |x|, |x|); a zero vector stays zero."""
        norm = self.inner(x, x, side).clamp(min=0.0).sqrt()
        return times(x, torch.where(norm > 0, 1.0 / torch.where(norm > 0, norm, 1.0), 0.0)), norm


@dataclass(frozen=True)
class Dense(Rearranged):
    """Vectors are the matrices themselves. a, g: (G, b, s, d); weight: 0-dim; off: none, or (R, S) to take off."""

    a: Tensor
    g: Tensor
    weight: Tensor
    lags: Sequence[float]
    off: tuple[Tensor, ...]

    def enter(self, S: Tensor) -> Tensor:
        return self.forward(S.to(self.g.dtype))

    def forward(self, v: Tensor) -> Tensor:
        return self._half(self.g, self.a, v, self.off[::-1])

    def back(self, u: Tensor) -> Tensor:
        return self._half(self.a, self.g, u, self.off)

    def _half(self, measured: Tensor, summed: Tensor, M: Tensor, off: tuple[Tensor, ...]) -> Tensor:
        turned, size, end = measured @ M.unsqueeze(1), summed.shape[-1], measured.shape[2]
        total = summed.new_zeros(summed.shape[0], size, size)
        for lag, share in enumerate(self.lags):
            quadratic = (turned[:, :, lag:] * measured[:, :, : end - lag]).sum(dim=-1, keepdim=True)
            later, earlier = quadratic * summed[:, :, lag:], summed[:, :, : end - lag]
            product = later.flatten(1, 2).mT @ earlier.flatten(1, 2)
            total = total + share * (product + product.mT) * (0.5 if lag == 0 else 1.0)
        total = total * self.weight
        return total - times(off[1], self.inner(off[0], M, "")) if off else total

    def inner(self, x: Tensor, y: Tensor, side: str) -> Tensor:
        return (x * y).sum(dim=(-2, -1))

    def leave(self, x: Tensor, side: str) -> Tensor:
        return x


@dataclass(frozen=True)
class Coordinates(Rearranged):
    """Vectors are coefficients (G, m) of the matrices r r^T of the rows, and last of the one that is taken off.

    rows, metric: by side, the rows (G, n, d) and inner products (G, m, m) of their matrices; scales: (m,), Z's weight
    of every pair; off: by side, none or one matrix. In float64: the tables are small, their range is squared.
    """

    rows: dict[str, Tensor]
    metric: dict[str, Tensor]
    scales: Tensor
    off: dict[str, tuple[Tensor, ...]]

    def enter(self, S: Tensor) -> Tensor:
        return self.scales * _against(self.rows["g"], S, self.off["g"])

    def forward(self, v: Tensor) -> Tensor:
        return self.scales * (self.metric["g"] @ v.unsqueeze(-1)).squeeze(-1)

    def back(self, u: Tensor) -> Tensor:
        return self.scales * (self.metric["a"] @ u.unsqueeze(-1)).squeeze(-1)

    def inner(self, x: Tensor, y: Tensor, side: str) -> Tensor:
        return (x * (self.metric[side] @ y.unsqueeze(-1)).squeeze(-1)).sum(dim=-1)

    def leave(self, x: Tensor, side: str) -> Tensor:
        rows, off = self.rows[side], self.off[side]
        coefficients = x[:, : rows.shape[1]].to(rows.dtype)
        total = (rows * coefficients.unsqueeze(-1)).mT @ rows
        return total + times(off[0], x[:, -1]) if off else total


def _against(rows: Tensor, M: Tensor, off: tuple[Tensor, ...]) -> Tensor:
    """Inner products of M with the matrices of the rows, and with the one that is taken off: (G, m), float64."""
    M = M.to(rows.dtype)
    found = [((rows @ M) * rows).sum(dim=-1), *((one * M).sum(dim=(-2, -1)).unsqueeze(-1) for one in off)]
    return torch.cat(found, dim=-1).double()


def _metric(rows: Tensor, off: tuple[Tensor, ...]) -> Tensor:
    squares = (rows @ rows.mT).double().square()
    if not off:
        return squares
    edge = _against(rows, off[0], off).unsqueeze(-2)  # (G, 1, n + 1)
    return torch.cat([torch.cat([squares, edge[..., :-1].mT], dim=-1), edge], dim=-2)


def rearranged(
    a: Tensor, g: Tensor, weight: Tensor, off: Sequence[Tensor], window: int, hard: bool, table: int | None = None
) -> Rearranged:
    """Z of rows a (b, s, G, i) and g (b, s, G, o), scaled by ``weight``, less vec(R) vec(S)^T for ``off`` = [R, S].

    window: pairs of positions of an example count up to this distance, see :func:`lag_weights`; 0 lets every position
    act as an example. table: in place of TABLE.

    Of a layer that was not reached, whose input others read, only one side has rows, and Z is 0. Raises
    :class:`FxcurvError` for sides with different numbers of examples, whose pairs are not known.
    """
    if a.shape[0] != g.shape[0]:
        if a.shape[0] and g.shape[0]:
            raise FxcurvError(
                f"{a.shape[0]} examples of a layer's input do not pair with {g.shape[0]} of its output: layers with a "
                "common input must be reached by the same micro-batches."
            )
        a, g = a[:0], g[:0]
    examples, positions, groups, _ = a.shape
    a, g, *parts = align(wide(a), wide(g), *off)
    taken = tuple(part.reshape(groups, *part.shape[-2:]) for part in parts)
    lags = lag_weights(positions, window, hard)
    x, y = a.movedim(2, 0), g.movedim(2, 0)
    n, i, o = examples * positions, a.shape[3], g.shape[3]
    dense, sampled = 2 * APPLICATIONS * n * (i * i + o * o), n * n * (i + o + 2 * APPLICATIONS)
    scale = torch.as_tensor(weight, device=a.device)
    if len(lags) > 1 or sampled > dense or n * n > (TABLE if table is None else table):
        return Dense(x, y, scale.to(a.dtype), lags, taken)
    rows = {"a": x.flatten(1, 2), "g": y.flatten(1, 2)}
    by_side = {"a": taken[:1], "g": taken[1:]}
    metric = {side: _metric(rows[side], by_side[side]) for side in rows}
    last = scale.double().new_full((len(off) // 2,), -1.0)
    return Coordinates(rows, metric, torch.cat([scale.double().expand(n), last]), by_side)
