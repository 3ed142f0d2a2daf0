"""Gradients that are kept as rows from the backward pass to the step (see :mod:`fxcurv.layers.keep`)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxcurv.ir.op import OPS
from fxcurv.methods.facts import Target
from fxcurv.runtime.statistics import leaf

Pair = tuple[Tensor, Tensor]


@dataclass
class KeptRows:
    """The rows of the layers whose weight gradient is not formed, of all backward passes since the last step."""

    slots: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)

    def keep(self, layer: str, x: Tensor, y: Tensor) -> Pair:
        """New slots for one use of a layer."""
        self.slots.append((layer, leaf(x.shape, x.dtype, x.device), leaf(y.shape, y.dtype, y.device)))
        return self.slots[-1][1:]

    @property
    def arrived(self) -> bool:
        """Whether a backward pass has left rows."""
        return any(dy.grad is not None for _, _, dy in self.slots)

    def discard(self) -> None:
        """Drop everything."""
        self.slots.clear()

    def of(self, layer: str) -> list[Pair]:
        """Input rows and output-gradient rows of a layer, (n, i) and (n, o), one pair for each use and pass."""
        found = [(x.grad, dy.grad) for name, x, dy in self.slots if name == layer]
        return [(x.flatten(0, -2), dy.flatten(0, -2)) for x, dy in found if x is not None and dy is not None]


def gradient_of(target: Target, weight: Tensor, x: Tensor, dy: Tensor) -> Tensor:
    """The gradient that rows (n, 1, 1, i) and (n, 1, 1, o) stand for, as the weight is stored."""
    product = OPS["row_product"](dy, x)
    return OPS["tensorize"](product, target.permutation, target.weight_shape).to(weight.dtype).reshape(weight.shape)  # type: ignore[no-any-return]


def joined(pairs: list[Pair], stored: Tensor | None, shape: tuple[int, int], like: Tensor) -> Pair:
    """The rows whose product is a layer's whole gradient, Rows (n, 1, 1, i) and (n, 1, 1, o) with ``like``'s dtype.

    stored: what arrived as a matrix (o, i) all the same, by another path through the model or another process: its rows
    belong to the unit vectors. shape: (o, i).
    """
    if stored is not None:
        pairs = [*pairs, (stored, torch.eye(shape[0], dtype=stored.dtype, device=stored.device))]
    if not pairs:
        pairs = [(like.new_zeros(0, shape[1]), like.new_zeros(0, shape[0]))]
    sides = [[side.to(like.dtype) for side in one] for one in zip(*pairs, strict=True)]
    x, dy = (side[0] if len(side) == 1 else torch.cat(side) for side in sides)
    return x[:, None, None, :], dy[:, None, None, :]
