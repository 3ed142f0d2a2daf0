"""The Euclidean metric on a model's outputs, laid out as another loss: curvature J^T J in place of J^T H J.

It takes from the loss what its terms are, which of them count, and their number N, and puts the identity in the place
of the Hessian of every term: the plain Gauss-Newton matrix of K-FAC-G (Zhang, Wang, Xu & Grosse 2018, section 2). With
a loss whose Hessian falls towards zero as the model gets sure of itself, this one does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from fxcurv import sampling
from fxcurv.losses.base import Loss, wide
from fxcurv.losses.elementwise import Gaussian


@final
@dataclass(frozen=True, eq=False)
class Euclidean(Loss):
    """|f|^2 / 2 for every term of ``like``; a term that ``like`` weights with 0 has none, any other weight counts as 1.

    ``value`` is that of ``like``: this is a metric for its outputs, not another objective.
    """

    like: Loss = Gaussian()

    @property
    def needs_targets(self) -> bool:
        return self.like.needs_targets

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.like.value(outputs, targets)

    def count(self, outputs: Tensor, targets: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return self.like.count(outputs, targets, mask)

    def _count(self, outputs: Tensor, targets: Tensor | None, mask: Tensor | None) -> Tensor:
        return self.like._count(outputs, targets, mask)

    def _sizes(self, outputs: Tensor) -> tuple[int, int, int]:
        return self.like._sizes(outputs)

    def _split(self, tensor: Tensor) -> Tensor:
        return self.like._split(tensor)

    def _join(self, terms: Tensor, outputs: Tensor) -> Tensor:
        return self.like._join(terms, outputs)

    def _weights(self, outputs: Tensor, targets: Tensor | None, mask: Tensor | None) -> Tensor:
        return (self.like._weights(outputs, targets, mask) > 0).to(wide(outputs.dtype))

    def _moments(self, terms: Tensor) -> Tensor:
        return terms * 0 + 1.0  # not a constant: a NaN output must not pass for a good one

    def _product(self, moments: Tensor, vector: Tensor) -> Tensor:
        return moments * vector

    def _column(self, moments: Tensor, index: int) -> Tensor:
        column = torch.zeros_like(moments)
        column[..., index] = moments[..., index]
        return column

    def _draw(self, terms: Tensor, key: Sequence[int], first_row: int) -> Tensor:
        rows, places, features = terms.shape
        noise = sampling.normal(
            key, rows, places * features, first_row=first_row, device=terms.device, dtype=terms.dtype
        )
        return noise.reshape(terms.shape) * self._moments(terms)
