"""One small network for every kind of layer, with the inputs of a global batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

CLASSES = 3


class Tokens(nn.Module):
    """A table of tokens, a norm and a head; the head may be the table itself."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7 if tied else CLASSES, bias=not tied)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.table(tokens))).transpose(1, 2)


class Attention(nn.Module):
    """One head with separate projections."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2) / 2, -1)
        return self.head(scores @ self.v(x)).transpose(1, 2)


class MultiHead(nn.Module):
    """torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def mlp() -> nn.Module:
    """Linear layers with and without a bias."""
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4, bias=False), nn.Tanh(), nn.Linear(4, CLASSES))


def conv() -> nn.Module:
    """Convolutions with stride, padding and groups, and a group norm."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.Conv2d(4, 3, 2, stride=2, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    )


def frozen_batch_norm() -> nn.Module:
    """Batch norm that uses its running statistics, as fine-tuning often does."""
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, CLASSES))
    net[1].running_mean.normal_()
    return net.eval()


class Recurrent(nn.Module):
    """An LSTM over a sequence, and an answer for each position."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0]).transpose(1, 2)


class Signals(nn.Module):
    """Convolutions in one and three dimensions, instance and RMS norm, a GRU and an RNN; class scores for each step."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.norm = nn.Conv1d(3, 4, 2, padding=1), nn.InstanceNorm1d(4, affine=True)
        self.solid, self.scaled = nn.Conv3d(1, 2, (1, 2, 2)), nn.RMSNorm(6)
        self.gru, self.rnn = nn.GRU(6, 3, batch_first=True), nn.RNN(3, 4, batch_first=True, bidirectional=True)
        self.up = nn.ConvTranspose1d(8, CLASSES, 2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.line(x)))
        x = self.solid(x.unsqueeze(1).unsqueeze(2)).squeeze(2).flatten(1, 2).transpose(1, 2)
        return self.up(self.rnn(self.gru(self.scaled(x))[0])[0].transpose(1, 2))


class Fused(nn.Module):
    """Bags of tokens, and a weight that is read in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.both = nn.EmbeddingBag(7, 4), nn.Parameter(torch.randn(4 + CLASSES, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(nn.functional.linear(self.bag(tokens), self.both[:4]))
        return nn.functional.linear(hidden, self.both[4:])


class Elements(nn.Module):
    """Parameters that are multiplied and added element by element, and a bilinear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(5) + 0.5), nn.Parameter(torch.randn(5))
        self.first, self.slope, self.pair = nn.Linear(5, 4), nn.PReLU(4), nn.Bilinear(4, 5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale + self.shift
        return self.pair(self.slope(self.first(x)), x)


class Graphs(nn.Module):
    """A parametrised product behind which neighbours are added up: a ring of four nodes, many times."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ring", torch.eye(4) + torch.eye(4).roll(1, 0) + torch.eye(4).roll(-1, 0))
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.ring @ self.first(x))
        return (self.ring @ self.second(hidden)).transpose(1, 2)


def transposed() -> nn.Module:
    """A transposed convolution."""
    return nn.Sequential(nn.ConvTranspose2d(2, 3, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 8 * 8, CLASSES))


def positions(n: int, *features: int) -> Tensor:
    return torch.randn(n, *features)


def tokens(n: int, length: int) -> Tensor:
    return torch.randint(0, 7, (n, length))


def deep() -> nn.Module:
    """Enough equal layers to be computed as one, and a head."""
    layers = [module for _ in range(4) for module in (nn.Linear(5, 5), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(5, CLASSES))


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], tuple[int, ...]]] = {
    "mlp": (mlp, positions, (5,)),
    "deep": (deep, positions, (5,)),
    "conv": (conv, positions, (2, 4, 4)),
    "batch_norm": (frozen_batch_norm, positions, (5,)),
    "tokens": (lambda: Tokens(tied=False), tokens, (3,)),
    "tied": (lambda: Tokens(tied=True), tokens, (3,)),
    "attention": (Attention, positions, (3, 4)),
    "multi_head": (MultiHead, positions, (3, 4)),
    "recurrent": (Recurrent, positions, (5, 4)),
    "signals": (Signals, positions, (3, 5)),
    "fused": (Fused, tokens, (3,)),
    "elements": (Elements, positions, (5,)),
    "graphs": (Graphs, positions, (4, 4)),
    "transposed": (transposed, positions, (2, 4, 4)),
}
