"""The rest of K-FAC for a library that only measures factors: average, damp, invert, apply, with the fewest operations.

The inverses are Cholesky-based, the averages in place, the product of a layer is two matrix products.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from peer_adapters.side import DAMPING, EMA, Factors


def invert(matrix: Tensor, damping: float) -> Tensor:
    """(matrix + damping I)^-1 of a positive semi-definite matrix (d, d)."""
    damped = matrix.clone()
    damped.diagonal().add_(damping)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


class Lean:
    """Running factors and their inverses for some modules of a network, A with or without the bias coordinate."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.modules = modules
        self.running: Factors = {}
        self.inverse: Factors = {}

    def average(self, fresh: Factors) -> None:
        """Take in the factors of a batch."""
        if not self.running:
            self.running = fresh
            return
        for name, pair in fresh.items():
            for old, new in zip(self.running[name], pair, strict=True):
                old.lerp_(new, 1 - EMA)

    def refresh(self) -> None:
        """Invert all running factors with pi-split damping (Martens & Grosse 2015, section 6.3)."""
        for name, (a, g) in self.running.items():
            pi = float((a.trace() / len(a)) / (g.trace() / len(g))) ** 0.5
            self.inverse[name] = invert(a, pi * DAMPING**0.5), invert(g, DAMPING**0.5 / pi)

    @torch.no_grad()
    def apply(self) -> None:
        """Replace the gradients of the modules by G^-1 [dW db] A^-1."""
        for name, module in self.modules.items():
            a, g = self.inverse[name]
            weight, bias = module.weight, module.bias
            gradient = weight.grad.flatten(1)
            joint = bias is not None and len(a) > gradient.shape[1]
            if joint:
                gradient = torch.cat([gradient, bias.grad[:, None]], dim=1)
            direction = g @ gradient @ a
            if joint:
                bias.grad.copy_(direction[:, -1])
                direction = direction[:, :-1]
            elif bias is not None:
                bias.grad.copy_(g @ bias.grad)
            weight.grad.copy_(direction.reshape(weight.shape))

    def state(self) -> Iterable[Tensor]:
        """All factors and inverses."""
        return [t for pairs in (self.running, self.inverse) for pair in pairs.values() for t in pair]
