"""The step of Hessian-free optimisation after the linear solve (sheet matrix-free, 43: steps 5-7).

The program has solved for the direction and kept iterates of conjugate gradients. Here the true loss decides: which
iterate, what step length, and whether the damping was right. Everything is evaluated on the closure's batch with the
random draws of its first evaluation, or dropout would decide; trials leave no trace on buffers (BatchNorm's averages).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxcurv.capture.state import preserved, remember_random_state
from fxcurv.errors import FxcurvError
from fxcurv.runtime.info import StepInfo
from fxcurv.runtime.module import CurvatureModule

NEWTON: dict[str, Any] = {
    "backtrack": 0.8,  # factor on the step length
    "armijo": 1e-2,  # required share of the linear decrease
    "tries": 60,  # of the line search, after which the step is rejected
    "raise_damping": 1.5,  # when the true decrease is below a quarter of the predicted one
    "lower_damping": 2.0 / 3.0,  # when it is above three quarters
    "min_damping": 1e-8,
}


def newton_step(
    model: CurvatureModule, group: dict[str, Any], closure: Callable[[], Tensor]
) -> tuple[Tensor, StepInfo]:
    """One outer iteration; ``group`` holds the options above, ``lr`` (first step length tried) and ``damping``."""
    engine = model._engine
    parameters = list(engine.parameters().values())
    engine.hyper["damping"] = float(group["damping"])
    replay = remember_random_state()
    with torch.enable_grad():
        loss = closure()
    if not isinstance(loss, Tensor):
        raise FxcurvError(f"the closure given to opt.step must return the loss, got a {type(loss).__name__}.")
    gradient = _flatten(p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters)
    info = model._precondition(None, None)
    start = [p.detach().clone() for p in parameters]
    device = engine.device_of("")
    before = engine.ranks.mean(float(loss.detach()), device)

    def value(step: Tensor) -> float:
        _move(parameters, start, step)
        with preserved(engine.model), torch.no_grad():
            replay()
            return engine.ranks.mean(float(closure()), device)

    iterates, models = engine.info["iterates"], engine.info["model_values"]
    best, chosen = value(iterates[-1]), len(iterates) - 1
    while chosen > 0:
        candidate = value(iterates[chosen - 1])
        if not candidate < best and best == best:
            break
        best, chosen = candidate, chosen - 1
    step, predicted = iterates[chosen], float(models[chosen])
    if predicted < 0:
        ratio = (best - before) / predicted
        if not ratio >= 0.25:
            group["damping"] *= group["raise_damping"]
        elif ratio > 0.75:
            group["damping"] = max(group["damping"] * group["lower_damping"], group["min_damping"])
    slope = float(torch.dot(gradient.to(step), step))
    rate = float(group["lr"])
    for _ in range(int(group["tries"])):
        if value(step * rate) <= before + group["armijo"] * rate * slope:
            break
        rate *= group["backtrack"]
    else:
        rate = 0.0
    _move(parameters, start, step * rate)
    return loss.detach(), info


def _flatten(tensors: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def _move(parameters: list[nn.Parameter], start: list[Tensor], step: Tensor) -> None:
    offset = 0
    with torch.no_grad():
        for parameter, origin in zip(parameters, start, strict=True):
            if parameter.requires_grad:  # the start from the last solution still has entries of one frozen since
                part = step[offset : offset + parameter.numel()].view_as(parameter)
                parameter.copy_(origin + part.to(parameter))
            offset += parameter.numel()
