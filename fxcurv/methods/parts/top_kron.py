"""The best sums of Kronecker products (sheet kronecker-2, kpsvd): estimates from rows, and the inverse of two terms.

F = E[(a a^T) (x) (g g^T)] of a layer is approximated by R (x) S, or R (x) S + R2 (x) S2, in Frobenius norm; the states
are A = R, G = S, A2 = R2, G2 = S2. Pairs of rows are needed together, so the rows are kept until the step; a share of
the examples makes the fit cheap, and the last solution, a state, is where the next one starts.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor, fx

from fxcurv.errors import FxcurvError
from fxcurv.ir.ops.rules import grouped
from fxcurv.ir.ops.two_term import SAFEGUARDS
from fxcurv.ir.program import REFRESH, Builder
from fxcurv.ir.types import Psd, Sym
from fxcurv.methods.dense import kron
from fxcurv.methods.facts import Facts, Target
from fxcurv.methods.method import Estimate, Method, Solve, curvature_weight, hyper
from fxcurv.methods.parts.estimate import Kron, shared_rows
from fxcurv.methods.parts.solve import Inverse, Parts, between

KERNELS = ("triangular", "hard")


@dataclass(frozen=True)
class Sample:
    """Rows of some examples, their weight in the mean loss, and how positions are paired."""

    a: fx.Node
    g: fx.Node
    weight: fx.Node
    pairing: tuple[int, bool]

    @property
    def rows(self) -> tuple[fx.Node, fx.Node, fx.Node]:
        """The first operands of a fit."""
        return self.a, self.g, self.weight


@dataclass(frozen=True)
class TopKron(Estimate):
    """Abstract: the Kronecker products nearest to the block of a layer.

    window: positions of one example up to this distance are paired, 0 for positions as examples; kernel: "triangular"
    or "hard", see the op ``top_kron``. share: of the examples.

    Terms are products of symmetric matrices: pairs of positions also make products of two skew-symmetric ones, which
    no damped inverse has a place for. A layer with a diagonal factor (an embedding, or a side wider than
    max_factor_dim), or with uses of both roles, gets K-FAC's factors instead.
    """

    window: int = 2
    kernel: str = "triangular"
    share: float = 0.25

    def __post_init__(self) -> None:
        _check_whole("window", self.window, 0)
        if self.kernel not in KERNELS:
            raise FxcurvError(f"kernel='{self.kernel}' is unknown; choose one of {', '.join(KERNELS)}.")
        if not 0 < self.share <= 1:
            raise FxcurvError(f"share={self.share} must be above 0 and at most 1.")

    def measure(self, b: Builder, facts: Facts, target: Target) -> dict[str, fx.Node]:
        wide = max(target.d_in, target.d_out) > facts.max_factor_dim
        if wide or target.diagonal_input or target.swapped:
            return Kron().measure(b, facts, target)
        return self.fit(b, facts, target, self._sample(b, facts, target))

    @abstractmethod
    def fit(self, b: Builder, facts: Facts, target: Target, sample: Sample) -> dict[str, fx.Node]:
        """The terms by name."""

    def block(self, parts: dict[str, Tensor]) -> Tensor | None:
        first = Kron().block(parts)
        return first if first is None or "A2" not in parts else first + kron(parts["G2"], parts["A2"])

    def _sample(self, b: Builder, facts: Facts, target: Target) -> Sample:
        a, g = (shared_rows(b, facts, target, side, alone=False) for side in ("a", "g"))
        weight = curvature_weight(b, facts)
        if self.share < 1:
            everything = b.count(a)
            a, g = b.subset_examples(a, self.share), b.subset_examples(g, self.share)
            weight = b.mul(weight, b.safe_ratio(everything, b.count(a)))
        return Sample(a, g, weight, (self.window, self.kernel == "hard"))


@dataclass(frozen=True)
class Powered(TopKron):
    """Abstract: every term by a power iteration of ``iterations`` steps."""

    iterations: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_whole("iterations", self.iterations, 1)

    def nearest(self, b: Builder, target: Target, sample: Sample, *off: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The product nearest to the block less kron of ``off``, from the last one: of the second term with ``off``."""
        start = last(b, target, "G2" if off else "G")
        pair = b.top_kron(*sample.rows, start, list(off), self.iterations, *sample.pairing)
        return b.item(pair, 0), b.item(pair, 1)


