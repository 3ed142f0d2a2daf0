"""A step that has been computed and not taken: what would become of states and gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fxcurv.runtime.recover import Recovery


@dataclass(frozen=True)
class Proposal:
    """A step that has been computed and not taken.

    trial: its number among the trials. found: what is to be kept of ``results``, the slice's outputs; troubled: that
    some of them were not finite. terms: loss terms behind the statistics. scale: that of a gradient scaler.
    """

    trial: int
    due: frozenset[str]
    found: Recovery
    results: dict[Any, Any]
    terms: float
    scale: float
    troubled: bool = False
