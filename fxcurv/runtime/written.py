"""Which gradients are update directions already: preconditioning one twice would be silent nonsense.

A direction is recognised by its tensor and the version that autograd counts for it: whatever writes to it since, be it
``zero_grad(set_to_none=False)`` or another backward pass, changes the version.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fxcurv.errors import FxcurvError


class Written:
    """The directions of the last step, as long as they live."""

    def __init__(self) -> None:
        self._versions = WeakTensorKeyDictionary()

    def mark(self, gradient: Tensor) -> None:
        """``gradient`` holds a direction now."""
        self._versions[gradient] = gradient._version

    def check(self, gradients: Iterable[Tensor | None]) -> None:
        """Raises :class:`FxcurvError` when there are gradients and all of them are directions."""
        present = [gradient for gradient in gradients if gradient is not None]
        if present and all(self._versions.get(gradient) == gradient._version for gradient in present):
            raise FxcurvError(
                "these gradients have been turned into update directions already: run a backward pass before the next "
                "precondition_() or step()."
            )
