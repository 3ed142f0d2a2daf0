"""A model with an example call and a loss: what a zoo returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Sample:
    """One model to be measured.

    args, kwargs: an example call. scores: from the model's output to the one tensor that the loss reads.
    """

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    scores: Callable[[Any], Tensor] | None = None

    def loss(self, output: Any) -> tuple[Tensor, Tensor, str]:
        """The loss of an output, the tensor that went into it, and the loss's name.

        Scores (rows, classes), and (batch, positions, vocabulary) of a language model, are classified; anything else
        is regressed. Targets are drawn from torch's generator.
        """
        scores = default_scores(output) if self.scores is None else self.scores(output)
        if scores.ndim == 3 and _has_logits(output):
            scores = scores.flatten(0, 1)
        if scores.ndim == 2:
            targets = torch.randint(scores.shape[1], scores.shape[:1])
            return F.cross_entropy(scores, targets), scores, "cross_entropy"
        return F.mse_loss(scores, torch.randn(scores.shape).to(scores)), scores, "mse"


def tensors(output: Any) -> Iterator[Tensor]:
    """All tensors of an output, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from tensors(value)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for part in dataclasses.fields(output):
            yield from tensors(getattr(output, part.name))
    else:
        yield from (value for value in getattr(output, "__dict__", {}).values() if isinstance(value, Tensor))


def _has_logits(output: Any) -> bool:
    """Whether an output names its logits, as those of transformer libraries do."""
    return isinstance(getattr(output, "logits", None), Tensor)


def default_scores(output: Any) -> Tensor:
    """The tensor itself, the logits by name, or all differentiable tensors of an output as one row an example."""
    if isinstance(output, Tensor):
        return output
    if _has_logits(output):
        return output.logits
    found = [value for value in tensors(output) if value.requires_grad]
    if not found:
        raise ValueError("the output has no differentiable tensor")
    if len(found) == 1:
        return found[0]
    rows = found[0].shape[0]
    if all(value.ndim > 1 and value.shape[0] == rows for value in found):
        return torch.cat([value.flatten(1) for value in found], 1)[..., None]  # three axes: to be regressed
    return torch.cat([value.flatten() for value in found])
