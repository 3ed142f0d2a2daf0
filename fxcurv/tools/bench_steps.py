"""Benchmarks of whole training steps, as ratios to the plain step, timed only after their updates have been compared.

The comparison is with the same method without any optimisation: references in place of kernels and every optional pass
left out, in float64, for steps that take statistics, refresh, and do neither.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import FxcurvError
from fxcurv.losses import Loss
from fxcurv.passes import PASSES
from fxcurv.runtime.module import CurvatureModule
from fxcurv.tools.bench_ops import check_device
from fxcurv.tools.clock import interleaved, ratio
from fxcurv.tools.devices import device as device_by_name
from fxcurv.tools.estimate import estimate
from fxcurv.tools.rows import SKIPPED, WRONG, BenchRow, timed

OPTIONAL = ("share", "simplify", "order", "defer", "batch", "fuse", "views", "memory")
TOLERANCE = 1e-5  # of the largest entry of an update in float64
STEPS = 3  # compared: statistics with a refresh, and two that follow the schedule
BASE = "plain"


@dataclass(frozen=True)
class Workload:
    """A model with one batch. loss: a loss object; options: of ``fxcurv.transform``; hyper: by method."""

    model: nn.Module
    inputs: tuple[Any, ...]
    targets: Tensor
    loss: Loss
    options: Mapping[str, Any] = field(default_factory=dict)
    hyper: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def on(self, device: str, dtype: torch.dtype | None = None) -> Workload:
        """A copy on a device, and in another dtype."""

        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(device, dtype if value.is_floating_point() else None)

        model = copy.deepcopy(self.model).to(device, dtype)
        return replace(self, model=model, inputs=tuple(map(moved, self.inputs)), targets=moved(self.targets))

    def transformed(self, method: str, **options: Any) -> CurvatureModule:
        """A copy of the model under a method."""
        chosen = {**self.options, **self.hyper.get(method, {}), **options}
        return fxcurv.transform(copy.deepcopy(self.model), method, example_inputs=self.inputs, loss=self.loss, **chosen)


def plain_step(work: Workload) -> Callable[[], None]:
    """A step of plain gradient descent."""
    net = copy.deepcopy(work.model)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        work.loss.value(net(*work.inputs), work.targets).backward()
        optimizer.step()

    return step


def curved_step(work: Workload, model: CurvatureModule, due: Mapping[str, bool] | None = None) -> Callable[[], None]:
    """A step under a method; ``due`` forces cadences, without it the schedule decides."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        if due is not None:
            model.due(**due)
        outputs = model(*work.inputs)
        model.backward(work.loss.value(outputs, work.targets), outputs, targets=work.targets)
        model.precondition_()
        optimizer.step()

    return step


def difference(work: Workload, method: str) -> float:
    """Largest difference of the updates to those without any optimisation, relative to their largest entry.

    Every step starts from equal states: of equal eigenvalues any basis will do, and what follows from it may differ.
    """
    exact = work.on("cpu", torch.float64)
    bare = [name for name in OPTIONAL if name in PASSES]
    models = exact.transformed(method), exact.transformed(method, backend="reference", disable=bare)
    worst = 0.0
    for step in range(STEPS):
        updates = []
        models[1].load_state_dict(models[0].state_dict())
        for model in models:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(step)  # both drop the same units
                curved_step(exact, model)()
            updates.append([p.grad for p in model.parameters() if p.grad is not None])
        largest = max((float(u.abs().max()) for u in updates[1] if u.numel()), default=0.0)
        for mine, theirs in zip(*updates, strict=True):
            found = float((mine - theirs).abs().max() / max(largest, 1e-30)) if mine.numel() else 0.0
            worst = max(worst, found if found == found else float("inf"))
    return worst


def bench_methods(
    work: Workload, methods: Sequence[str], device: str = "cpu", rounds: int = 20, case: str = ""
) -> Iterator[BenchRow]:
    """A row for the plain step and one for each method on its own schedule, sides taking turns.

    ratio: mean step over mean plain step, since a schedule has cheap and dear steps.
    """
    check_device(device)
    rows, sides = _compared(work, methods, device, case, "methods")
    here = work.on(device)
    runs = {BASE: plain_step(here), **{m: curved_step(here, here.transformed(m)) for m in sides}}
    times = interleaved(runs, rounds, 2, device)
    for name, spent in times.items():
        mean = statistics.fmean(spent) / statistics.fmean(times[BASE])
        yield timed(rows[name], spent, mean)
    yield from (row for name, row in rows.items() if name not in times)


PARTS: dict[str, dict[str, bool]] = {
    "apply": {"statistics": False, "refresh": False},
    "apply + statistics": {"statistics": True, "refresh": False},
    "apply + statistics + refresh": {"statistics": True, "refresh": True},
}
DUE = {"apply": (), "apply + statistics": ("statistics",), "apply + statistics + refresh": ("statistics", "refresh")}


def bench_step(
    work: Workload, method: str, device: str = "cpu", rounds: int = 20, case: str = ""
) -> Iterator[BenchRow]:
    """Rows for the plain step and for steps with nothing else, statistics, and a refresh due, beside the estimate."""
    check_device(device)
    rows, sides = _compared(work, [method], device, case, "step")
    if not sides:
        yield from (row for name, row in rows.items() if name != BASE)
        return
    here = work.on(device)
    model = here.transformed(method)
    runs: dict[str, Callable[[], None]] = {BASE: plain_step(here)}
    curved_step(here, model)()  # the first step is due in everything
    for part, due in PARTS.items():
        runs[part] = curved_step(here, model, due)
    guess = estimate(model, device_by_name("cpu")) if device == "cpu" else None
    times = interleaved(runs, rounds, 2, device)
    for name, spent in times.items():
        row = replace(rows[BASE if name == BASE else method], side=name)
        if guess is not None and name in DUE:
            row = replace(row, estimate=guess.step_ratio(DUE[name]))
        yield timed(row, spent, ratio(times, name, BASE))


def _compared(
    work: Workload, methods: Iterable[str], device: str, case: str, bench: str
) -> tuple[dict[str, BenchRow], list[str]]:
    """Rows to be filled in by side, and the methods that may be timed."""
    rows = {BASE: BenchRow(bench, BASE, BASE, case, device, torch.get_num_threads())}
    right = []
    for method in methods:
        row = BenchRow(bench, method, method, case, device, torch.get_num_threads())
        try:
            error = difference(work, method)
        except FxcurvError as error_:
            rows[method] = replace(row, status=SKIPPED, note=" ".join(str(error_).split()))
            continue
        rows[method] = replace(row, error=error)
        if error > TOLERANCE:
            note = "its updates differ from those without optimisations, so it is not timed"
            rows[method] = replace(rows[method], status=WRONG, note=note)
        else:
            right.append(method)
    return rows, right
