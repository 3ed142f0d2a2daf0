"""Capture: from a model and a call of it to a forward graph that runs with the user's module as ``self``."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fxcurv.capture.call import Call
from fxcurv.capture.captured import Captured, parameter_names, resolve
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
}
"""Front-ends by name, in the order in which ``auto`` tries them."""


def capture(model: nn.Module, call: Call, frontend: str = "auto") -> Captured:
    """The forward graph of ``model`` for calls with the signature ``call``.

    frontend: a name of ``FRONTENDS``, or "auto": the first that succeeds (``export`` needs a call with real tensors).

    The model, its ``training`` flags, buffers and gradients and all random number generators are left as they were.
    Raises FxcurvError when the front-end is unknown or none can capture the model; it names the construct.
    """
    if frontend != "auto":
        if frontend not in FRONTENDS:
            raise FxcurvError(f"there is no front-end '{frontend}'; choose one of: auto, {', '.join(FRONTENDS)}.")
        return FRONTENDS[frontend](model, call)
    try:
        return capture_symbolic(model, call)
    except FxcurvError as first:
        if not call.real:
            raise
        try:
            return capture_export(model, call)
        except FxcurvError as second:
            raise nothing_captures(first) from second


__all__ = [
    "FRONTENDS",
    "Call",
    "Captured",
    "Runner",
    "capture",
    "capture_export",
    "capture_symbolic",
    "parameter_names",
    "propagate",
    "resolve",
    "source",
]
