"""Exact curvature of one layer by plain autograd: what approximations are measured against.

Nothing here knows taps or programs: the loss is differentiated as the user wrote it, with respect to the layer's stored
parameters, and the result is put in the order of ``[W b].flatten()`` by moving the numbers 0, 1, 2, ... the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxcurv.errors import FxcurvError
from fxcurv.layers.region import place_of
from fxcurv.losses import Loss
from fxcurv.methods.facts import Target

MEMORY = 2**31  # bytes that a Jacobian may take
CHUNK = 64  # backward passes at once


@dataclass(frozen=True)
class Batch:
    """A forward pass to differentiate: ``call(model)`` gives the outputs of ``loss``."""

    call: Callable[[nn.Module], Tensor]
    targets: Tensor
    loss: Loss

    def terms(self, outputs: Tensor) -> float:
        """Number of loss terms, the divisor of the mean loss."""
        return float(self.loss.count(outputs.detach(), self.targets))

    def mean(self, outputs: Tensor) -> Tensor:
        """The mean loss, whatever the reduction."""
        value = self.loss.value(outputs, self.targets)
        return value / self.terms(outputs) if self.loss.reduction == "sum" else value


class Stored:
    """Where a layer's [W b] lies in the model's parameters."""

    def __init__(self, model: nn.Module, target: Target) -> None:
        parameters = dict(model.named_parameters())
        places = [place_of(key, parameters) for key in (target.weight, target.bias) if key is not None]
        names = list(dict.fromkeys(place.name for place in places))
        self.parameters: list[Tensor] = [parameters[name] for name in names]
        offsets, start = {}, 0
        for name in names:
            offsets[name] = start
            start += parameters[name].numel()
        numbers = [
            place.of(torch.arange(parameters[place.name].numel()).view(parameters[place.name].shape))
            + offsets[place.name]
            for place in places
        ]
        matrix = numbers[0].reshape(target.weight_shape).permute(target.permutation)
        matrix = matrix.reshape(target.groups, target.d_out, -1)
        if len(numbers) > 1:
            matrix = torch.cat([matrix, numbers[1].reshape(target.groups, target.d_out, 1)], dim=2)
        self.order = matrix.reshape(-1)

    def ordered(self, gradients: list[Tensor | None]) -> Tensor:
        """Gradients of the parameters, with leading dimensions (...), as (..., d) in the order of ``[W b].flatten()``.

        What a pass does not reach is zero.
        """
        pairs = list(zip(gradients, self.parameters, strict=True))
        leading = next((g.shape[: g.ndim - p.ndim] for g, p in pairs if g is not None), ())
        flat = [p.new_zeros(*leading, p.numel()) if g is None else g.reshape(*leading, p.numel()) for g, p in pairs]
        return torch.cat(flat, dim=-1)[..., self.order]


def exact_block(model: nn.Module, stored: Stored, batch: Batch, kind: str) -> Tensor:
    """A layer's block of the mean loss's Gauss-Newton matrix ("ggn") or empirical Fisher ("empirical"), (d, d).

    GGN: J^T H J, J of all outputs, H the loss's own Hessian there. Empirical: with N loss terms, sum over examples of
    N q q^T for an example's share q of the mean loss's gradient; an example is an index of the outputs' dimension 0.
    Raises :class:`FxcurvError` where the Jacobian would take more than MEMORY.
    """
    outputs = batch.call(model)
    if kind == "empirical":
        leaf = outputs.detach().requires_grad_()
        slope = torch.autograd.grad(batch.mean(leaf), leaf)[0]
        shares = torch.zeros(len(outputs), *outputs.shape, dtype=outputs.dtype)
        shares[range(len(outputs)), range(len(outputs))] = slope
        rows = _pulled_back(outputs, stored, shares.flatten(1))
        return rows.T @ rows * batch.terms(outputs)
    count, size = outputs.numel(), len(stored.order)
    if count * size * outputs.element_size() > MEMORY:
        raise FxcurvError(
            f"the Jacobian of {count} outputs in {size} parameters would take more than {MEMORY // 2**30} GiB: take "
            "fewer examples with --batch."
        )
    jacobian = _pulled_back(outputs, stored, None)
    return jacobian.T @ _hessian_columns(outputs.detach(), batch.mean, jacobian)


def mean_gradient(model: nn.Module, stored: Stored, batch: Batch) -> Tensor:
    """Gradient of the mean loss in ``[W b].flatten()``, (d,)."""
    gradients = torch.autograd.grad(batch.mean(batch.call(model)), stored.parameters, allow_unused=True)
    return stored.ordered(list(gradients))


def _pulled_back(outputs: Tensor, stored: Stored, cotangents: Tensor | None) -> Tensor:
    """Rows v^T d outputs / d [W b] for the rows v of ``cotangents``; without any, for those of the identity."""
    count = outputs.numel() if cotangents is None else len(cotangents)
    rows = []
    for start in range(0, count, CHUNK):
        stop = min(count, start + CHUNK)
        if cotangents is None:
            part = torch.zeros(stop - start, outputs.numel(), dtype=outputs.dtype)
            part[range(stop - start), range(start, stop)] = 1.0
        else:
            part = cotangents[start:stop]
        rows.append(stored.ordered(_gradients(outputs, stored.parameters, part.reshape(-1, *outputs.shape))))
    return torch.cat(rows)


def _hessian_columns(outputs: Tensor, loss: Callable[[Tensor], Tensor], columns: Tensor) -> Tensor:
    """Hessian of the loss in the flattened outputs, times ``columns`` (outputs, d)."""
    leaf = outputs.requires_grad_()
    slope = torch.autograd.grad(loss(leaf), leaf, create_graph=True)[0]
    if not slope.requires_grad:  # a linear loss
        return torch.zeros_like(columns)
    rows = columns.T.reshape(-1, *outputs.shape)
    parts = [_gradients(slope, [leaf], rows[start : start + CHUNK])[0] for start in range(0, len(rows), CHUNK)]
    zero = torch.zeros_like(rows[:1])
    return torch.cat([zero if part is None else part for part in parts]).flatten(1).T


def _gradients(outputs: Tensor, inputs: list[Tensor], cotangents: Tensor) -> list[Tensor | None]:
    """``torch.autograd.grad`` for all rows of ``cotangents`` at once, or one by one where the model allows no other."""
    try:
        return list(
            torch.autograd.grad(
                outputs, inputs, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
        )
    except RuntimeError:
        each = list(_one_by_one(outputs, inputs, cotangents))
        return [None if parts[0] is None else torch.stack(parts) for parts in zip(*each, strict=True)]  # type: ignore[arg-type]


def _one_by_one(outputs: Tensor, inputs: list[Tensor], cotangents: Tensor) -> Iterator[tuple[Tensor | None, ...]]:
    for row in cotangents:
        yield torch.autograd.grad(outputs, inputs, row, retain_graph=True, allow_unused=True)