@dataclass(frozen=True)
class OneTerm(Powered):
    """KPSVD: the best product."""

    def fit(self, b: Builder, facts: Facts, target: Target, sample: Sample) -> dict[str, fx.Node]:
        R, S = self.nearest(b, target, sample)
        return {"A": R, "G": S}


@dataclass(frozen=True)
class Deflated(Powered):
    """DEFLATION: the best product, and the best one of what it leaves."""

    def fit(self, b: Builder, facts: Facts, target: Target, sample: Sample) -> dict[str, fx.Node]:
        R, S = self.nearest(b, target, sample)
        R2, S2 = self.nearest(b, target, sample, R, S)
        return {"A": R, "G": S, "A2": R2, "G2": S2}


@dataclass(frozen=True)
class Correction(Powered):
    """KFAC-CORRECTED: K-FAC's product, and the best one of what it leaves.

    K-FAC's factors are those of the whole batch. The correction is fitted on a share of the examples, and there to what
    the K-FAC product of the same examples leaves: so it is free of the noise by which their moments differ.
    """

    def fit(self, b: Builder, facts: Facts, target: Target, sample: Sample) -> dict[str, fx.Node]:
        whole = Kron().measure(b, facts, target)
        R, S = whole["A"], whole["G"]
        if self.share < 1:
            R, S = b.mean(b.gram(sample.a), b.count(sample.a)), b.scale(b.gram(sample.g), sample.weight)
        R2, S2 = self.nearest(b, target, sample, R, S)
        return {**whole, "A2": R2, "G2": S2}


@dataclass(frozen=True)
class Bidiagonal(TopKron):
    """LANCZOS: both terms at once, from ``restarts`` Krylov spaces of ``krylov`` vectors, each begun by the last."""

    krylov: int = 6
    restarts: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_whole("krylov", self.krylov, 3)
        _check_whole("restarts", self.restarts, 1)

    def fit(self, b: Builder, facts: Facts, target: Target, sample: Sample) -> dict[str, fx.Node]:
        starts = last(b, target, "G"), last(b, target, "G2")
        terms = b.top_two_kron(*sample.rows, *starts, self.krylov, self.restarts, *sample.pairing)
        return {part: b.item(terms, index) for index, part in enumerate(("A", "G", "A2", "G2"))}


@dataclass(frozen=True)
class TwoTerms(Solve):
    """((A + cA I) (x) (G + cG I) + A2 (x) G2)^-1 in closed form; a layer with one term is solved as K-FAC solves it.

    U = K_G [ (K_G^T V K_A) / (1 + s_G s_A^T) ] K_A^T with K, s the modes of a damped side and its second term, which is
    indefinite: 1 + s_G s_A^T may fall to 0 and below. safeguard: what then, see the op ``two_term_gain``.
    """

    safeguard: str = "floor"

    def __post_init__(self) -> None:
        if self.safeguard not in SAFEGUARDS:
            raise FxcurvError(f"safeguard='{self.safeguard}' is unknown; choose one of {', '.join(SAFEGUARDS)}.")

    def direction(
        self, b: Builder, method: Method, facts: Facts, target: Target, gradient: fx.Node, parts: Parts
    ) -> fx.Node:
        if "A2" not in parts:
            return Inverse().direction(b, method, facts, target, gradient, parts)
        assert method.damp is not None
        with b.within(at=REFRESH):
            damping = method.damp.split(b, facts, parts)
            modes = {side: b.pencil_modes(parts[side], parts[f"{side}2"], damping[side]) for side in ("A", "G")}
            (k_a, s_a), (k_g, s_g) = ([b.item(modes[side], i) for i in range(2)] for side in ("A", "G"))
            gain = b.two_term_gain(s_g, s_a, hyper(b, facts, "floor"), 1, self.safeguard)
        return between(b, gradient, k_g, k_a, gain)


def last(b: Builder, target: Target, part: str) -> fx.Node:
    """The tracked output factor of a term, where the next fit starts."""
    form = Psd if part == "G" else Sym
    type_ = form(grouped(target.groups, target.d_out, target.d_out), target.dtype)
    return b.input("state", f"{target.name}.{part}", type_, init="zeros")


def rows_of(o: SimpleNamespace) -> dict[str, Any]:
    """The hyper-parameters that every estimate here has."""
    return {"window": o.window, "kernel": o.kernel, "share": o.share}


def _check_whole(name: str, value: float, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise FxcurvError(f"{name}={value} must be a whole number, at least {least}.")
