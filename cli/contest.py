"""The runs of ``fxcurv compare``: for each method a short search for its setting, then all of them in turns.

Search: successive halving with the first seed. All points take N/8 steps, the best third of them three times as many,
and so on, until one is left. Then, for each seed, the methods take turns of a few steps, so that whatever else slows
the machine slows all alike.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fxcurv.cli.attempt import DIVERGED, FAILED, Attempt, smoothed
from fxcurv.cli.contenders import Contender
from fxcurv.cli.modelfile import ModelFile
from fxcurv.cli.store import Store

TURN = 5  # steps before it is the next one's turn
KEPT = 3  # of this many settings one goes on to the next rung


class Lanes(Protocol):
    """Where progress is shown: a lane for each method."""

    def show(self, lane: str, done: int, total: int, note: str) -> None:
        """``done`` of ``total`` steps, and what there is to say."""


@dataclass(frozen=True)
class Result:
    """What a method did. searched: a point of the grid each, with the smoothed loss of its last rung ("loss", infinite
    when it failed), the steps that it took, and the reason if it failed; hyper: the chosen one; runs: one a seed."""

    method: str
    hyper: dict[str, Any]
    searched: list[dict[str, Any]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Contest:
    """A comparison. load: the model file for a seed; options: of ``fxcurv.transform``."""

    load: Callable[[int], ModelFile]
    steps: int
    seeds: Sequence[int]
    options: Mapping[str, Any]
    store: Store
    lanes: Lanes

    @property
    def window(self) -> int:
        """Steps that a loss is averaged over."""
        return max(1, min(10, self.steps // 10))

    def run(self, contenders: Sequence[Contender]) -> list[Result]:
        """All results, in the order of the contenders; on Ctrl-C what has been done is kept, and it is raised."""
        with Interrupts() as interrupts:
            found = [Result(c.method, *self._search(c, interrupts)) for c in contenders]
            for seed in self.seeds:
                runs = self._race(seed, found, interrupts)
                for result in found:
                    result.runs.append(runs[result.method])
        return found

    def _search(self, contender: Contender, interrupts: Interrupts) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """(chosen setting, what every point reached)."""
        points = contender.points
        if len(points) == 1:
            return points[0], []
        method, seed = contender.method, self.seeds[0]
        key = self.store.key(method, "search", points, seed, self.steps, dict(self.options))
        kept = self.store.get(key)
        if kept is None:
            kept = self._halving(method, points, seed, interrupts)
            self.store.put(key, kept)
        return kept["hyper"], kept["searched"]

    def _halving(
        self, method: str, points: Sequence[dict[str, Any]], seed: int, interrupts: Interrupts
    ) -> dict[str, Any]:
        file = self.load(seed)
        attempts = [Attempt(file, method, point, seed, self.steps) for point in points]
        left = list(attempts)
        plan = rungs(len(points), self.steps)
        total = sum(alive * (steps - before) for alive, before, steps in plan)
        done = 0
        for _, before, steps in plan:
            for attempt in left:
                if not before:
                    attempt.begin(self.options, measure=False)
                while not attempt.done and len(attempt.losses) < steps:
                    interrupts.check()
                    attempt.advance(min(TURN, steps - len(attempt.losses)))
                    self.lanes.show(method, done + len(attempt.losses) - before, total, f"search: {_now(attempt)}")
                done += steps - before
            left = sorted(left, key=self._reached)[: math.ceil(len(left) / KEPT)]
        searched = [
            {
                "hyper": attempt.hyper,
                "loss": self._reached(attempt),
                "steps": len(attempt.losses),
                "reason": attempt.outcome["reason"] if attempt.outcome else "",
            }
            for attempt in attempts
        ]
        return {"hyper": left[0].hyper, "searched": searched}

    def _reached(self, attempt: Attempt) -> float:
        if attempt.outcome is not None and attempt.outcome["status"] in (DIVERGED, FAILED):
            return math.inf
        found = smoothed(attempt.losses, len(attempt.losses), self.window)
        return math.inf if found is None else found

    def _race(self, seed: int, results: Sequence[Result], interrupts: Interrupts) -> dict[str, dict[str, Any]]:
        """The outcomes of one seed by method."""
        file = self.load(seed)
        found: dict[str, dict[str, Any]] = {}
        racing: list[Attempt] = []
        for result in results:
            attempt = Attempt(file, result.method, result.hyper, seed, self.steps)
            key = attempt.key(self.store, self.options)
            kept = self.store.get(key)
            if kept is not None:
                found[result.method] = kept
                self.lanes.show(result.method, self.steps, self.steps, "kept from before")
                continue
            racing.append(attempt)
        for attempt in racing:
            interrupts.check()
            part = self.store.get(f"{attempt.key(self.store, self.options)}.part")
            self.lanes.show(attempt.method, 0, self.steps, "compiling")
            attempt.begin(self.options, part, self.store)
            self.lanes.show(attempt.method, len(attempt.losses), self.steps, _now(attempt))
        try:
            while racing:
                for attempt in racing:
                    interrupts.check()
                    if not attempt.done:
                        attempt.advance(TURN)
                    self.lanes.show(attempt.method, len(attempt.losses), self.steps, f"seed {seed}: {_now(attempt)}")
                    if attempt.outcome is not None:
                        attempt.keep(self.store, self.options)
                        found[attempt.method] = attempt.outcome
                racing = [attempt for attempt in racing if not attempt.done]
        except KeyboardInterrupt:
            for attempt in racing:
                attempt.keep(self.store, self.options)
            raise
        return found


def rungs(points: int, steps: int) -> list[tuple[int, int, int]]:
    """(settings, steps that they have taken, steps that they then have) until one setting is left."""
    found, before, goal = [], 0, max(1, min(steps, max(3, steps // 8)))
    while points > 1:
        found.append((points, before, goal))
        points, before, goal = math.ceil(points / KEPT), goal, min(steps, KEPT * goal)
    return found


def _now(attempt: Attempt) -> str:
    if attempt.outcome is not None and attempt.outcome["reason"]:
        return str(attempt.outcome["reason"])
    return f"loss {attempt.losses[-1]:.4g}" if attempt.losses else "compiled"


class Interrupts:
    """Ctrl-C between two steps: the first one waits until ``check`` is called, a second one acts at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interrupts:
        try:
            self.before: Any = signal.signal(signal.SIGINT, self._note)
        except ValueError:  # not in the main thread, where no Ctrl-C arrives
            self.before = None
        return self

    def __exit__(self, *exc: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)

    def _note(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def check(self) -> None:
        """Raises :class:`KeyboardInterrupt` if it has been asked for."""
        if self.asked:
            raise KeyboardInterrupt
