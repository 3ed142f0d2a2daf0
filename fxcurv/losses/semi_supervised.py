"""Cross-entropy on a graph of which few nodes have labels: true ones there, the model's own predictions on the others.

    mean over labelled nodes of -log p(label) + strength * mean over the others of -log p(prediction)

is the loss of self-training (Izadi et al. 2020). Labels and predictions travel as one target tensor: one row a node,
one column a class, 1 at the known label, ``strength`` at the predicted one. So everything else that a loss has to
know follows from the targets, and the strength may grow from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.losses.base import Loss, wide
from fxcurv.losses.cross_entropy import CrossEntropy

_TERMS = CrossEntropy()  # layout, moments and draws of a term are those of cross-entropy


@final
@dataclass(frozen=True, eq=False)
class SemiSupervised(Loss):
    """Cross-entropy of logits (nodes, classes) with true and predicted labels.

        loss = SemiSupervised(labelled=train_mask)
        goal = loss.targets(outputs, labels, strength)
        model.backward(loss.value(outputs, goal), outputs, targets=goal)

    A node is a term. Their number, by which curvature is normalised, is N = labelled + strength * others, and the
    weight of a term is N times that in the scalar: N / labelled, or strength * N / others. reduction: "mean" only.

    labelled: boolean (nodes,), true where the label is known, on at least one node.
    """

    labelled: Tensor = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        mask = self.labelled
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 1 or not bool(mask.any()):
            raise FxcurvError(
                "SemiSupervised(labelled=...) must be a boolean tensor with one entry a node, true on at least one."
            )
        if self.reduction != "mean":
            raise FxcurvError(
                f"SemiSupervised(reduction='{self.reduction}') is no loss of the paper; leave it at 'mean'."
            )
        object.__setattr__(self, "labelled", mask.detach().clone())

    @property
    def link(self) -> str:
        return "softmax"

    @property
    def needs_targets(self) -> bool:
        return True

    def targets(self, outputs: Tensor, labels: Tensor, strength: float) -> Tensor:
        """Targets (nodes, classes) of a step: 1 at the label of a labelled node, ``strength`` at the class that
        ``outputs`` give the largest logit on any other; no gradient passes.

        labels: class indices (nodes,), read where they are known. Raises :class:`FxcurvError` on a negative strength or
        a shape that does not fit.
        """
        if not strength >= 0:
            raise FxcurvError(f"strength={strength} of pseudo-labels must not be negative.")
        self._sizes(outputs)
        if labels.shape != outputs.shape[:1] or labels.is_floating_point():
            raise FxcurvError(
                f"SemiSupervised labels have shape {tuple(labels.shape)} and dtype {labels.dtype}; pass one class "
                f"index for each of the {outputs.shape[0]} nodes, anything where none is known."
            )
        known = self.labelled.to(outputs.device)
        values = outputs.detach().to(wide(outputs.dtype))
        rows = values.new_full(labels.shape, float(strength)).masked_fill(known, 1.0)
        chosen = torch.where(known, labels.to(outputs.device), values.argmax(1))
        return torch.zeros_like(values).scatter_(1, chosen.unsqueeze(1), rows.unsqueeze(1))

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        rows = self._rows(outputs, targets)
        terms = -(targets.to(rows.dtype) * outputs.to(rows.dtype).log_softmax(1)).sum(1)
        return (terms * self._shares(rows)).sum()

    def _shares(self, rows: Tensor) -> Tensor:
        """1 / labelled or 1 / others for every node."""
        known = self.labelled.to(rows.device)
        counts = known.sum(), (~known).sum().clamp(min=1)
        return torch.where(known, 1.0 / counts[0], 1.0 / counts[1]).to(rows.dtype)

    def _rows(self, outputs: Tensor, targets: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """1 or ``strength`` of every node, (nodes,), in the wide dtype."""
        if targets is None:
            raise FxcurvError(
                "SemiSupervised needs the targets that its targets() makes; pass targets= to model.backward."
            )
        if mask is not None:
            raise FxcurvError("SemiSupervised takes no mask=; which nodes have labels was said by labelled=.")
        if targets.shape != outputs.shape:
            raise FxcurvError(
                f"SemiSupervised targets have shape {tuple(targets.shape)} but the outputs have "
                f"{tuple(outputs.shape)}; make them with targets()."
            )
        return targets.detach().to(wide(outputs.dtype)).sum(1)

    def _count(self, outputs: Tensor, targets: Tensor | None, mask: Tensor | None) -> Tensor:
        return self._rows(outputs, targets, mask).double().sum()

    def _weights(self, outputs: Tensor, targets: Tensor | None, mask: Tensor | None) -> Tensor:
        rows = self._rows(outputs, targets, mask)
        return (rows * self._shares(rows) * rows.sum()).reshape(-1, 1, 1)

    def _sizes(self, outputs: Tensor) -> tuple[int, int, int]:
        if outputs.dim() != 2 or outputs.shape[0] != len(self.labelled):
            raise FxcurvError(
                f"SemiSupervised has {len(self.labelled)} nodes but the outputs have shape {tuple(outputs.shape)}; "
                "pass logits (nodes, classes) of the whole graph."
            )
        return _TERMS._sizes(outputs)

    def _split(self, tensor: Tensor) -> Tensor:
        return _TERMS._split(tensor)

    def _join(self, terms: Tensor, outputs: Tensor) -> Tensor:
        return _TERMS._join(terms, outputs)

    def _moments(self, terms: Tensor) -> Tensor:
        return _TERMS._moments(terms)

    def _product(self, moments: Tensor, vector: Tensor) -> Tensor:
        return _TERMS._product(moments, vector)

    def _column(self, moments: Tensor, index: int) -> Tensor:
        return _TERMS._column(moments, index)

    def _draw(self, terms: Tensor, key: Sequence[int], first_row: int) -> Tensor:
        return _TERMS._draw(terms, key, first_row)


def strength(epoch: int, epochs: int, power: float | None) -> float:
    """Weight (epoch / epochs)^power of pseudo-labels in epoch 1 to ``epochs``; 0 for ``power=None``.

    Izadi et al. 2020, who sweep power from 1 to 10. Raises :class:`FxcurvError` for an epoch out of range.
    """
    if not 0 <= epoch <= epochs or epochs < 1:
        raise FxcurvError(f"epoch {epoch} does not lie between 0 and epochs={epochs}.")
    return 0.0 if power is None else (epoch / epochs) ** power
