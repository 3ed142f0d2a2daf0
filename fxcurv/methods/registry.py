"""Published methods by name, with their defaults; the one place that turns hyper-parameters into a :class:`Method`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from fxcurv.errors import FxcurvError
from fxcurv.methods.method import Every, Method, Rule

Composer = Callable[[SimpleNamespace], Method]

COMMON: dict[str, Any] = {
    "factor_every": 1,  # steps between statistics
    "solve_every": 10,  # steps between factorisations
    "burst": 0,  # statistics only in so many steps up to each factorisation; 0: every factor_every steps
    "max_factor_dim": 8192,  # a wider factor is kept diagonal
    "sharing": "expand",  # positions of a shared weight: "expand" or "reduce"
    "lr": 0.1,  # learning rate that the KL clip assumes; fxcurv.optimizer supplies its own
    "momentum": 0.9,  # of fxcurv.optimizer
    "nesterov": False,  # whether fxcurv.optimizer looks ahead by its momentum
    "weight_decay": 0.0,  # of fxcurv.optimizer
    "decay": "decoupled",  # "l2": weight_decay times the weights is added to the gradient, before the preconditioner
    "step": "fixed",  # of fxcurv.optimizer: lr and momentum; "quadratic": both from an exact quadratic model
    "seed": 0,  # of label sampling and probes
}
RUN_TIME = (
    *("damping", "trace_floor", "ema", "ema_spectrum", "kl_clip", "lr"),
    *("epsilon", "beta1", "beta2", "hessian_power", "zeta"),
)
STEPS: dict[str, dict[str, Any]] = {
    "fixed": {},
    "quadratic": {"damping": 150.0, "solve_every": 20, "kl_clip": None},
}
"""Kinds of steps with the defaults that they change in a method that has them (Martens & Grosse 2015: lambda_0, T3)."""
PUBLISHED: dict[str, Published] = {}


@dataclass(frozen=True)
class Published:
    """A method of a paper: call it with hyper-parameters to get a :class:`Method`.

    defaults: every hyper-parameter with its default. papers: numbers in papers.toml.
    """

    name: str
    compose: Composer
    defaults: dict[str, Any]
    papers: tuple[int, ...]

    @property
    def summary(self) -> str:
        """First line of the documentation."""
        return next(iter(self.doc.strip().splitlines()), "")

    @property
    def doc(self) -> str:
        """The documentation."""
        return self.compose.__doc__ or ""

    def __call__(self, **hyper: Any) -> Method:
        unknown = sorted(set(hyper) - set(self.defaults))
        if unknown:
            known = ", ".join(sorted(self.defaults))
            raise FxcurvError(f"method '{self.name}' has no hyper-parameter '{unknown[0]}'; it has {known}.")
        step = hyper.get("step", self.defaults["step"])
        if step not in STEPS:
            raise FxcurvError(f"step='{step}' is unknown; choose one of {', '.join(STEPS)}.")
        other = {} if step == self.defaults["step"] else STEPS[step]  # a method's own defaults are for its own step
        changed = {name: value for name, value in other.items() if name in self.defaults}
        o = SimpleNamespace(**{**self.defaults, **changed, **hyper})
        method = self.compose(o)
        for name, default in self.defaults.items():
            value = getattr(o, name)
            numeric = isinstance(default, (int, float)) or name in RUN_TIME
            if numeric and value is not None and not isinstance(value, (int, float)):
                raise FxcurvError(f"{name}={value!r} of method '{self.name}' must be a number.")
        numbers = {n: float(getattr(o, n)) for n in RUN_TIME if getattr(o, n, None) is not None}
        return replace(
            method,
            name=self.name,
            hyper={**method.hyper, **numbers},
            every=Every(o.factor_every, o.solve_every, o.burst),
            rule=self._rule(method.rule, o),
            max_factor_dim=o.max_factor_dim,
            sharing=o.sharing,
            seed=o.seed,
        )

    def _rule(self, own: Rule, o: SimpleNamespace) -> Rule:
        kind = own.kind
        if o.step == "quadratic":
            if kind != "step" or "damping" not in self.defaults:
                why = "is a whole optimizer already" if kind != "step" else "has no damping to adapt"
                raise FxcurvError(f"step='quadratic' does not go with method '{self.name}', which {why}.")
            if o.weight_decay:
                raise FxcurvError("step='quadratic' has an l2 in its objective: use that in place of weight_decay.")
            kind = "quadratic"
        return Rule(kind, o.momentum, o.weight_decay, bool(o.nesterov), own.options, o.decay)


def published(name: str, papers: tuple[int, ...] = (), **defaults: Any) -> Callable[[Composer], Published]:
    """Register a composition of parts under ``name``; ``defaults`` are its hyper-parameters beside the common ones.

    Those of RUN_TIME are read by the program as it runs. Any other number that ops should read so, ``hyper(b, facts,
    "floor")``, the composition puts into its Method: ``Method(hyper={"floor": o.floor}, ...)``.
    """

    def add(compose: Composer) -> Published:
        if name in PUBLISHED:
            raise FxcurvError(f"method '{name}' is defined twice.")
        PUBLISHED[name] = Published(name, compose, {**COMMON, **defaults}, papers)
        return PUBLISHED[name]

    return add


def get_method(method: str | Method, **hyper: Any) -> Method:
    """A method by name with hyper-parameters, or a ready :class:`Method` (which takes run-time numbers only)."""
    if isinstance(method, Method):
        unknown = sorted(set(hyper) - set(method.hyper))
        if unknown:
            known = ", ".join(method.hyper)
            raise FxcurvError(f"the given Method has no run-time number '{unknown[0]}'; it has {known}.")
        return replace(method, hyper={**method.hyper, **{name: float(value) for name, value in hyper.items()}})
    if not isinstance(method, str):
        raise FxcurvError(f"method= is a {type(method).__name__}; pass a name or a Method.")
    if method not in PUBLISHED:
        near = difflib.get_close_matches(method, PUBLISHED, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(PUBLISHED))}."
        raise FxcurvError(f"there is no method '{method}'; {hint}")
    return PUBLISHED[method](**hyper)
