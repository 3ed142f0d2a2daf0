"""Which gradients are update directions already: preconditioning one twice would be silent nonsense.

A direction is recognised by its tensor and the version that autograd counts for it: whatever writes to it since, be it
``zero_grad(set_to_none=False)`` or another backward pass, changes the version.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from fxcurv.errors import FxcurvError


class Written:
    """The directions of the last step, as long as they live: a gradient carries the mark itself."""

    MARK = "_fxcurv_direction"

    def mark(self, gradient: Tensor) -> None:
        """``gradient`` holds a direction now."""
        gradient.__dict__[self.MARK] = gradient._version

    def check(self, gradients: Iterable[Tensor | None]) -> None:
        """Raises :class:`FxcurvError` when there are gradients and all of them are directions."""
        present = [gradient for gradient in gradients if gradient is not None]
        if present and all(gradient.__dict__.get(self.MARK) == gradient._version for gradient in present):
            raise FxcurvError(
                "these gradients have been turned into update directions already: run a backward pass before the next "
                "precondition_() or step()."
            )
