"""One training of a comparison: a method with a setting and a seed, advanced in slices and never the end of the others.

Whatever goes wrong in it is the reason of its row: the method refuses the model, an error in a step, a loss that runs
away. Equal seeds mean equal initial weights and equal batches; times are of steps alone.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from fxcurv.cli.build import split_hyper, transformed, unpack_batch
from fxcurv.cli.draws import Stream, own_batches
from fxcurv.cli.modelfile import ModelFile
from fxcurv.cli.store import Store
from fxcurv.cli.training import Training
from fxcurv.errors import FxcurvError, FxcurvWarning
from fxcurv.ir.program import REFRESH
from fxcurv.ir.schedule import base_of
from fxcurv.runtime import CurvatureModule, optimizer
from fxcurv.tools.allocated import allocated_peak

RUNAWAY = 1e3  # times the first loss
COUNTS = ("refreshes", "fallbacks", "repaired", "kept")
FINISHED, DIVERGED, FAILED = "finished", "diverged", "failed"


class Attempt:
    """A training of ``steps`` steps; ``outcome`` is ``None`` until it has ended.

    losses, seconds: by step; seconds since the first step. memory: bytes, see :meth:`begin`.
    """

    def __init__(self, file: ModelFile, method: str, hyper: Mapping[str, Any], seed: int, steps: int) -> None:
        self.file, self.method, self.hyper, self.seed, self.steps = file, method, dict(hyper), seed, steps
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.memory: dict[str, int | None] = {}
        self.notes: dict[str, None] = {}
        self.outcome: dict[str, Any] | None = None
        self._training: Training | None = None
        self._refreshes = False  # whether the method has anything to do at a refresh
        self._stream = Stream(seed)

    def begin(
        self,
        options: Mapping[str, Any],
        kept: Mapping[str, Any] | None = None,
        store: Store | None = None,
        measure: bool = True,
    ) -> None:
        """Transform a copy of the file's model; go on from what :meth:`keep` has kept.

        Two first steps on another copy, which is thrown away, measure the most memory alive at once in a step in which
        everything is due, and do what is done once (kernels are chosen and compiled), so that no method is timed for
        it. memory: "states" that the method keeps, "parameters", and "peak" of that step beyond both; nothing of this
        without ``measure``.
        """
        with self._guarded():
            module = self._module(options)
            training = self._loop(module)
            self._refreshes = any(base_of(node.meta["every"]) == REFRESH for node in module.program.nodes)
            if measure:
                self.memory = {
                    "states": module.report().state_bytes,
                    "parameters": sum(p.numel() * p.element_size() for p in module.parameters()),
                    "peak": self._measured(module),
                }
            if kept is not None and store is not None:
                with self._stream.active():
                    training.resume(store.checkpoint(self.key(store, options)))
                self.losses, self.seconds = list(kept["losses"]), list(kept["seconds"])
                training.losses, training.seconds = list(self.losses), self.seconds[-1]
                for name in COUNTS:
                    setattr(training, name, kept["counts"][name])
            self._training = training

    def advance(self, count: int) -> None:
        """Up to ``count`` further steps; the last of all evaluates the file's scores and ends the attempt."""
        training = self._training
        assert training is not None and self.outcome is None
        with self._guarded(), self._stream.active(), self.file.running():
            training.model.train()
            for _ in range(min(count, self.steps - len(self.losses))):
                value = training.advance()
                self.losses.append(value)
                self.seconds.append(training.seconds)
                if not math.isfinite(value) or value > RUNAWAY * max(abs(self.losses[0]), 1e-12):
                    self._end(DIVERGED, f"diverged at step {len(self.losses)}")
                    return
            if len(self.losses) >= self.steps:
                training.model.eval()
                self._end(FINISHED, "")

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self.outcome is not None

    def _end(self, status: str, reason: str) -> None:
        training = self._training
        counts = {name: getattr(training, name, 0) for name in COUNTS}
        scores = training.result()["scores"] if training is not None and status == FINISHED else {}
        self.outcome = {
            "method": self.method,
            "hyper": self.hyper,
            "seed": self.seed,
            "status": status,
            "reason": reason,
            "losses": self.losses,
            "seconds": self.seconds,
            "counts": counts if self._refreshes else {**counts, "refreshes": 0},
            "memory": self.memory,
            "scores": scores,
            "notes": list(self.notes),
        }
        self._training = None  # the memory of one that has ended is for the others

    def key(self, store: Store, options: Mapping[str, Any]) -> str:
        """Under which this training is kept."""
        return store.key(self.method, self.hyper, self.seed, self.steps, dict(options))

    def keep(self, store: Store, options: Mapping[str, Any]) -> None:
        """Keep the outcome, or a checkpoint of what has been done so far."""
        key = self.key(store, options)
        if self.outcome is not None:
            store.put(key, self.outcome)
        elif self._training is not None and self.losses and store.folder is not None:
            with self._stream.active():
                self._training.save(store.checkpoint(key))
            counts = {name: getattr(self._training, name) for name in COUNTS}
            store.put(f"{key}.part", {"losses": self.losses, "seconds": self.seconds, "counts": counts})

    def _module(self, options: Mapping[str, Any]) -> CurvatureModule:
        file = replace(self.file, model=copy.deepcopy(self.file.model))
        seeded = {"seed": self.seed, **self.hyper}
        with self._stream.active():
            return transformed(file, self.method, seeded, **options)

    def _loop(self, module: CurvatureModule) -> Training:
        training = Training(self.file, module, optimizer(module, **split_hyper(self.file, self.method, self.hyper)[1]))
        training.batches = own_batches(training.batches, self.seed)
        return training

    def _measured(self, module: CurvatureModule) -> int | None:
        trial = self._loop(copy.deepcopy(module))

        batch = unpack_batch(self.file, next(iter(trial.batches(0)), None))

        def step() -> None:
            if trial.model._engine.method.rule.kind != "newton":
                trial.model.due(statistics=True, refresh=True)
            trial._step(*batch)

        with Stream(self.seed).active(), self.file.running():
            trial.model.train()
            return allocated_peak(step, before=step)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turn errors into the reason why this attempt has failed, and collect fxcurv's warnings."""
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", FxcurvWarning)
            try:
                yield
            except FxcurvError as error:
                self._end(FAILED, " ".join(str(error).split()))
            except (RuntimeError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
                self._end(FAILED, " ".join(f"{type(error).__name__}: {error}".split())[:300])
        self.notes |= dict.fromkeys(" ".join(str(one.message).split()) for one in found)


def smoothed(values: list[float], steps: int, window: int) -> float | None:
    """Mean of the last ``window`` of the first ``steps`` values; ``None`` when there are not that many."""
    if steps < 1 or len(values) < steps:
        return None
    part = values[max(0, steps - window) : steps]
    return sum(part) / len(part)
