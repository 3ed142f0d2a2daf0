"""Softmax cross-entropy: class indices or probabilities, tokens and pixels, smoothing, weights, ignored targets.

With p = softmax(f), every variant is -sum_c k_c log p_c for some coefficients k of the targets, and its
Hessian in f is (sum_c k_c) (diag(p) - p p^T): options change only the *weight* of a term.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcurv import sampling
from fxcurv.errors import FxcurvError
from fxcurv.losses.base import Loss, expand_mask, weight_tensor, wide

TORCH_IGNORE_INDEX = -100


@final
@dataclass(frozen=True, eq=False)
class CrossEntropy(Loss):
    """Cross-entropy of logits, in torch's layout.

    Outputs (rows, C) or (rows, C, *positions); a term is one row and position. Targets: integer classes
    (rows, *positions), or probabilities of the outputs' shape. Masks: (rows, *positions).
    "mean" is torch's: over unignored terms, weighted by the class weight of the target; over all terms for
    probabilities.

    ignore_index: a class index whose terms are dropped. ``None``: nothing is dropped, except that -100 is
        honoured, as torch does, wherever targets are given; curvature then needs no targets.
    label_smoothing: in [0, 1]. weight: C non-negative class weights, a tensor or numbers.
    """

    ignore_index: int | None = None
    label_smoothing: float = 0.0
    weight: Tensor | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "weight", weight_tensor("CrossEntropy", "weight", self.weight))
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise FxcurvError(f"CrossEntropy(label_smoothing={self.label_smoothing}) must lie between 0 and 1.")

    @property
    def link(self) -> str:
        return "softmax"

    @property
    def needs_targets(self) -> bool:
        return self.weight is not None or self.ignore_index is not None

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        rows = self._sizes(outputs)[0]
        probabilities = self._are_probabilities(outputs, targets)
        total = F.cross_entropy(
            outputs.to(wide(outputs.dtype)),
            targets.to(wide(outputs.dtype)) if probabilities else targets.long(),
            weight=self._class_weights(outputs),
            ignore_index=self._ignored,
            reduction="mean" if self.reduction == "mean" else "sum",
            label_smoothing=self.label_smoothing,
        )
        return total / rows if self.reduction == "batchmean" else total

    @property
    def _ignored(self) -> int:
        return TORCH_IGNORE_INDEX if self.ignore_index is None else self.ignore_index

    def _sizes(self, outputs: Tensor) -> tuple[int, int, int]:
        if outputs.dim() < 2:
            raise FxcurvError(
                f"cross-entropy needs outputs of shape (rows, classes, ...), got {tuple(outputs.shape)}; "
                "add a batch dimension."
            )
        classes = outputs.shape[1]
        if self.weight is not None and self.weight.shape != (classes,):
            raise FxcurvError(
                f"CrossEntropy has class weights of shape {tuple(self.weight.shape)} but the outputs have {classes} "
                "classes in dimension 1; pass one weight per class."
            )
        return outputs.shape[0], math.prod(outputs.shape[2:]), classes

    def _split(self, tensor: Tensor) -> Tensor:
        return tensor.movedim(1, -1).reshape(self._sizes(tensor))

    def _join(self, terms: Tensor, outputs: Tensor) -> Tensor:
        rows, classes, *positions = outputs.shape
        return terms.reshape(rows, *positions, classes).movedim(-1, 1).to(outputs.dtype)

    def _class_weights(self, outputs: Tensor) -> Tensor | None:
        return None if self.weight is None else self.weight.to(outputs.device, wide(outputs.dtype))

    def _are_probabilities(self, outputs: Tensor, targets: Tensor) -> bool:
        probabilities = targets.is_floating_point()
        expected = outputs.shape if probabilities else (outputs.shape[0], *outputs.shape[2:])
        if targets.shape != expected:
            kind = "probability" if probabilities else "class"
            raise FxcurvError(
                f"cross-entropy {kind} targets have shape {tuple(targets.shape)}, but outputs of shape "
                f"{tuple(outputs.shape)} need {tuple(expected)}."
            )
        if probabilities and self.ignore_index is not None:
            raise FxcurvError(
                f"CrossEntropy(ignore_index={self.ignore_index}) does not apply to probability targets; "
                "pass mask= instead."
            )
        return probabilities

    def _kept(self, outputs: Tensor, targets: Tensor | None, mask: Tensor | None) -> Tensor:
        """Which terms count, boolean (rows, *positions)."""
        if targets is None and self.weight is not None:
            raise FxcurvError("CrossEntropy with class weights needs the targets; pass targets= to model.backward.")
        if targets is None and mask is None and self.ignore_index is not None:
            raise FxcurvError(
                f"CrossEntropy(ignore_index={self.ignore_index}) needs to know which terms are ignored; "
                "pass targets= or mask= to model.backward."
            )
        self._sizes(outputs)
        kept = expand_mask(mask, (outputs.shape[0], *outputs.shape[2:]), outputs)
        if targets is not None and not self._are_probabilities(outputs, targets):
            kept = kept & (targets != self._ignored)
        return kept

    def _count(self, outputs: Tensor, targets: Tensor | None, mask: Tensor | None) -> Tensor:
        kept = self._kept(outputs, targets, mask)
        weight = self._class_weights(outputs)
        if weight is None or targets is None or targets.is_floating_point():
            return kept.sum()
        return (weight.double()[targets.long().where(kept, 0)] * kept).sum()

    def count_behind(self, gradient: Tensor) -> Tensor:
        """Logits (rows, positions, C) are common, and flattened before torch's loss sees them.

        The gradient of a term sums to zero over its classes, and over nothing else: that tells on which axis they are.
        """
        count = self.count(gradient)
        if gradient.dim() < 3 or self.reduction == "batchmean" or not gradient.numel():
            return count
        first, last = (gradient.to(wide(gradient.dtype)).sum(axis).abs().amax() for axis in (1, -1))
        return torch.where(first <= last, count, torch.full_like(count, gradient[..., 0].numel()))

    def _weights(self, outputs: Tensor, targets: Tensor | None, mask: Tensor | None) -> Tensor:
        kept = self._kept(outputs, targets, mask)
        weight, smoothing = self._class_weights(outputs), self.label_smoothing
        terms = torch.ones_like(kept, dtype=wide(outputs.dtype))
        if targets is not None and targets.is_floating_point():
            soft = targets.detach().movedim(1, -1).to(terms.dtype) * (1 - smoothing) + smoothing / outputs.shape[1]
            terms = soft.sum(-1) if weight is None else soft @ weight
        elif targets is not None and weight is not None:
            terms = (1 - smoothing) * weight[targets.long().where(kept, 0)] + smoothing * weight.mean()
        rows, places, _ = self._sizes(outputs)
        return terms.where(kept, 0).reshape(rows, places, 1)

    def _moments(self, terms: Tensor) -> Tensor:
        return terms.softmax(-1)

    def _product(self, moments: Tensor, vector: Tensor) -> Tensor:
        # Not p u - p (p.u): that cancels where p is near 1.
        return moments * (vector - (moments * vector).sum(-1, keepdim=True))

    def _column(self, moments: Tensor, index: int) -> Tensor:
        column = moments.clone()
        column[..., index] -= 1
        return column * moments[..., index : index + 1].sqrt()

    def _draw(self, terms: Tensor, key: Sequence[int], first_row: int) -> Tensor:
        rows, places, classes = terms.shape
        residual = terms.softmax(-1)
        heights = residual.cumsum(-1)
        level = sampling.uniform(
            key, rows, places, first_row=first_row, device=terms.device, dtype=terms.dtype
        ).unsqueeze(-1)
        # Scaled to the last height, so that rounding in the sum never selects beyond the last possible class.
        # No class of probability 0 is drawn; a NaN row may give any index, hence the clamp.
        label = torch.searchsorted(heights, level * heights[..., -1:], right=True).clamp_(max=classes - 1)
        return residual.scatter_add_(-1, label, torch.full_like(level, -1.0))
