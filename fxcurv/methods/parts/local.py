"""Local problems as a scope: every layer is fitted to targets of its own, and what it loses is its direction."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from types import SimpleNamespace

from torch import fx

from fxcurv.errors import FxcurvError, FxcurvWarning
from fxcurv.ir.ops.local import INNER
from fxcurv.ir.program import Builder
from fxcurv.layers.sequence import IDENTITY
from fxcurv.methods.facts import Facts, Target
from fxcurv.methods.method import Method, Scope, Source, flag, hyper
from fxcurv.methods.parts.estimate import moment

NUMBERS = ("gamma", "proximal", "inner_lr", "beta1", "beta2", "epsilon")


@dataclass(frozen=True)
class LocalProblems(Scope):
    """D = W_t - W, W the end of ``steps`` steps of a first-order method on each layer's local loss.

    matching: the loss is that of the layer's activation, else (and where that is unknown) the squared one. inner: a key
    of :data:`fxcurv.ir.ops.local.INNER`. closed: the squared loss is minimised exactly instead.
    """

    matching: bool = False
    inner: str = "rmsprop"
    steps: int = 10
    closed: bool = False

    def emit(self, b: Builder, method: Method, facts: Facts) -> None:
        unknown = [target.name for target in facts.targets if not target.activation]
        if self.matching and unknown:
            warnings.warn(
                f"'{method.name}' fits {', '.join(unknown[:5])}{' and others' if len(unknown) > 5 else ''} by the "
                "squared loss, because what follows there is no activation with a matching loss.",
                FxcurvWarning,
                stacklevel=2,
            )
        for target in facts.targets:
            with b.within(owner=(target.name,)):
                solve = self._minimum if self.closed else self._descent
                target.update(b, solve(b, facts, target, target.gradient(b)))

    def _minimum(self, b: Builder, facts: Facts, target: Target, gradient: fx.Node) -> fx.Node:
        """gamma V (H + proximal I)^-1, the end of infinitely many steps (Amid et al. 2022, section 4)."""
        total = moment(b, facts, target.rows(b, "a"), target.d_in, target.diagonal_input)
        solved = b.right_apply(gradient, b.inverse(total, hyper(b, facts, "proximal"), *flag(total)))
        return b.scale(solved, hyper(b, facts, "gamma"))

    def _descent(self, b: Builder, facts: Facts, target: Target, gradient: fx.Node) -> fx.Node:
        inner, rows = INNER[self.inner], target.rows(b, "a")
        count = b.count(rows)
        slots = {"first": inner.first, "second": inner.second}
        type_ = gradient.meta["type"]
        old = {p: b.input("state", f"{target.name}.{p}", type_, init) if init else 0.0 for p, init in slots.items()}
        updates: fx.Node | float = 0.0
        if inner.counts:
            updates = b.input("state", f"{target.name}.updates", facts.scalar(), init="zeros")
            b.give("state", f"{target.name}.updates", b.tick(updates, count))
        rest = (*old.values(), updates, count, *(hyper(b, facts, name) for name in NUMBERS))
        activation = target.activation if self.matching and target.activation else IDENTITY
        narrow = target.d_in <= facts.max_factor_dim
        if target.diagonal_input or (activation == IDENTITY and narrow):
            total = b.diag_gram(rows) if target.diagonal_input else b.gram(rows)
            fitted = b.fit_squared(gradient, total, *rest, self.inner, self.steps)
        else:
            fitted = b.fit_matching(gradient, rows, target.weights(b), *rest, activation, self.inner, self.steps)
        for place, part in enumerate(slots, 1):
            if slots[part]:
                b.give("state", f"{target.name}.{part}", b.item(fitted, place))
        return b.item(fitted, 0)


def local_method(name: str, o: SimpleNamespace, scope: LocalProblems) -> Method:
    """A LocoProp method of hyper-parameters ``o``; raises :class:`FxcurvError` on what local problems cannot do."""
    if o.inner not in INNER:
        raise FxcurvError(f"inner='{o.inner}' is unknown; choose one of {', '.join(INNER)}.")
    if o.inner_steps < 1 or o.inner_steps != int(o.inner_steps):
        raise FxcurvError(f"inner_steps={o.inner_steps} must be a whole number of steps, at least 1.")
    if o.eta is not None and not o.eta > 0:
        raise FxcurvError(f"eta={o.eta} must be positive, or None for no proximal term.")
    if scope.closed and o.eta is None:
        raise FxcurvError("solve='closed' needs the proximal term: give eta, for example eta=1.0.")
    if o.factor_every != 1:
        raise FxcurvError(
            f"factor_every={o.factor_every} does not go with '{name}', which fits layers to the inputs of the batch "
            "whose gradient it uses: leave factor_every=1."
        )
    if o.sharing != "expand":
        raise FxcurvError(f"'{name}' has a target for every position: leave sharing='expand'.")
    numbers = {"gamma": o.gamma, "inner_lr": o.inner_lr, "proximal": 0.0 if o.eta is None else 1.0 / o.eta}
    return Method(name=name, source=Source("empirical"), scope=scope, hyper=numbers)
