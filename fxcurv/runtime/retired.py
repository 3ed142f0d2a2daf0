"""Layers whose curvature has settled for good: what a program says about them, and what is saved.

A program decides on the device that a layer is over, in a state ``fc.retired`` (see :mod:`fxcurv.ir.schedule`). The
host looks at these numbers after a step with statistics, when it has waited for the step's flags anyway. From then on
the taps of such a layer measure nothing, its part of a refresh is sliced away, and once all layers have retired
neither statistics nor a refresh fall due. What is computed stays the same but for one thing: an inverse that is not
computed again keeps the damping that it was computed with.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fxcurv.ir.program import Program, Role
from fxcurv.ir.schedule import RETIRED
from fxcurv.passes.lower import Lowered
from fxcurv.runtime.states import States


class Retirement:
    """The retired layers of a program with ``layers``; ``forget`` when states have changed."""

    def __init__(self, program: Program, layers: Iterable[str]) -> None:
        self.layers = frozenset(layers)
        suffix = f".{RETIRED}"
        self.roles: dict[str, Role] = {
            key[: -len(suffix)]: role
            for role in program.inputs("state")
            for key in role.keys
            if key.endswith(suffix) and key[: -len(suffix)] in self.layers
        }
        self.known: frozenset[str] | None = None if self.roles else frozenset()

    def forget(self) -> None:
        """Look at the states again when next asked."""
        if self.roles:
            self.known = None

    def names(self, states: States) -> frozenset[str]:
        """Names of the layers that are over."""
        if self.known is None:
            numbers = torch.stack([states.values[role].cpu() for role in self.roles.values()])
            over = (numbers > 0).tolist()
            self.known = frozenset(name for name, gone in zip(self.roles, over, strict=True) if gone)
        return self.known

    def complete(self, states: States) -> bool:
        """Whether every layer is over."""
        return bool(self.roles) and self.names(states) == self.layers


def still_read(lowered: Lowered, retired: frozenset[str]) -> frozenset[str]:
    """Keys of the statistics that steps read when these layers are over."""
    whole = lowered.slice(lowered.program.cadences, bundled=True, retired=retired)
    return frozenset(key for role in whole.inputs if role.kind == "stat" for key in role.keys)
