"""Numbers that a step hands to the program: hyper-parameters, the step, the number of loss terms.

They are 0-dimensional tensors, so that changing one compiles nothing anew, and they lie where the program runs: a
number on the host would be copied by the ops that read it, and each copy makes the host wait for the device. Filling
one does not wait, and one that has not changed is not filled again.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

HOST = torch.device("cpu")


class Numbers:
    """The latest tensors by name, in one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.device = HOST
        self._known: dict[str, tuple[float, Tensor]] = {}

    def place(self, tensors: Iterable[Tensor]) -> None:
        """Follow the tensors that the program works on. On several devices at once, numbers stay on the host."""
        devices = {tensor.device for tensor in tensors}
        device = devices.pop() if len(devices) == 1 else HOST
        if device != self.device:
            self._known.clear()
            self.device = device

    def tensor(self, name: str, value: float) -> Tensor:
        """A number as a tensor, which nobody may write to."""
        known = self._known.get(name)
        if known is None or known[0] != value:
            known = value, torch.full((), value, dtype=self.dtype, device=self.device)
            self._known[name] = known
        return known[1]
