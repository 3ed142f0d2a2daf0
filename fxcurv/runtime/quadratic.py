"""A step that an exact quadratic model decides: K-FAC's complete algorithm, for any method with a damping.

The program turns the gradient of h = loss + l2/2 |w|^2 into a proposal D. With F the exact Gauss-Newton matrix of the
batch (not the method's approximation of it) and C = F + (damping + l2) I, the step is d = alpha D + mu d0, d0 the last
step, with the alpha and mu that minimise M(d) = d^T C d / 2 + h'^T d: the length of the proposal and the momentum come
out of a 2 x 2 system, for one Jacobian-vector product a direction. The ratio of what h did to what M said moves the
damping (Levenberg-Marquardt). The program has a strength of its own, gamma, which its curvature is damped with: now and
then neighbours of gamma are tried, and the one of the lowest M stays.

Source: Martens & Grosse 2015, sections 6 and 7, algorithm 2; sheet kronecker-1, kfac, steps 1-10. Here the gradient,
the statistics and F are all of the whole batch: on the graph of one forward a part of it would cost no less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fxcurv.capture.state import preserved, remember_random_state
from fxcurv.errors import FxcurvError
from fxcurv.ir.program import REFRESH
from fxcurv.runtime.batch import of_all_ranks
from fxcurv.runtime.engine import Engine
from fxcurv.runtime.info import StepInfo
from fxcurv.runtime.module import CurvatureModule
from fxcurv.runtime.proposal import Proposal
from fxcurv.runtime.trust import adapted

QUADRATIC: dict[str, Any] = {
    "l2": 1e-5,  # eta: the objective is the loss + l2/2 |parameters|^2
    "fixed_momentum": None,  # mu; None: from the quadratic model, with alpha
    "damping_every": 5,  # T1, steps between changes of the damping; 0: never
    "gamma_every": 20,  # T2, steps between searches for gamma; 0: gamma is sqrt(damping + l2)
    "damping_decay": 0.95,  # w, of the damping in a step: w1 = w^T1; of gamma w2 = w^(T2/2)
    "min_damping": 1e-8,
    "damped_prediction": True,  # whether the predicted change includes the damping's term, as in the paper
    "warmup": 0,  # first steps, which take statistics only
    "averaging": 0.99,  # xi, of the parameters: see opt.averaged(); 0: none
}
RENEWED = 3  # first steps, each of which renews the factorisations
LAST = "step"  # name of the last step in the optimizer's state


@dataclass(frozen=True)
class Plane:
    """M(alpha D + mu d0): the quadratic model on the plane of a proposal D and the last step d0.

    curvature: v^T C w of (D, d0); slopes: h'^T v; squares: v^T w.
    """

    curvature: tuple[tuple[float, float], tuple[float, float]]
    slopes: tuple[float, float]
    squares: tuple[tuple[float, float], tuple[float, float]]

    def minimum(self, mu: float | None, tiny: float) -> tuple[float, float]:
        """The best (alpha, mu), or (alpha, mu) with the best alpha for a given mu.

        Where D and d0 are parallel, up to ``tiny`` = 1 - cos^2 in the metric C, the best alpha alone. NaN where D has
        no positive curvature: it is zero, or not finite.
        """
        (a, b), (_, c), (p, q) = *self.curvature, self.slopes
        if not a > 0:
            return math.nan, math.nan
        if mu is not None:
            return -(mu * b + p) / a, mu
        determinant = a * c - b * b
        if not determinant > tiny * a * c:
            return -p / a, 0.0
        return (b * q - c * p) / determinant, (b * p - a * q) / determinant

    def value(self, alpha: float, mu: float) -> float:
        """M, 0 at the origin."""
        return 0.5 * _form(self.curvature, alpha, mu) + alpha * self.slopes[0] + mu * self.slopes[1]

    def square(self, alpha: float, mu: float) -> float:
        """|alpha D + mu d0|^2."""
        return _form(self.squares, alpha, mu)


def _form(matrix: Sequence[Sequence[float]], x: float, y: float) -> float:
    return x * x * matrix[0][0] + 2.0 * x * y * matrix[0][1] + y * y * matrix[1][1]


def quadratic_options(damping: float, lr: float | None, given: dict[str, Any]) -> dict[str, Any]:
    """What a parameter group starts with; raises :class:`FxcurvError` for an option out of its range."""
    options = {"lr": 1.0 if lr is None else lr, **QUADRATIC, **given}
    for name, value in options.items():
        if value is not None and value < 0:
            raise FxcurvError(f"{name}={value} must not be negative.")
    for name in ("damping_every", "gamma_every", "warmup"):
        if options[name] != int(options[name]):
            raise FxcurvError(f"{name}={options[name]} must be a whole number of steps.")
    for name in ("damping_decay", "averaging"):
        if options[name] > 1:
            raise FxcurvError(f"{name}={options[name]} is a weight of something old: at most 1.")
    return {**options, "damping": damping, "gamma": math.sqrt(damping + options["l2"]), "steps": 0}


def quadratic_step(
    model: CurvatureModule, group: dict[str, Any], state: dict[Tensor, dict[str, Any]], closure: Callable[[], Tensor]
) -> tuple[Tensor, StepInfo]:
    """One step. group: the options above, ``lr`` (a factor on the step), and what changes: ``damping``, ``gamma`` and
    ``steps``. state: the last step by parameter. A step whose numbers are not finite moves nothing.

    Raises :class:`FxcurvError` when the closure returns no loss, or has not called ``model.backward``.
    """
    engine = model._engine
    engine.hyper["damping"] = float(group["damping"])
    group["steps"] += 1
    k = group["steps"] - int(group["warmup"])
    gammas = _gammas(engine, group, k)
    replay = remember_random_state()
    with torch.enable_grad():
        loss = closure()
    if not isinstance(loss, Tensor):
        raise FxcurvError(f"the closure given to opt.step must return the loss, got a {type(loss).__name__}.")
    moving = {name: p for name, p in engine.parameters().items() if p.grad is not None}
    for p in moving.values():
        p.grad.add_(p.detach(), alpha=float(group["l2"]))  # type: ignore[union-attr]
    products = of_all_ranks(engine, engine.due(), engine.exact)
    gradients = [p.grad.detach().clone() for p in moving.values()]  # type: ignore[union-attr]
    proposals = engine.propose(trials=[{"damping": gamma**2} for gamma in gammas])
    if k <= 0:
        return loss.detach(), _taken(model, proposals[0])
    last = [state[p].get(LAST, torch.zeros_like(p)) for p in moving.values()]
    directions = [[-u for u in engine.directions(proposal).values()] for proposal in proposals]
    strength = float(group["damping"]) + float(group["l2"])
    planes = _planes(engine, products, directions, last, gradients, list(moving), strength)
    rate, tiny = float(group["lr"]), 1e3 * torch.finfo(engine.dtype).eps
    points = [tuple(rate * x for x in plane.minimum(group["fixed_momentum"], tiny)) for plane in planes]
    values = [plane.value(*point) for plane, point in zip(planes, points, strict=True)]
    usable = [i for i, value in enumerate(values) if math.isfinite(value)]
    i = min(usable, key=values.__getitem__, default=0)
    info = _taken(model, proposals[i])
    if not usable:
        return loss.detach(), info
    group["gamma"] = gammas[proposals[i].trial]
    (alpha, mu), predicted = points[i], values[i]
    step = [alpha * d + mu * d0 for d, d0 in zip(directions[i], last, strict=True)]
    start = [p.detach().clone() for p in moving.values()]
    _move(moving.values(), start, step)
    for p, d in zip(moving.values(), step, strict=True):
        state[p][LAST] = d
    change = None
    if group["damping_every"] and k % int(group["damping_every"]) == 0:
        device = engine.device_of("")
        with preserved(engine.model), torch.no_grad():
            replay()
            after, before = (engine.ranks.mean(float(x), device) for x in (closure(), loss.detach()))
        dots = _dots([start, step]).tolist()
        change = after - before + float(group["l2"]) * (dots[0][1] + 0.5 * dots[1][1])
        if not group["damped_prediction"]:
            predicted -= 0.5 * float(group["damping"]) * planes[i].square(alpha, mu)
        lower = float(group["damping_decay"]) ** int(group["damping_every"])
        group["damping"] = adapted(group["damping"], change, predicted, lower, 1.0 / lower, group["min_damping"])
        if not math.isfinite(change):  # taken back
            _move(moving.values(), start, [torch.zeros_like(d) for d in step])
            for p in moving.values():
                del state[p][LAST]
    return loss.detach(), replace(info, rate=alpha, momentum=mu, predicted=predicted, change=change)


def _gammas(engine: Engine, group: dict[str, Any], k: int) -> list[float]:
    """What to damp the program's curvature with, the current value first; asks for the refresh that they need."""
    every, floor = int(group["gamma_every"]), math.sqrt(group["min_damping"])
    if not every:
        group["gamma"] = math.sqrt(group["damping"] + group["l2"])
    gamma = float(group["gamma"])
    searching = every > 0 and k > 1 and (k - 1) % every == 0
    if engine.forced[REFRESH] is None and (searching or 0 < k <= RENEWED):
        engine.forced[REFRESH] = True
    if not searching or engine.forced[REFRESH] is False:
        return [gamma]
    factor = float(group["damping_decay"]) ** (0.5 * every)
    return [gamma, max(gamma * factor, floor), gamma / factor]


