"""What a library's side of the comparison has to offer, and the plain training step.

The same work for everybody: empirical Fisher unless a library has none, factors with an exponential average, pi-split
damping, inverses by Cholesky where the library lets one choose, plain SGD on the preconditioned gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from workloads import Workload

LR = 1e-4
"""Learning rate of every side: small, so that all of them stay where the costs are those of ordinary numbers."""
DAMPING = 0.1
EMA = 0.95
"""Weight of the old factors."""
NEVER = 10**6

Factors = dict[str, tuple[Tensor, Tensor]]
"""Layer name: (A, G)."""


@dataclass(frozen=True)
class Cadence:
    """Steps between statistics and between refreshes; both are due in the first step."""

    statistics: int = 1
    refresh: int = 10


class Side(ABC):
    """Abstract: a model in training under one library."""

    note = ""
    """What differs from the common work; printed below the table."""

    @abstractmethod
    def step(self) -> None:
        """Forward, backward, statistics and refresh as they are due, preconditioning and the parameter update."""

    def state(self) -> Iterable[Tensor]:
        """Tensors that are kept between steps beside parameters and gradients."""
        return ()

    def factors(self) -> Factors:
        """The factors of the steps taken so far; empty where the library shows none."""
        return {}

    def covered(self) -> int:
        """Elements of the parameters that are preconditioned."""
        return 0


class Plain(Side):
    """A training step without curvature: what all times are divided by."""

    def __init__(self, work: Workload, net: nn.Module) -> None:
        self.work, self.net = work, net
        self.optimizer = torch.optim.SGD(net.parameters(), lr=LR)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.work.function(self.net(self.work.inputs), self.work.targets).backward()
        self.optimizer.step()


def products(net: nn.Module) -> dict[str, nn.Module]:
    """Linear and two-dimensional convolution modules by name: the layers that every peer knows."""
    return {name: m for name, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def elements(modules: Iterable[nn.Module]) -> int:
    """Elements of all trainable parameters of some modules."""
    return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)


def require_products(net: nn.Module) -> None:
    """Raises :class:`NotImplementedError` for a model whose recurrent layer a peer would leave out in silence."""
    left = [type(m).__name__ for m in net.modules() if isinstance(m, nn.RNNBase)]
    if left:
        raise NotImplementedError(f"no recurrent layers (nn.{left[0]})")
