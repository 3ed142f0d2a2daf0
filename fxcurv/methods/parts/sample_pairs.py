"""The empirical Fisher of a layer as pairs of rows (sheet kronecker-2, hylo), and how a batch is reduced to few.

All of a layer's state is renewed together, at the cadence of statistics: pairs, P, kernel and the damping in them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from fxcurv.errors import FxcurvError
from fxcurv.ir.program import STATISTICS, STEP, Builder
from fxcurv.ir.types import DTYPE_NAMES
from fxcurv.methods.facts import Facts, Target
from fxcurv.methods.method import Estimate, Method, Solve, curvature_weight, hyper, loss_terms
from fxcurv.methods.parts.estimate import Diagonal
from fxcurv.methods.parts.sample_space import pair_rows
from fxcurv.methods.parts.solve import Divide, Parts

MODES = ("switch", "kid", "kis", "exact")
SWITCH_STATES = {"interpolates": "ones", "norms": "zeros", "norms_before": "zeros"}


@dataclass(frozen=True)
class Decay:
    """How the damping falls: from "damping" to "damping_target" in about ``steps`` updates after ``warmup`` of them."""

    steps: int
    warmup: int = 0


@dataclass(frozen=True)
class Switch:
    """When to interpolate and when to sample.

    period: steps over which norms of gradients are summed; threshold: relative change of that sum above which the next
    period interpolates. intervals: (a, b, c), if given, to interpolate in steps < a and b < step <= c instead.
    """

    period: int = 100
    threshold: float = 0.1
    intervals: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Pairs(Estimate):
    """F = sum of u u^T, u = g (x) a, by ``rank`` pairs "XA", "XG", with "P", the kernel "M" and the damping in both.

    An embedding, or a weight that is also one, has the diagonal of F, "D": its rows are as wide as the vocabulary.
    """

    rank: int
    mode: str = "switch"
    replacement: bool = False
    by_norm: bool = False
    switch: Switch = Switch()
    decay: Decay | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise FxcurvError(f"mode='{self.mode}' is unknown; choose one of {', '.join(MODES)}.")
        if self.rank < 1 or self.switch.period < 1:
            raise FxcurvError(f"rank={self.rank} and period={self.switch.period} must be whole numbers, at least 1.")

    def measure(self, b: Builder, facts: Facts, target: Target) -> dict[str, fx.Node]:
        if target.diagonal_input or target.swapped:
            return Diagonal().measure(b, facts, target)
        damping = self.damping(b, facts, target)
        a = pair_rows(b, facts, target, "a")
        g = b.scale(pair_rows(b, facts, target, "g"), b.sqrt(curvature_weight(b, facts)))
        if self.mode == "switch":
            flag = self.interpolates(b, facts, target)
            ways = (self.chosen(b, facts, target, mode, a, g, damping) for mode in ("kid", "kis"))
            kept = [b.either(flag, x, y) for x, y in zip(*ways, strict=True)]
        else:
            kept = self.chosen(b, facts, target, self.mode, a, g, damping)
        kernel = b.pairs_kernel([kept[0]], [kept[1]], [kept[2]])
        return {"XA": kept[0], "XG": kept[1], "P": kept[2], "M": kernel, "damping": damping}

    def chosen(
        self, b: Builder, facts: Facts, target: Target, mode: str, a: fx.Node, g: fx.Node, damping: fx.Node
    ) -> list[fx.Node]:
        """(XA, XG, P) of one way to reduce a batch."""
        if mode == "kid":
            found = b.interpolated_pairs(a, g, self.rank, damping, self.by_norm)
        elif mode == "kis":
            number = [one.name for one in facts.targets].index(target.name)
            key = hyper(b, facts, "seed"), hyper(b, facts, "step")
            found = b.sampled_pairs(a, g, self.rank, damping, *key, number, self.replacement)
        else:
            found = b.spaced_pairs(a, g, self.rank, damping)
        return [b.item(found, i) for i in range(3)]

    def damping(self, b: Builder, facts: Facts, target: Target) -> fx.Node:
        """The damping of this batch, in the precision of the layer's scalars."""
        damping = hyper(b, facts, "damping")
        if self.decay is None:
            return damping
        updates = b.input("state", f"{target.name}.updates", facts.scalar(), init="zeros")
        return b.decayed(updates, damping, hyper(b, facts, "damping_target"), self.decay.steps, self.decay.warmup)

    def interpolates(self, b: Builder, facts: Facts, target: Target) -> fx.Node:
        """1 in a step that interpolates, 0 in one that samples."""
        step = hyper(b, facts, "step")
        if self.switch.intervals is not None:
            return b.within_steps(step, *self.switch.intervals)
        with b.within(at=STEP):
            keys = {f"{target.name}.{part}": init for part, init in SWITCH_STATES.items()}
            old = [b.input("state", key, facts.scalar(), init=init) for key, init in keys.items()]
            norm = b.norm(target.gradient(b))
            found = b.norm_switch(*old, norm, step, self.switch.threshold, self.switch.period)
            for i, key in enumerate(keys):
                b.give("state", key, b.item(found, i))
            return b.item(found, 0)

    def block(self, parts: dict[str, Tensor]) -> Tensor | None:
        """damping * sum over j, k of P[j, k] u_j u_k^T: what added to the damping is inverted."""
        if "XA" not in parts:
            return Diagonal().block(parts)
        pairs = (parts["XG"].unsqueeze(-1) * parts["XA"].unsqueeze(-2)).flatten(-2).to(parts["P"].dtype)
        return parts["damping"] * (pairs.mT @ parts["P"] @ pairs)


@dataclass(frozen=True)
class PairsSolve(Solve):
    """U = (F + damping I)^-1 V by the kernel of the pairs (Sherman, Morrison, Woodbury).

    With ``own_rows``, in a step in which the pairs are those of the gradient, V = r XG^T XA + rest, and the first term
    is weighted anew example by example, r XG^T diag(w) XA with (K + damping I) w = 1, which cancels nothing; the rest,
    none as a rule, takes the ordinary way.
    """

    own_rows: bool = False

    def direction(
        self, b: Builder, method: Method, facts: Facts, target: Target, gradient: fx.Node, parts: Parts
    ) -> fx.Node:
        if "XA" not in parts:
            return Divide().direction(b, method, facts, target, gradient, parts)
        pairs, damping = (parts["XA"], parts["XG"], parts["M"]), parts["damping"]
        ordinary = b.pairs_solve(gradient, *pairs, damping)
        if not self.own_rows:
            return ordinary
        with b.within(at=STATISTICS):
            share = b.power(loss_terms(b, facts), -0.5)
            rest = b.unexplained(gradient, parts["XG"], parts["XA"], share)
            new = b.add(b.reweighted(*pairs, share), b.pairs_solve(rest, *pairs, damping))
            return b.latest(b.cast(new, DTYPE_NAMES[target.dtype]), ordinary)
