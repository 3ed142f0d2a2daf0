"""From a model file and options to a transformed model: what the verbs share once torch is loaded."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import fxcurv
from fxcurv.cli import render
from fxcurv.cli.modelfile import ModelFile
from fxcurv.errors import FxcurvError
from fxcurv.methods import PUBLISHED, get_method
from fxcurv.runtime import CurvatureModule
from fxcurv.runtime.optimizer import OPTIONS


def split_hyper(file: ModelFile, method: str, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(hyper-parameters of the method, options of its optimizer) from the file's settings and the given ones.

    Raises :class:`FxcurvError` for an unknown method or hyper-parameter.
    """
    if method not in PUBLISHED:
        get_method(method)  # raises with the nearest names
    hyper = file.hyper(method, given)
    known = PUBLISHED[method].defaults
    kind = get_method(method, **{name: value for name, value in hyper.items() if name in known}).rule.kind
    options = {name: hyper.pop(name) for name in list(hyper) if name not in known and name in OPTIONS[kind]}
    return hyper, options


def build(file: ModelFile, method: str, hyper: dict[str, Any], **options: Any) -> CurvatureModule:
    """``fxcurv.transform`` on the model of a file, with a spinner."""
    with render.working(f"compiling {file.path.name} for {method}: capture, layers, passes, proofs"):
        return transformed(file, method, hyper, **options)


def transformed(file: ModelFile, method: str, hyper: dict[str, Any], **options: Any) -> CurvatureModule:
    """``fxcurv.transform`` on the model of a file; a fault in the user's forward is one sentence too."""
    chosen, _ = split_hyper(file, method, hyper)
    with file.running(), hushed():
        return fxcurv.transform(
            file.model, method, example_inputs=file.example_inputs, loss=file.loss, **options, **chosen
        )


@contextmanager
def hushed() -> Iterator[None]:
    """Hold standard error back, and drop it when an :class:`FxcurvError` says what matters: torch prints graphs."""
    log, held = logging.getLogger("torch"), io.StringIO()
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(held):
            yield
    except FxcurvError:
        held.truncate(0)
        raise
    finally:
        log.setLevel(level)
        sys.stderr.write(held.getvalue())


def first_batch(file: ModelFile) -> tuple[Any, Any] | None:
    """The first (inputs, targets) of the file's epoch 0; ``None`` without ``batches``."""
    batches = file.function("batches")
    if batches is None:
        return None
    with file.running():
        return unpack_batch(file, next(iter(batches(0)), None))


def unpack_batch(file: ModelFile, batch: Any) -> tuple[Any, Any]:
    """(inputs, targets) of a batch; raises :class:`FxcurvError` when it is something else."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        what = "nothing" if batch is None else f"a {type(batch).__name__}"
        raise FxcurvError(f"{file.path}: 'batches(epoch)' yields {what}; it must yield pairs (inputs, targets).")
    return batch[0], batch[1]


def call_model(model: Any, inputs: Any) -> Any:
    """The model's output for the inputs of a batch: a tuple of arguments, a dictionary of them, or one tensor."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)
