"""Seeded float64 operands for the samples of ops; the global random state is never touched."""

from __future__ import annotations

import torch
from torch import Tensor


class Draw:
    """A private random source. ``groups`` is a leading batch shape: empty for one group."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, dtype=torch.float64, generator=self._generator)

    def positive(self, *shape: int) -> Tensor:
        """Numbers above 0.1: diagonals, counts, eigenvalues."""
        return self.normal(*shape).square() + 0.1

    def psd(self, d: int, *groups: int) -> Tensor:
        """A well-conditioned symmetric positive definite matrix (a batch with ``groups``)."""
        root = self.normal(*groups, d, d + 2)
        return root @ root.mT / d + 0.1 * torch.eye(d, dtype=torch.float64)

    def singular(self, d: int, *groups: int) -> Tensor:
        """A positive semidefinite matrix of rank at most 1: a factor that has seen one row."""
        root = self.normal(*groups, d, 1)
        return root @ root.mT

    def orth(self, d: int, *groups: int) -> Tensor:
        """An orthogonal matrix."""
        return torch.linalg.qr(self.normal(*groups, d, d))[0].contiguous()

    def number(self, value: float, *groups: int) -> Tensor:
        """A scalar, or one scalar a group, near ``value``."""
        if not groups:
            return torch.tensor(value, dtype=torch.float64)
        return value * (1.0 + 0.5 * torch.rand(groups, dtype=torch.float64, generator=self._generator))
