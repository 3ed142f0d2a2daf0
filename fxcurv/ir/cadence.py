"""The op that makes cadence explicit: which of two values a step uses.

``on_due(new, old)`` with cadence c is ``new`` in the steps in which c is due, ``old`` (usually a state) in others.
Slicing a program for a set of due cadences replaces each such node by one of its operands, so nothing is decided while
a slice runs.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import Op
from fxcurv.ir.types import Type


def _reference(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """``new`` when the node's cadence is due (as here), ``old`` in the other steps."""
    return new.clone()


def _infer(new: Type, old: Type) -> Type:
    if new != old:
        raise FxcurvError(f"on_due takes two values of one type, got {new} and {old}.")
    return new


def _samples() -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    yield torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)


on_due = Op("on_due", "(Tensor new, Tensor old) -> Tensor", _reference, _infer, _samples)
