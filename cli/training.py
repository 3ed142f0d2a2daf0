"""The training loop behind ``fxcurv train``: batches, closure, counters, and checkpoints that resume bit for bit."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxcurv.cli.build import call_model, unpack_batch
from fxcurv.cli.modelfile import ModelFile
from fxcurv.errors import FxcurvError
from fxcurv.losses import resolve_loss
from fxcurv.runtime import CurvatureModule
from fxcurv.runtime.optimizer import CurvatureOptimizer

SMOOTH = 0.9  # weight of the old value in the smoothed loss
FORMAT = "fxcurv checkpoint 1"


class Training:
    """A run: ``step`` finished steps, the next one takes batch ``position`` of ``epoch``."""

    def __init__(self, file: ModelFile, model: CurvatureModule, opt: CurvatureOptimizer) -> None:
        batches = file.function("batches")
        if batches is None:
            raise FxcurvError(f"{file.path} has no 'batches(epoch)': define it to yield pairs (inputs, targets).")
        loss = resolve_loss(file.loss)
        if loss is None:
            raise FxcurvError(f"{file.path} has no 'loss': define it, or pass --loss cross_entropy.")
        self.file, self.model, self.opt, self.loss, self.batches = file, model, opt, loss, batches
        self.step = self.epoch = self.position = 0
        self.seconds = self.smooth = 0.0
        self.losses: list[float] = []
        self._supplied: Iterator[Any] | None = None
        self.refreshes = self.fallbacks = self.repaired = self.kept = 0

    def steps_in(self, epochs: int) -> int:
        """Steps that the given number of epochs has."""
        with self.file.running():
            return sum(1 for epoch in range(epochs) for _ in self.batches(epoch))

    def run(self, total: int, show: Callable[[int, str], None]) -> None:
        """Train up to ``total`` steps in all; ``show(step, note)`` after each."""
        self.model.train()
        while self.step < total:
            value = self.advance()
            show(self.step, self._note(value))

    def advance(self) -> float:
        """One step of a model in training mode; its loss. Only the step is timed, not what makes the batch."""
        if self._supplied is None:
            self._supplied = self._supply()
        inputs, targets = unpack_batch(self.file, next(self._supplied))
        start = time.perf_counter()
        value = self._step(inputs, targets)
        self.seconds += time.perf_counter() - start
        self.smooth = value if not self.step else SMOOTH * self.smooth + (1 - SMOOTH) * value
        self.losses.append(value)
        self.step += 1
        self.position += 1
        return value

    def _step(self, inputs: Any, targets: Any) -> float:
        def closure() -> Tensor:
            self.opt.zero_grad()
            outputs = call_model(self.model, inputs)
            if not isinstance(outputs, Tensor):
                raise FxcurvError(f"the model returns a {type(outputs).__name__}; train needs one tensor for the loss.")
            loss = self.loss.value(outputs, targets)
            self.model.backward(loss, outputs, targets=targets)
            return loss

        value = self.opt.step(closure)
        info = self.opt.info
        if info is not None:
            self.refreshes += info.refresh
            self.fallbacks += len(info.fallback)
            self.repaired += len(info.repaired)
            self.kept += len(info.kept)
        assert value is not None
        return float(value.detach())

    def _supply(self) -> Iterator[Any]:
        """Batches from the current position on, epoch after epoch; skipping leaves the random state alone."""
        state = torch.get_rng_state()
        supply = iter(self.batches(self.epoch))
        for _ in islice(supply, self.position):
            pass
        torch.set_rng_state(state)
        while True:
            yield from supply
            if self.position == 0:
                raise FxcurvError(f"{self.file.path}: 'batches({self.epoch})' yields nothing.")
            self.epoch, self.position = self.epoch + 1, 0
            supply = iter(self.batches(self.epoch))

    def _note(self, value: float) -> str:
        parts = [f"loss {value:.4g}", f"smoothed {self.smooth:.4g}"]
        parts.append(f"{len(self.losses) / self.seconds:.1f} steps/s" if self.seconds else "")
        scale = self.opt.info.kl_scale if self.opt.info is not None else None
        if scale is not None:
            parts.append(f"KL scale {scale:.3g}")
        parts.append(f"refreshes {self.refreshes}")
        if self.fallbacks:
            parts.append(f"fallbacks {self.fallbacks}")
        return "  ".join(part for part in parts if part)

    def result(self) -> dict[str, Any]:
        """The numbers of the run; ``losses`` are those since the start or the resumption."""
        evaluate = self.file.function("evaluate")
        scores = {}
        if evaluate is not None:
            with self.file.running(), torch.no_grad():
                scores = {name: float(score) for name, score in evaluate(self.model).items()}
        return {
            "steps": self.step,
            "first_loss": self.losses[0] if self.losses else None,
            "final_loss": self.losses[-1] if self.losses else None,
            "smoothed_loss": self.smooth,
            "seconds": self.seconds,
            "steps_per_second": len(self.losses) / self.seconds if self.seconds else None,
            "refreshes": self.refreshes,
            "fallbacks": self.fallbacks,
            "repaired": self.repaired,
            "kept": self.kept,
            "losses": self.losses,
            "scores": scores,
        }

    def save(self, path: Path) -> None:
        """Write a checkpoint under a temporary name, then rename it."""
        content = {
            "format": FORMAT,
            "method": self.model._engine.method.name,
            "model": dict(self.model.state_dict()),
            "optimizer": self.opt.state_dict(),
            "step": self.step,
            "epoch": self.epoch,
            "position": self.position,
            "smooth": self.smooth,
            "rng": torch.get_rng_state(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                torch.save(content, stream)
            os.replace(scratch, path)
        except BaseException:
            os.unlink(scratch)
            raise

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint; raises :class:`FxcurvError` when it is none or of another method or model."""
        if not path.is_file():
            raise FxcurvError(f"there is no checkpoint '{path}'.")
        try:
            content = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:
            raise FxcurvError(f"'{path}' is not a checkpoint of fxcurv train ({type(error).__name__}).") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise FxcurvError(f"'{path}' is not a checkpoint of fxcurv train.")
        name = self.model._engine.method.name
        if content["method"] != name:
            raise FxcurvError(f"'{path}' is of method '{content['method']}'; pass --method {content['method']}.")
        try:
            self.model.load_state_dict(content["model"])
            self.opt.load_state_dict(content["optimizer"])
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise FxcurvError(f"'{path}' does not fit this model: {reason}") from error
        self.step, self.epoch, self.position = content["step"], content["epoch"], content["position"]
        self.smooth = content["smooth"]
        self._supplied = None
        torch.set_rng_state(content["rng"])
