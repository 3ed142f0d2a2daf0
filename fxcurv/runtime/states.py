"""The curvature state: one tensor for every state of the program, saved under stable names.

Names are ``<layer>.<part>`` (``encoder.0.A``, ``encoder.0.A.inverse``), never node names. A state that sharing merged
is saved under each of its names, and the copies must be equal when they are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.ir.program import Program, Role
from fxcurv.ir.types import Type
from fxcurv.runtime.values import Values


class States:
    """Values of a program's states, by role. ``device_of`` gives the device of a state's owner."""

    def __init__(self, program: Program, device_of: Callable[[str], torch.device]) -> None:
        self.types: dict[Role, Type] = {}
        self.values = Values()
        for role, node in program.inputs("state").items():
            self.types[role] = node.meta["type"]
            self.values[role] = initial(role, node.meta["type"], device_of((node.meta["owner"] or ("",))[0]))
        self.by_key = {key: role for role in self.types for key in role.keys}

    def clone(self) -> States:
        """An independent copy."""
        other = object.__new__(States)
        other.types, other.by_key = self.types, self.by_key
        other.values = self.values.clone()
        return other

    def read(self, key: str) -> Tensor:
        """The value of a state under any of its names."""
        return self.values[self.by_key[key]]

    def named(self) -> dict[str, Tensor]:
        """All values under all their names."""
        return {key: self.values[role] for key, role in self.by_key.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all states, a shared one counted once."""
        return sum(value.numel() * value.element_size() for value in self.values.values())

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow a ``module.to``: states change device, never dtype."""

        def moved(value: Tensor) -> Tensor:
            device = fn(value.new_empty(0)).device
            from_meta = value.is_meta and device.type != "meta"  # as by ``to_empty``: there is nothing to copy
            return torch.zeros_like(value, device=device) if from_meta else value.to(device)

        self.values.change(moved)

    def check(self, entries: Mapping[str, Tensor]) -> dict[Role, Tensor]:
        """Values by role from saved entries; raises :class:`FxcurvError` on a wrong shape or unequal shared copies."""
        found: dict[Role, Tensor] = {}
        for key, value in entries.items():
            role = self.by_key[key]
            shape = tuple(self.values[role].shape)
            if tuple(value.shape) != shape:
                raise FxcurvError(
                    f"curvature.{key} has shape {tuple(value.shape)} in the state dict but {shape} here; it belongs to "
                    "another model or another max_factor_dim."
                )
            if role in found and not torch.equal(found[role], value.to(found[role])):
                raise FxcurvError(
                    f"curvature.{role.key} and curvature.{key} are one shared state here but differ in the state dict; "
                    "transform with disable=('share',) to load it."
                )
            found.setdefault(role, value)
        return found

    def load(self, values: Mapping[Role, Tensor]) -> None:
        """Take over values of :meth:`check`, keeping device and dtype."""
        for role, value in values.items():
            self.values[role] = value.detach().to(self.values[role], copy=True)


def initial(role: Role, type_: Type, device: torch.device) -> Tensor:
    """How a state starts: zeros, ones, or a (batch of) identity.

    Nothing writes into a state, so zeros and ones are one number expanded: they take memory from the first step on.
    """
    shape = tuple(size or 0 for size in type_.shape)
    if role.init == "ones":
        return torch.ones((), dtype=type_.dtype, device=device).expand(shape)
    if role.init == "eye":
        return torch.eye(shape[-1], dtype=type_.dtype, device=device).expand(shape).clone()
    return torch.zeros((), dtype=type_.dtype, device=device).expand(shape)
