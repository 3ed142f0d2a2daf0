"""Capture: from a model and a call of it to a forward graph that runs with the user's module as ``self``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import final

from torch import nn

from fxcurv.capture.call import Call
from fxcurv.capture.captured import Captured, parameter_names, resolve
from fxcurv.capture.dynamo import capture_dynamo
from fxcurv.capture.dynamo_stitched import StitchedRunner
from fxcurv.capture.explain import nothing_captures
from fxcurv.capture.export import capture_export
from fxcurv.capture.runner import Runner
from fxcurv.capture.shapes import propagate
from fxcurv.capture.symbolic import capture_symbolic
from fxcurv.capture.where import source
from fxcurv.errors import FxcurvError

FRONTENDS: dict[str, Callable[[nn.Module, Call], Captured]] = {
    "symbolic": capture_symbolic,
    "export": capture_export,
    "dynamo": capture_dynamo,
}
"""Front-ends by name, in the order in which ``auto`` tries them."""


def capture(model: nn.Module, call: Call, frontend: str = "auto") -> Captured:
    """The forward graph of ``model`` for calls with the signature ``call``.

    frontend: a name of ``FRONTENDS``, or "auto": the first that succeeds (all but ``symbolic`` need a call with real
    tensors).

    The model, its ``training`` flags, buffers and gradients and all random number generators are left as they were.
    Raises FxcurvError when the front-end is unknown or none can capture the model; it names the construct.
    """
    attempts = Attempts(model, call, frontend)
    for captured in attempts:
        return captured
    raise attempts.error()


@final
class Attempts:
    """The captures of a model by one front-end after the other, each made when it is asked for.

    frontend: as in :func:`capture`. Raises FxcurvError when it is unknown.
    """

    def __init__(self, model: nn.Module, call: Call, frontend: str = "auto") -> None:
        if frontend != "auto" and frontend not in FRONTENDS:
            raise FxcurvError(f"there is no front-end '{frontend}'; choose one of: auto, {', '.join(FRONTENDS)}.")
        self.automatic = frontend == "auto"
        self._model, self._call = model, call
        names = list(FRONTENDS) if call.real else ["symbolic"]
        self._left = names if self.automatic else [frontend]
        self._failures: dict[str, FxcurvError] = {}

    def __iter__(self) -> Iterator[Captured]:
        """Those that succeed."""
        while self._left:
            name = self._left.pop(0)
            try:
                yield FRONTENDS[name](self._model, self._call)
            except FxcurvError as error:
                self.failed(name, error)

    def failed(self, name: str, error: FxcurvError) -> None:
        """Note why a front-end will not do."""
        self._failures[name] = error

    def error(self) -> FxcurvError:
        """The one error of all front-ends together."""
        return nothing_captures(self._failures) if self.automatic else next(iter(self._failures.values()))


__all__ = [
    "FRONTENDS",
    "Attempts",
    "Call",
    "Captured",
    "Runner",
    "StitchedRunner",
    "capture",
    "capture_dynamo",
    "capture_export",
    "capture_symbolic",
    "parameter_names",
    "propagate",
    "resolve",
    "source",
]
