"""Oracles: products with the Hessian and the Gauss-Newton matrix on the live graph of a backward call.

The graph of the user's own forward is kept until the step has used it. Batch, dropout masks and batch statistics are
frozen in it, so within one step the operator is one fixed symmetric matrix; no buffer and no random state moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.losses import Loss


class HessianOracle:
    """Products with the Hessian of the loss, by differentiating the gradient again (sheet matrix-free, CVP 6b)."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.gradients: list[tuple[Tensor | None, ...]] = []

    def add(self, loss: Tensor) -> None:
        """Include a micro-batch's loss; raises :class:`FxcurvError` when it depends on no parameter."""
        self.gradients.append(_reached(_gradients(loss, self.parameters, create_graph=True)))

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """H v for vectors shaped like the parameters, in the parameters' dtypes."""
        totals = [torch.zeros_like(vector) for vector in vectors]
        for gradients in self.gradients:
            known = [(g, v) for g, v in zip(gradients, vectors, strict=True) if g is not None and g.requires_grad]
            pairs = [(g, v.to(g.dtype)) for g, v in known]
            if pairs:
                products = _gradients([g for g, _ in pairs], self.parameters, [v for _, v in pairs], retain_graph=True)
                totals = [t if h is None else t + h.to(t.dtype) for t, h in zip(totals, products, strict=True)]
        return totals


class GGNOracle:
    """Products with J^T H J / N: forward through the Jacobian, the loss Hessian, and back (matrix-free, CVP 3)."""

    def __init__(self, parameters: Sequence[Tensor], loss: Loss) -> None:
        self.parameters = list(parameters)
        self.loss = loss
        self.parts: list[tuple[Tensor, Tensor, tuple[Tensor | None, ...], Tensor | None, Tensor | None]] = []
        self.terms = 0.0

    def add(self, outputs: Tensor, targets: Tensor | None, mask: Tensor | None) -> None:
        """Include a micro-batch's outputs; raises :class:`FxcurvError` when they depend on no parameter."""
        seed = torch.zeros_like(outputs).requires_grad_()
        pulled = _reached(_gradients(outputs, self.parameters, seed, create_graph=True))
        self.parts.append((outputs, seed, pulled, targets, mask))
        self.terms += float(self.loss.count(outputs, targets, mask))

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """G v for vectors shaped like the parameters."""
        totals = [torch.zeros_like(vector) for vector in vectors]
        for outputs, seed, pulled, targets, mask in self.parts:
            cotangent = self.loss.hessian_product(outputs, _tangent(seed, pulled, vectors), targets, mask)
            back = _gradients(outputs, self.parameters, cotangent, retain_graph=True)
            totals = [t if g is None else t + g.to(t.dtype) for t, g in zip(totals, back, strict=True)]
        return [total / max(self.terms, 1.0) for total in totals]

    def forms(self, vectors: Sequence[Sequence[Tensor]]) -> Tensor:
        """v^T G w for all pairs of k vectors, each shaped like the parameters, (k, k) in float64.

        One tangent a vector, and nothing goes backward through the model. The matrix lies where the outputs do.
        """
        total = torch.zeros((), dtype=torch.float64)
        for outputs, seed, pulled, targets, mask in self.parts:
            tangents = [_tangent(seed, pulled, vector) for vector in vectors]
            turned = [self.loss.hessian_product(outputs, tangent, targets, mask) for tangent in tangents]
            left, right = (torch.stack([x.reshape(-1) for x in side]).double() for side in (tangents, turned))
            total = total.to(left.device) + left @ right.mT
        return (total + total.mT) / (2.0 * max(self.terms, 1.0))


def _tangent(seed: Tensor, pulled: Sequence[Tensor | None], vector: Sequence[Tensor]) -> Tensor:
    """The directional derivative J v of a part's outputs: J^T seed is linear in seed, and is differentiated in it."""
    pairs = [(p, v.to(p.dtype)) for p, v in zip(pulled, vector, strict=True) if p is not None]
    return torch.autograd.grad([p for p, _ in pairs], [seed], [v for _, v in pairs], retain_graph=True)[0]


def _gradients(
    of: Any, parameters: Sequence[Tensor], columns: Any = None, **options: bool
) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad``; ``None`` for a parameter that is not reached or has been frozen since the transform."""
    trainable = [p for p in parameters if p.requires_grad]
    found = iter(torch.autograd.grad(of, trainable, columns, allow_unused=True, **options))
    return tuple(next(found) if p.requires_grad else None for p in parameters)


def _reached(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    if all(gradient is None for gradient in gradients):
        raise FxcurvError("what was given to model.backward does not depend on the model's parameters.")
    return gradients
