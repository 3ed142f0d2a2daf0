"""fxcurv.optimizer: a ``torch.optim.Optimizer`` with the complete update rule of a model's method."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fxcurv.errors import FxcurvError
from fxcurv.runtime.averaging import average, averaged
from fxcurv.runtime.info import StepInfo
from fxcurv.runtime.module import CurvatureModule
from fxcurv.runtime.newton import NEWTON, newton_step
from fxcurv.runtime.quadratic import QUADRATIC, quadratic_options, quadratic_step

OPTIONS: dict[str, dict[str, Any]] = {
    "step": {"averaging": 0.0},
    "newton": {"averaging": 0.0, **NEWTON},
    "quadratic": QUADRATIC,
}
"""What an optimizer takes beside learning rate and momentum, with defaults, by the kind of its method's rule."""


class CurvatureOptimizer(Optimizer):
    """Preconditions, then steps: v = momentum v + direction, p = p - lr (v + weight_decay p).

    With ``nesterov``, direction + momentum v takes the place of v in the step, as in ``torch.optim.SGD``.
    Weight decay is decoupled: outside the preconditioner, the KL clip and the momentum (Zhang et al. 2018); of a method
    with decay="l2" it is part of the gradient that is preconditioned. ``info`` is
    the :class:`StepInfo` of the last step. A step whose gradients are not finite changes no parameter.
    """

    def __init__(self, model: CurvatureModule, defaults: dict[str, Any]) -> None:
        self.model = model
        self.info: StepInfo | None = None
        super().__init__([p for p in model.parameters() if p.requires_grad], defaults)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients, and forget the statistics that belong to them."""
        super().zero_grad(set_to_none)
        self.model.discard()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One step. closure: zeroes the gradients, runs the model and ``model.backward``, returns the loss.

        Raises :class:`FxcurvError` without a closure for a method that evaluates the loss again.
        """
        method = self.model._engine.method
        if method.rule.kind != "step":
            if closure is None:
                raise FxcurvError(f"'{method.name}' evaluates the loss several times a step: call opt.step(closure).")
            group = self.param_groups[0]
            if method.rule.kind == "newton":
                value, self.info = newton_step(self.model, group, closure)
            else:
                value, self.info = quadratic_step(self.model, group, self.state, closure)
            self._average()
            return value
        loss: Tensor | None = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if method.rule.decay == "l2":
            groups = self.param_groups
            self.model._engine.decays = {p: group["weight_decay"] for group in groups for p in group["params"]}
        self.info = self.model._precondition(None, float(self.param_groups[0]["lr"]))
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not all(bool(torch.isfinite(p.grad).all()) for p in parameters if p.grad is not None):
            return loss
        for group in self.param_groups:
            self._descend(group)
        self._average()
        return loss

    def averaged(self) -> AbstractContextManager[None]:
        """A context in which the model has the averages of its parameters over the steps (option ``averaging``)."""
        return averaged(self)

    def _average(self) -> None:
        for group in self.param_groups:
            average(group, self.state)

    def _descend(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        directions = [p.grad for p in parameters]
        if group["momentum"]:
            velocities = []
            for p in parameters:
                state = self.state[p]
                if "velocity" not in state:
                    state["velocity"] = torch.zeros_like(p)
                velocities.append(state["velocity"])
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, directions)
            if group["nesterov"]:
                directions = list(torch._foreach_add(directions, velocities, alpha=group["momentum"]))
            else:
                directions = velocities
        rate = float(group["lr"])
        if group["weight_decay"] and self.model._engine.method.rule.decay == "decoupled":
            torch._foreach_mul_(parameters, 1.0 - rate * group["weight_decay"])
        torch._foreach_add_(parameters, directions, alpha=-rate)


def optimizer(
    model: CurvatureModule,
    lr: float | None = None,
    momentum: float | None = None,
    weight_decay: float | None = None,
    nesterov: bool | None = None,
    **options: Any,
) -> CurvatureOptimizer:
    """The optimizer of a transformed model, with the method's defaults for what is not given.

    options: of a whole-optimizer method (see ``fxcurv methods NAME``); raises :class:`FxcurvError` on an unknown one.
    """
    if not isinstance(model, CurvatureModule):
        raise FxcurvError("fxcurv.optimizer takes a model made by fxcurv.transform.")
    engine = model._engine
    rule = engine.method.rule
    extra = OPTIONS[rule.kind]
    unknown = sorted(set(options) - set(extra))
    if unknown:
        known = ", ".join(("lr", "momentum", "weight_decay", "nesterov", *extra))
        raise FxcurvError(f"the optimizer of '{engine.method.name}' has no option '{unknown[0]}'; it has {known}.")
    if rule.kind == "quadratic":
        given = {"momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        unused = next((name for name, value in given.items() if value is not None), None)
        if unused is not None:
            raise FxcurvError(f"step='quadratic' has no use for {unused}=; it has fixed_momentum= and l2=.")
        return CurvatureOptimizer(model, quadratic_options(engine.hyper["damping"], lr, {**rule.options, **options}))
    defaults = {
        "lr": engine.hyper.get("lr", 0.1) if lr is None else lr,
        "momentum": rule.momentum if momentum is None else momentum,
        "weight_decay": rule.weight_decay if weight_decay is None else weight_decay,
        "nesterov": rule.nesterov if nesterov is None else bool(nesterov),
    }
    for name, value in defaults.items():
        if value < 0:
            raise FxcurvError(f"{name}={value} must not be negative.")
    defaults |= {**extra, **options}
    if rule.kind == "newton":
        defaults["damping"] = engine.hyper["damping"]
    return CurvatureOptimizer(model, defaults)