def _planes(
    engine: Engine,
    products: Any,
    directions: list[list[Tensor]],
    last: list[Tensor],
    gradients: list[Tensor],
    names: list[str],
    strength: float,
) -> list[Plane]:
    """The planes of some proposals; all lists follow ``names``."""
    vectors = [*directions, last]
    named = [dict(zip(names, vector, strict=True)) for vector in vectors]
    whole = [[v.get(n, torch.zeros_like(p)) for n, p in engine.parameters().items()] for v in named]
    dots = _dots([*vectors, gradients])
    squares, slopes = dots[:-1, :-1], dots[-1].tolist()
    curvature = (products.forms(whole).to(dots.device) + strength * squares).tolist()
    last_one, sizes = len(directions), squares.tolist()

    def part(matrix: list[list[float]], i: int) -> Any:
        return tuple(tuple(matrix[r][c] for c in (i, last_one)) for r in (i, last_one))

    return [Plane(part(curvature, i), (slopes[i], slopes[last_one]), part(sizes, i)) for i in range(len(directions))]


def _dots(vectors: Sequence[Sequence[Tensor]]) -> Tensor:
    """Inner products of vectors that are lists of tensors, (k, k) in float64."""
    total = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for parts in zip(*vectors, strict=True):
        rows = torch.stack([part.detach().reshape(-1) for part in parts])
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        total = total.to(rows.device) + (rows @ rows.mT).double()
    return total


def _move(parameters: Iterable[Tensor], start: list[Tensor], step: list[Tensor]) -> None:
    with torch.no_grad():
        for p, origin, d in zip(parameters, start, step, strict=True):
            p.copy_(origin + d)


def _taken(model: CurvatureModule, proposal: Proposal) -> StepInfo:
    info = model._engine.take(proposal)
    model._arm()
    return info
