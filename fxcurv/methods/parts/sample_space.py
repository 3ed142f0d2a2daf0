"""Kronecker factors in sample space (sheet kronecker-2, skfac): rows where they are fewer than a factor is wide.

A side of a layer is one of three things, fixed when the program is written: "XA" or "XG", a fixed number of rows whose
X^T X is the factor; "A" or "G", the factor itself; or its diagonal. What a side is changes no result as long as the
rows of a batch fit in.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from fxcurv.errors import FxcurvError
from fxcurv.ir.program import REFRESH, STATISTICS, Builder
from fxcurv.ir.types import DTYPE_NAMES, Mat
from fxcurv.methods.dense import full, kron
from fxcurv.methods.facts import Facts, Target
from fxcurv.methods.method import Estimate, Method, Solve, curvature_weight, flag, loss_terms
from fxcurv.methods.parts.estimate import Kron, input_factor, output_factor
from fxcurv.methods.parts.solve import Inverse, Parts
from fxcurv.methods.parts.track import Reached

SIDES = ("A", "G")
PATHS = ("auto", "dense", "low_rank")


def pair_rows(b: Builder, facts: Facts, target: Target, side: str) -> fx.Node:
    """Rows of a side in the chosen flavour of weight sharing, in the order of the other side's."""
    rows = target.rows(b, side)
    if facts.sharing == "expand" or target.diagonal_input:
        return rows
    return b.mean_positions(rows) if side == "a" else b.sum_positions(rows)


@dataclass(frozen=True)
class SampleSpace:
    """What the sides of a layer are. rows: room for those of one batch. window: batches kept. path: a key of PATHS."""

    rows: int
    window: int = 1
    path: str = "auto"

    def __post_init__(self) -> None:
        if self.rows < 1 or self.window < 1:
            raise FxcurvError(f"rows={self.rows} and window={self.window} must be whole numbers, at least 1.")
        if self.path not in PATHS:
            raise FxcurvError(f"path='{self.path}' is unknown; choose one of {', '.join(PATHS)}.")

    def low_rank(self, target: Target, side: str) -> bool:
        """Whether a side is kept as rows: it takes a system of rows * window in place of one of the factor's width."""
        if (side == "A" and target.diagonal_input) or self.path == "dense":
            return False
        width = target.d_in if side == "A" else target.d_out
        return self.path == "low_rank" or self.rows * self.window < width

    def batch(self, b: Builder, facts: Facts, target: Target, side: str) -> fx.Node:
        """The rows of this batch, with X^T X its factor: A = mean of a a^T, G = curvature-weighted sum of g g^T."""
        rows = pair_rows(b, facts, target, side.lower())
        kept = b.keep_rows(rows, self.rows)
        if side == "A":
            return b.mean(kept, b.sqrt(_count(b, rows)))
        return b.scale(kept, b.sqrt(curvature_weight(b, facts)))


@dataclass(frozen=True)
class SampleKron(Estimate):
    """K-FAC's factors, or the rows they are sums of."""

    space: SampleSpace

    def measure(self, b: Builder, facts: Facts, target: Target) -> dict[str, fx.Node]:
        if target.swapped:
            return Kron().measure(b, facts, target)
        dense = {"A": input_factor, "G": output_factor}
        parts = {}
        for side in SIDES:
            if self.space.low_rank(target, side):
                parts[f"X{side}"] = self.space.batch(b, facts, target, side)
            else:
                parts[side] = dense[side](b, facts, target)
        return parts

    def block(self, parts: dict[str, Tensor]) -> Tensor | None:
        found = {}
        for side in SIDES:
            rows = parts.get(f"X{side}")
            found[side] = rows.mT @ rows if rows is not None else full(parts[side], parts[side].shape[-1])
        return kron(found["G"], found["A"])


@dataclass(frozen=True)
class Window(Reached):
    """An average of factors; where these are rows, a window of weighted rows, the newest first."""

    space: SampleSpace = SampleSpace(1)

    def averaged(self, b: Builder, key: str, value: fx.Node, weight: fx.Node) -> fx.Node:
        type_ = value.meta["type"]
        if not isinstance(type_, Mat):
            return super().averaged(b, key, value, weight)
        shape = (*type_.batch, (type_.shape[-2] or 0) * self.space.window, type_.shape[-1])
        old = b.input("state", key, Mat(shape, type_.dtype), init="zeros")
        return b.push_rows(old, value, weight)


@dataclass(frozen=True)
class SampleInverse(Solve):
    """U = (G + dG I)^-1 V (A + dA I)^-1 with every side inverted in the smaller space.

    With ``own_rows``, in a step in which the rows are those of the gradient, V = r XG^T XA + rest and the first term
    goes the way that cancels nothing: r [XG (G + dG I)^-1]^T [XA (A + dA I)^-1] (sheet, step 5). Rows of one loss
    without a penalty leave no rest; what else is in V (rows that did not fit in, a penalty, a clipped norm) takes the
    ordinary way, and the sum is exact whatever the share.
    """

    space: SampleSpace
    own_rows: bool = False

    def direction(
        self, b: Builder, method: Method, facts: Facts, target: Target, gradient: fx.Node, parts: Parts
    ) -> fx.Node:
        rows = {side: parts[f"X{side}"] for side in SIDES if f"X{side}" in parts}
        if not rows:
            return Inverse().direction(b, method, facts, target, gradient, parts)
        assert method.damp is not None
        with b.within(at=REFRESH):
            factors = {s: b.factor_diagonal(rows[s]) if s in rows else parts[s] for s in SIDES}
            damping = method.damp.split(b, facts, factors)
            sides = {s: _side(b, factor, damping[s]) for s, factor in (parts | rows).items() if s in SIDES}
        ordinary = b.rows_solve(gradient, sides["G"], sides["A"])
        if not self.own_rows or target.diagonal_input:
            return ordinary
        with b.within(at=STATISTICS):
            share = b.sqrt(b.safe_ratio(_count(b, pair_rows(b, facts, target, "a")), loss_terms(b, facts)))
            own = {s: self.space.batch(b, facts, target, s) for s in SIDES}
            damped = {
                s: b.damped_rows(own[s], damping[s]) if s in rows else b.right_apply(own[s], sides[s][0]) for s in SIDES
            }
            rest = b.unexplained(gradient, own["G"], own["A"], share)
            product = b.rows_between(damped["G"], damped["A"], share)
            new = b.add(product, b.rows_solve(rest, sides["G"], sides["A"]))
            return b.latest(b.cast(new, DTYPE_NAMES[target.dtype]), ordinary)


def _count(b: Builder, rows: fx.Node) -> fx.Node:
    """Their number, in float64: its square root divides."""
    return b.cast(b.count(rows), "f64")


def _side(b: Builder, factor: fx.Node, damping: fx.Node) -> list[fx.Node]:
    """A damped inverse as :func:`rows_solve` reads it."""
    if not isinstance(factor.meta["type"], Mat):
        return [b.inverse(factor, damping, *flag(factor))]
    found = b.whitened_rows(factor, damping)
    return [b.item(found, 0), b.item(found, 1)]
