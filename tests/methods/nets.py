"""Small networks that the methods' tests share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """One head with separate projections; the output keeps its positions, or is flattened to rows of tokens."""

    def __init__(self, features: int = 3, classes: int = 3, flat: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(features, features) for _ in range(3))
        self.head = nn.Linear(features, classes)
        self.flat = flat

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2) / x.shape[-1] ** 0.5, -1)
        out = self.head(scores @ self.v(x))
        return out.flatten(0, 1) if self.flat else out.transpose(1, 2)


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with tanh in between."""
    layers: list[nn.Module] = []
    for i, o in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(i, o), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def convnet(groups: int = 1, classes: int = 3) -> nn.Sequential:
    """Two convolutions and a linear layer for images of 2 x 5 x 5."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=groups),
        nn.Tanh(),
        nn.Conv2d(4, 2, 2, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8, classes),
    )
