"""A method is eight small parts; a program is what they write.

Each part is abstract or final and has one job: the source of the statistics, the scope it acts on, the estimate of the
curvature, how that is tracked over time, damped, solved with, rescaled, and how often. A published method is a function
that composes parts with the paper's defaults (one file each in this folder). A method that does not fit writes its own
:class:`Scope`: ``emit`` is still just ops.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from fxcurv.errors import FxcurvError
from fxcurv.ir.program import Builder, Program
from fxcurv.ir.types import Diag, Scalar
from fxcurv.methods.facts import Facts, Target

SOURCES = {
    "mc": "labels sampled from the model's own predictions (unbiased for the GGN)",
    "ggn": "exact Gauss-Newton: one backward pass for every output column and position",
    "ggn_signs": "one backward pass for every output column, random signs over rows (unbiased)",
    "logits": "as ggn, with the identity for the Hessian of the loss in the outputs (K-FAC-G)",
    "logits_mc": "the same by standard normal columns at the outputs (unbiased)",
    "empirical": "the gradients of the training loss itself",
    "gradient": "none: only the parameter gradient is used",
    "hessian": "products with the Hessian of the training loss",
    "ggn_product": "products with the generalised Gauss-Newton matrix of the training loss",
}

EUCLIDEAN = {"logits": "ggn", "logits_mc": "mc"}
"""Sources with the identity for the Hessian of the loss, and those whose columns they are otherwise like."""

WEIGHTS_OF_OLD = ("ema", "ema_spectrum", "beta1", "beta2")


@dataclass(frozen=True)
class Source:
    """Where curvature comes from: ``kind`` is a key of SOURCES; ``samples`` counts label draws or probes."""

    kind: str = "mc"
    samples: int = 1

    def __post_init__(self) -> None:
        if self.kind not in SOURCES:
            raise FxcurvError(f"fisher='{self.kind}' is not a source of curvature; choose one of {', '.join(SOURCES)}.")
        if self.samples < 1:
            raise FxcurvError(f"fisher_samples={self.samples} must be at least 1.")

    @property
    def taps(self) -> bool:
        """Whether statistics of layers are captured."""
        return self.columns or self.kind == "empirical"

    @property
    def columns(self) -> bool:
        """Whether ``model.backward`` runs columns of its own from the outputs, for which it has to know the loss."""
        return self.passes in ("mc", "ggn", "ggn_signs")

    @property
    def passes(self) -> str:
        """How columns are made: a source in the Euclidean metric of the outputs makes them as its model does."""
        return EUCLIDEAN.get(self.kind, self.kind)

    @property
    def euclidean(self) -> bool:
        """Whether outputs are measured by their Euclidean norm in place of the loss's Hessian."""
        return self.kind in EUCLIDEAN


@dataclass(frozen=True)
class Every:
    """Periods in steps: statistics every ``factors``, factorisations every ``solve``.

    burst: 0, or the number of steps up to each factorisation, its own included, in which alone statistics are taken.
    """

    factors: int = 1
    solve: int = 1
    burst: int = 0

    def __post_init__(self) -> None:
        for name, period in (("factor_every", self.factors), ("solve_every", self.solve)):
            if period < 1 or period != int(period):
                raise FxcurvError(f"{name}={period} must be a whole number of steps, at least 1.")
        if self.burst < 0 or self.burst != int(self.burst) or self.burst > self.solve:
            raise FxcurvError(f"burst={self.burst} must be a whole number of steps, at most solve_every={self.solve}.")
        if self.burst and self.factors > 1:
            raise FxcurvError(f"burst={self.burst} takes statistics in every step of a burst; leave factor_every=1.")

    def rests(self, step: int) -> bool:
        """Whether a step lies between two bursts, where nothing is measured; the first step never does."""
        return bool(self.burst) and step > 0 and -step % self.solve >= self.burst

    @property
    def cadences(self) -> dict[str, int]:
        """Cadence names of programs."""
        return {"statistics": self.factors, "refresh": self.solve}


class Scope(ABC):
    """Abstract: what one problem is (a layer, a tensor, the network), and the frame in which parts are called."""

    @abstractmethod
    def emit(self, b: Builder, method: Method, facts: Facts) -> None:
        """Write the whole program."""


class Estimate(ABC):
    """Abstract: the curvature of one batch."""

    @abstractmethod
    def measure(self, b: Builder, facts: Facts, target: Target) -> dict[str, fx.Node]:
        """Parts of the estimate by name ("A", "G", ...), normalised to the mean loss."""

    def scale(self, b: Builder, parts: dict[str, fx.Node]) -> fx.Node | None:
        """The number c (or one a group) with which c kron(G, A) is the estimate; ``None`` for 1."""
        return None

    def block(self, parts: dict[str, Tensor]) -> Tensor | None:
        """The dense matrix that a layer's states stand for, undamped, (..., d_out d_in, d_out d_in) in row-major order.

        parts: the layer's states by name ("A", "G", ...), and as "shape" the whole numbers (groups, d_out, d_in,
        whether the last input is constant). ``None`` where the estimate alone does not say.
        """
        return None


class Track(ABC):
    """Abstract: the curvature over time."""

    @abstractmethod
    def follow(self, b: Builder, facts: Facts, target: Target, parts: dict[str, fx.Node]) -> dict[str, fx.Node]:
        """Current values of the parts, kept as states of the same names."""


