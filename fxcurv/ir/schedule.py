"""Cadences on a schedule: when one falls due, and what the name of a shifted one says.

``refresh_3`` is the cadence ``refresh`` with the same period and an offset of 3 steps: what the pass ``stagger`` makes
of factorisations that need not be renewed together. ``refresh_first`` is the part of it for the first step alone, and
for any other that is told to refresh: what a later refresh follows from there. In the first step everything is due.
"""

from __future__ import annotations

FIRST = "refresh_first"
RETIRED = "retired"
"""The part of a state ``fc.retired`` which says, once it is 1, that no state that only layer fc reads changes any more
with statistics or a refresh. The run time then stops to measure and to refresh that layer."""
NEVER = 10**9  # the period of what is not repeated


def base_of(cadence: str) -> str:
    """The cadence that a shifted one belongs to; any other is its own."""
    name, _, offset = cadence.rpartition("_")
    return name if name and (offset.isdigit() or offset == "first") else cadence


def offset_of(cadence: str) -> int:
    """Steps by which a cadence is shifted."""
    tail = cadence.rpartition("_")[2]
    return int(tail) if base_of(cadence) != cadence and tail.isdigit() else 0


def falls_due(cadence: str, period: int, step: int) -> bool:
    """Whether a cadence is due in a step by schedule."""
    return step == 0 or step % period == offset_of(cadence) % period
