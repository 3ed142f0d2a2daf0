"""The loss of the coming step, for programs that look at it: what ``model.backward`` was given since the last step.

Values stay on their device, and where nothing looks at them they are not kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.ir.program import Program
from fxcurv.methods.parts.hybrid import LOSS
from fxcurv.runtime.distributed import Ranks


@dataclass
class Watched:
    """The losses of the running step's micro-batches; wanted: whether the program reads them."""

    wanted: bool
    losses: list[Tensor] = field(default_factory=list)

    @classmethod
    def by(cls, program: Program) -> Watched:
        """What this program wants."""
        return cls(any(role.key == LOSS for role in program.inputs("hyper")))

    def note(self, loss: Tensor) -> None:
        """One micro-batch's loss."""
        if self.wanted:
            self.losses.append(loss.detach())

    def value(self, ranks: Ranks, like: Tensor, scale: float, method: str) -> Tensor:
        """The sum over micro-batches, the mean over processes, in dtype and device of ``like``; losses carry ``scale``.

        Raises :class:`FxcurvError` when no loss was seen.
        """
        if not self.losses:
            raise FxcurvError(
                f"'{method}' looks at the loss of every step: call model.backward(loss, outputs) in place of "
                "loss.backward()."
            )
        total = torch.stack([loss.to(like.device, like.dtype).reshape(()) for loss in self.losses]).sum() / scale
        return total if ranks.size == 1 else torch.full_like(total, ranks.mean(float(total), like.device))
