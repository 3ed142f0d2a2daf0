"""The estimate behind ``fxcurv explain``: seconds of every part of a step on a device, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxcurv.ir.program import STATISTICS, STEP
from fxcurv.runtime.module import CurvatureModule
from fxcurv.tools.devices import Device
from fxcurv.tools.dryrun import DryRun, dry_run
from fxcurv.tools.execute import Executor
from fxcurv.tools.items import Item, node_items, tap_items
from fxcurv.tools.recorder import Work


@dataclass(frozen=True)
class Part:
    """Cost of one evaluation of a part of a step. every: steps between two."""

    every: int
    flops: float
    bytes: float
    launches: int
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """A transformed model on a device.

    plain: forward, backward and a gradient step of the plain model. second: one backward pass of the source, columns:
    how many there are. rewritten: what the tapped forward and backward cost beyond the plain ones.
    nodes, taps: items of the program and of the taps.
    """

    module: CurvatureModule
    device: Device
    dry: DryRun
    plain: Part
    second: Part
    rewritten: Part
    nodes: Mapping[fx.Node, Item]
    taps: tuple[Item, ...]

    @property
    def columns(self) -> int:
        """Backward passes of the source before the plain one."""
        return self.dry.columns

    @property
    def periods(self) -> dict[str, int]:
        """Steps between two evaluations, by cadence."""
        return dict(self.module.program.cadences)

    def items(self, cadence: str) -> list[Item]:
        """Everything that is evaluated when a cadence is due."""
        return [item for item in (*self.taps, *self.nodes.values()) if item.cadence == cadence]

    def part(self, cadence: str) -> Part:
        """Cost of one evaluation of a cadence, without the source's own backward passes."""
        return part((w for item in self.items(cadence) for w in item.works), self.device, self.periods[cadence])

    @property
    def source_seconds(self) -> float:
        """What statistics cost beside reductions: the source's backward passes and a rewritten forward."""
        return self.columns * self.second.seconds + self.rewritten.seconds

    def ratio(self, periods: Mapping[str, int] | None = None, columns: int | None = None) -> float:
        """An average step in units of the plain one; of other periods, or another number of backward passes."""
        chosen = {**self.periods, **(periods or {})}
        seconds = sum(self.part(cadence).seconds / chosen[cadence] for cadence in self.periods)
        passes = self.columns if columns is None else columns
        if self.taps or self.columns:
            seconds += (passes * self.second.seconds + self.rewritten.seconds) / chosen.get(STATISTICS, 1)
        return 1.0 + seconds / self.plain.seconds

    def step_ratio(self, due: Iterable[str]) -> float:
        """A step in which these cadences are due, in units of the plain one."""
        wanted = {STEP, *due}
        seconds = sum(self.part(cadence).seconds for cadence in wanted if cadence in self.periods)
        if STATISTICS in wanted and self.taps:
            seconds += self.source_seconds
        return 1.0 + seconds / self.plain.seconds


def estimate(module: CurvatureModule, device: Device) -> Estimate:
    """Work out every part; raises :class:`FxcurvError` where no example call tells the shapes."""
    dry = dry_run(module)
    executor = Executor(_rows(module), device.kind)
    nodes = node_items(module, executor)
    taps = tuple(tap_items(module, executor, dry.columns)) if module._engine.method.source.taps else ()
    plain = part((*dry.plain, *_update(module)), device, 1)
    second = part(dry.second, device, 1)
    more = part(dry.tapped, device, 1)
    less = part(dry.plain, device, 1)
    rewritten = Part(
        1,
        max(0.0, more.flops - less.flops),
        max(0.0, more.bytes - less.bytes),
        max(0, more.launches - less.launches),
        max(0.0, more.seconds - less.seconds),
    )
    return Estimate(module, device, dry, plain, second, rewritten, nodes, taps)


def part(works: Iterable[Work], device: Device, every: int) -> Part:
    """The sum of works."""
    found = list(works)
    launches = sum(work.count for work in found)
    return Part(every, _sum(found, "flops"), _sum(found, "bytes"), launches, device.seconds(found))


def _sum(works: Iterable[Work], what: str) -> float:
    return float(sum(getattr(work, what) * work.count for work in works))


def _update(module: CurvatureModule) -> list[Work]:
    """A step of plain gradient descent: each parameter and gradient read, each parameter written."""
    return [
        Work("pointwise", 2.0 * p.numel(), 3.0 * p.numel() * p.element_size(), p.dtype)
        for p in module._engine.parameters().values()
    ]


def _rows(module: CurvatureModule) -> int:
    """Rows of a statistic that no type tells: those of the batch."""
    leaves: Any = module._engine.compilation.options["call"].leaves
    return max((int(leaf.shape[0]) for leaf in leaves if leaf.ndim), default=1)