class Damp(ABC):
    """Abstract: how much is added to the curvature of a layer, and where."""

    @abstractmethod
    def split(self, b: Builder, facts: Facts, factors: dict[str, fx.Node]) -> dict[str, fx.Node]:
        """Damping of every factor."""

    def divide(self, b: Builder, facts: Facts, value: fx.Node, spectrum: fx.Node) -> fx.Node:
        """A gradient in an eigenbasis of the whole block over the block's damped spectrum, elementwise."""
        return b.damped_divide(value, spectrum, hyper(b, facts, "damping"))

    def measure(self, b: Builder, facts: Facts, target: Target) -> dict[str, fx.Node]:
        """Statistics that it needs beside the estimate's, by name; tracked with them."""
        return {}

    def at(self, facts: Facts, target: Target) -> Damp:
        """The damping of one layer, where layers differ."""
        return self

    def order(self, targets: tuple[Target, ...]) -> tuple[Target, ...]:
        """The layers in the order in which their directions are written: after those whose damping theirs follows."""
        return targets


class Solve(ABC):
    """Abstract: from curvature and gradient to a direction; what depends on curvature alone is built at "refresh"."""

    @abstractmethod
    def direction(
        self, b: Builder, method: Method, facts: Facts, target: Target, gradient: fx.Node, parts: dict[str, fx.Node]
    ) -> fx.Node:
        """The preconditioned gradient, of the gradient's type."""

    def block(self, parts: dict[str, Tensor]) -> Tensor | None:
        """The same as :meth:`Estimate.block` where it is the solve that decides what is inverted, else ``None``."""
        return None


class Rescale(ABC):
    """Abstract: a factor on every direction."""

    @abstractmethod
    def factors(self, b: Builder, facts: Facts, pairs: list[tuple[fx.Node, fx.Node]]) -> list[fx.Node]:
        """A scalar for each of the pairs of (direction, gradient); one node for all where the factor is common."""


DECAYS = {
    "decoupled": "theta - lr (direction + weight_decay theta): outside preconditioner, KL clip and momentum",
    "l2": "weight_decay theta is added to the gradient, and preconditioned with it",
}


@dataclass(frozen=True)
class Rule:
    """What ``fxcurv.optimizer`` does with a direction.

    kind: "step" for momentum and a learning rate; "quadratic" for a step that the exact quadratic model of the loss
    decides; "newton" for a whole-optimizer method. The last two are driven by a closure.
    options: further options of that kind with their defaults. decay: how ``weight_decay`` acts, a key of DECAYS.
    """

    kind: str = "step"
    momentum: float = 0.9
    weight_decay: float = 0.0
    nesterov: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    decay: str = "decoupled"

    def __post_init__(self) -> None:
        if self.decay not in DECAYS:
            raise FxcurvError(f"decay='{self.decay}' is unknown; choose one of {', '.join(DECAYS)}.")
        if self.decay == "l2" and self.kind == "newton":
            raise FxcurvError("decay='l2' is for steps along a direction; here put the penalty in the loss.")


@dataclass(frozen=True)
class Method:
    """A second-order method: its parts and its run-time hyper-parameters.

    hyper: numbers the program reads at run time (damping, ema, kl_clip, lr, ...); changing one recompiles nothing.
    aggregated: measure a product S @ (H @ W) behind the aggregation, as (S @ H) @ W (:mod:`fxcurv.layers.aggregate`).
    """

    name: str
    source: Source
    scope: Scope
    every: Every = Every()
    estimate: Estimate | None = None
    track: Track | None = None
    damp: Damp | None = None
    solve: Solve | None = None
    rescale: Rescale | None = None
    rule: Rule = Rule()
    hyper: dict[str, float] = field(default_factory=dict)
    max_factor_dim: int = 8192
    sharing: str = "expand"
    seed: int = 0
    aggregated: bool = False

    def __post_init__(self) -> None:
        if self.sharing not in ("expand", "reduce"):
            raise FxcurvError(f"sharing='{self.sharing}' must be 'expand' or 'reduce'.")
        for name, value in self.hyper.items():
            if not value >= 0:
                raise FxcurvError(f"{name}={value} must not be negative.")
            if name in WEIGHTS_OF_OLD and value > 1:
                raise FxcurvError(f"{name}={value} is the weight of the old value in an average: at most 1.")

    @property
    def exact_products(self) -> bool:
        """Whether a step takes products with the exact Gauss-Newton matrix of its batch."""
        return self.source.kind == "ggn_product" or self.rule.kind == "quadratic"

    def block(self, parts: dict[str, Tensor]) -> Tensor | None:
        """The dense curvature that a layer's states stand for; see :meth:`Estimate.block`."""
        found = self.solve.block(parts) if self.solve is not None else None
        return self.estimate.block(parts) if found is None and self.estimate is not None else found

    def build(self, facts: Facts) -> Program:
        """The update program of this method for a model."""
        b = Builder(self.every.cadences)
        self.scope.emit(b, self, facts)
        return b.finish()


def hyper(b: Builder, facts: Facts, name: str) -> fx.Node:
    """A run-time hyper-parameter as a scalar input."""
    with b.within(at="step", owner=()):
        return b.input("hyper", name, facts.scalar())


def curvature_weight(b: Builder, facts: Facts) -> fx.Node:
    """The factor that turns a sum of squares of captured gradients into the curvature of the mean loss."""
    with b.within(owner=()):
        return b.input("stat", "weight", Scalar((), facts.dtype))


def loss_terms(b: Builder, facts: Facts) -> fx.Node:
    """The number N of loss terms behind the statistics, the divisor of the mean loss."""
    with b.within(owner=()):
        return b.input("stat", "terms", Scalar((), facts.dtype))


def is_diagonal(factor: fx.Node) -> bool:
    """Whether a factor is kept as the vector of its diagonal."""
    return isinstance(factor.meta["type"], Diag)


def flag(factor: fx.Node) -> tuple[bool, ...]:
    """The operand that tells an op which takes a matrix or a diagonal that this is a diagonal."""
    return (True,) if is_diagonal(factor) else ()
