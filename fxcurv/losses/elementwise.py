"""Elementwise losses: binary cross-entropy of logits, squared error, and the unit-variance Gaussian.

Each number of the outputs is a term of its own (K = 1) and the Hessian is a diagonal.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcurv import sampling
from fxcurv.errors import FxcurvError
from fxcurv.losses.base import Loss, expand_mask, weight_tensor, wide


@dataclass(frozen=True, eq=False)
class _Elementwise(Loss):
    """Abstract: layout of losses that act on each number of the outputs; masks have the outputs' shape."""

    @property
    def needs_targets(self) -> bool:
        return False

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        # torch broadcasts (n, 1) against (n,) to n x n terms with only a warning; that is never meant.
        self._check_targets(outputs, targets)
        dtype = wide(outputs.dtype)
        total = self._total(outputs.to(dtype), targets.to(dtype))
        return total if self.reduction == "sum" else total / self.count(outputs, targets).to(dtype)

    @abstractmethod
    def _total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The differentiable sum over terms."""

    def _check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        if targets.shape != outputs.shape:
            raise FxcurvError(
                f"{type(self).__name__} targets have shape {tuple(targets.shape)} but the outputs have "
                f"{tuple(outputs.shape)}; reshape one of them."
            )

    def _kept(self, outputs: Tensor, mask: Tensor | None) -> Tensor:
        """Which numbers count, boolean, shaped like the outputs."""
        return expand_mask(mask, outputs.shape, outputs)

    def _count(self, outputs: Tensor, targets: Tensor | None, mask: Tensor | None) -> Tensor:
        return self._kept(outputs, mask).sum()

    def _sizes(self, outputs: Tensor) -> tuple[int, int, int]:
        return (outputs.shape[0], math.prod(outputs.shape[1:]), 1) if outputs.dim() else (1, 1, 1)

    def _split(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self._sizes(tensor))

    def _join(self, terms: Tensor, outputs: Tensor) -> Tensor:
        return terms.reshape(outputs.shape).to(outputs.dtype)

    def _weights(self, outputs: Tensor, targets: Tensor | None, mask: Tensor | None) -> Tensor:
        return self._split(self._kept(outputs, mask).to(wide(outputs.dtype)))

    def _product(self, moments: Tensor, vector: Tensor) -> Tensor:
        return moments * vector

    def _column(self, moments: Tensor, index: int) -> Tensor:
        return moments.sqrt()


@final
@dataclass(frozen=True, eq=False)
class BCE(_Elementwise):
    """Binary cross-entropy of logits, any shape; targets in [0, 1] of the same shape. "mean" divides by all numbers.

    weight: factor of each term; pos_weight: factor of the positive part of each term. Both non-negative and
    broadcast to the outputs; only ``pos_weight`` makes curvature depend on the targets.
    """

    weight: Tensor | None = field(default=None)
    pos_weight: Tensor | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weight", "pos_weight"):
            object.__setattr__(self, name, weight_tensor("BCE", name, getattr(self, name)))

    @property
    def link(self) -> str:
        return "sigmoid"

    @property
    def needs_targets(self) -> bool:
        return self.pos_weight is not None

    def _factor(self, name: str, outputs: Tensor) -> Tensor | None:
        factor = getattr(self, name)
        if factor is None:
            return None
        try:
            return factor.to(outputs.device, wide(outputs.dtype)).expand(outputs.shape)
        except RuntimeError:
            raise FxcurvError(
                f"BCE({name}=...) has shape {tuple(factor.shape)}, which does not broadcast to the outputs' "
                f"{tuple(outputs.shape)}."
            ) from None

    def _total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            outputs,
            targets,
            weight=self._factor("weight", outputs),
            pos_weight=self._factor("pos_weight", outputs),
            reduction="sum",
        )

    def _require_targets(self, targets: Tensor | None) -> None:
        if self.needs_targets and targets is None:
            raise FxcurvError("BCE with pos_weight needs the targets; pass targets= to model.backward.")

    def _count(self, outputs: Tensor, targets: Tensor | None, mask: Tensor | None) -> Tensor:
        self._require_targets(targets)
        return super()._count(outputs, targets, mask)

    def _weights(self, outputs: Tensor, targets: Tensor | None, mask: Tensor | None) -> Tensor:
        self._require_targets(targets)
        kept = self._kept(outputs, mask)
        terms = torch.ones_like(kept, dtype=wide(outputs.dtype))
        weight, positive = self._factor("weight", outputs), self._factor("pos_weight", outputs)
        if weight is not None:
            terms = terms * weight
        if positive is not None and targets is not None:
            self._check_targets(outputs, targets)
            y = targets.detach().to(terms.dtype)
            terms = terms * (positive * y + 1 - y)
        return self._split(terms.where(kept, 0))

    def _moments(self, terms: Tensor) -> Tensor:
        return terms.sigmoid() * (-terms).sigmoid()  # 1 - sigmoid(f) cancels for large f

    def _draw(self, terms: Tensor, key: Sequence[int], first_row: int) -> Tensor:
        rows, places, _ = terms.shape
        level = sampling.uniform(key, rows, places, first_row=first_row, device=terms.device, dtype=terms.dtype)
        probability = terms.sigmoid()
        return torch.where(level.unsqueeze(-1) < probability, -(-terms).sigmoid(), probability)


@dataclass(frozen=True, eq=False)
class _Squared(_Elementwise):
    """Abstract: a multiple of the squared error, ``curvature / 2 * (f - y)^2`` a number."""

    @property
    @abstractmethod
    def _curvature(self) -> float:
        """Second derivative of a term."""

    def _total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets, reduction="sum") * (self._curvature / 2)

    def _moments(self, terms: Tensor) -> Tensor:
        # Not a constant: a NaN output must not pass for a good one.
        return terms * 0 + self._curvature

    def _draw(self, terms: Tensor, key: Sequence[int], first_row: int) -> Tensor:
        rows, places, _ = terms.shape
        noise = sampling.normal(key, rows, places, first_row=first_row, device=terms.device, dtype=terms.dtype)
        return noise.unsqueeze(-1) * self._moments(terms).sqrt()


@final
@dataclass(frozen=True, eq=False)
class MSE(_Squared):
    """Squared error (f - y)^2 a number, any shape; "mean" divides by all numbers, as torch does.

    The curvature is 2, and samples are those of the density exp(-(f - y)^2), of variance 1/2.
    """

    @property
    def _curvature(self) -> float:
        return 2.0


@final
@dataclass(frozen=True, eq=False)
class Gaussian(_Squared):
    """Negative log-likelihood of a unit-variance Gaussian up to a constant, |f - y|^2 / 2 a row.

    Rows are all dimensions but the last (a batch of single numbers, shape (n,), is n rows) and "mean"
    divides by rows. A mask with as many dimensions as the outputs is over numbers, and a row counts while
    one of its numbers does; any other mask is over rows.
    """

    @property
    def _curvature(self) -> float:
        return 1.0

    def _kept(self, outputs: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None or mask.dim() == outputs.dim():
            return expand_mask(mask, outputs.shape, outputs)
        return expand_mask(mask, outputs.shape[:-1], outputs).unsqueeze(-1).expand(outputs.shape)

    def _count(self, outputs: Tensor, targets: Tensor | None, mask: Tensor | None) -> Tensor:
        kept = self._kept(outputs, mask)
        return (kept.any(-1) if outputs.dim() > 1 else kept).sum()
