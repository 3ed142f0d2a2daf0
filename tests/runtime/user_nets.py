"""Models as users write them: several inputs and outputs, raw parameters, tied and reused modules, odd layouts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 11


class ViT(nn.Module):
    """Patches, a class token, a positional parameter, one fused projection for q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.cls, self.positions = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8) / 10)
        self.norm1, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm2, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        x = torch.cat([self.cls.expand(b, -1, -1), self.patch(x).flatten(2).transpose(1, 2)], 1) + self.positions
        q, k, v = self.qkv(self.norm1(x)).reshape(b, -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = (q @ k.transpose(-2, -1) / math.sqrt(4)).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(b, -1, 8))
        return self.head(self.norm2(x)[:, 0])


class UNet(nn.Module):
    """A skip connection and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.up, self.out = nn.ConvTranspose2d(4, 4, 2, 2), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = torch.tanh(self.down(x))
        return self.out(torch.cat([skip, self.up(torch.tanh(self.middle(skip)))], 1))


class VAE(nn.Module):
    """Two outputs and noise drawn in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.mean, self.spread = nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(8, 2)
        self.decode = nn.Linear(2, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h = torch.tanh(self.encode(x))
        mean, spread = self.mean(h), self.spread(h)
        return self.decode(mean + torch.randn_like(mean) * (0.5 * spread).exp()), (mean, spread)


@dataclass
class Output:
    """What a transformer library returns."""

    logits: Tensor
    hidden: Tensor


class Table(nn.Module):
    """A dictionary in, a dataclass out."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.numbers, self.out = nn.Embedding(VOCABULARY, 5), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, batch: dict[str, Tensor]) -> Output:
        hidden = torch.tanh(self.words(batch["words"]).mean(1) + self.numbers(batch["numbers"]))
        return Output(self.out(hidden), hidden)


class GPT(nn.Module):
    """A tied head, and logits (batch, positions, vocabulary) for a loss on ``logits.view(-1, V)``."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, 6), nn.Embedding(4, 6)
        self.q, self.k, self.v = (nn.Linear(6, 6, bias=False) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, VOCABULARY, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        y = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), is_causal=True)
        return self.head(self.norm(x + y))


class Separable(nn.Module):
    """Depthwise and pointwise convolutions with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.depth, self.norm = nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False), nn.BatchNorm2d(3)
        self.point, self.out = nn.Conv2d(3, 6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.norm(self.depth(x)), inplace=True)
        return self.out(F.adaptive_avg_pool2d(torch.tanh(self.point(x)), 1).flatten(1))


class Siamese(nn.Module):
    """One encoder called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
        self.out = nn.Linear(10, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        x, y = self.encoder(a), self.encoder(b)
        return self.out(torch.cat([x * y, x - y], 1))


class Attention(nn.Module):
    """torch's own attention module."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


class Recurrent(nn.Module):
    """An LSTM classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.lstm, self.out = nn.Embedding(VOCABULARY, 4), nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.lstm(self.words(tokens))[1][0][-1])


class Raw(nn.Module):
    """Parameters without modules, three ways to multiply with them, and constants in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a0 = nn.Parameter(torch.randn(6, 4) / 2), nn.Parameter(torch.zeros(6))
        self.b, self.b0 = nn.Parameter(torch.randn(6, 5) / 2), nn.Parameter(torch.zeros(5))
        self.c = nn.Parameter(torch.randn(5, 1, 3) / 2)
        self.scales = [torch.linspace(0.5, 1.5, 4, dtype=torch.float64), {"shift": torch.full((5,), 0.1).double()}]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.linear(x * self.scales[0].to(x), self.a, self.a0))
        x = torch.tanh(x @ self.b + self.b0 + self.scales[1]["shift"].to(x))
        return torch.einsum("bi,iho->bho", x, self.c).sum(1)


@dataclass(frozen=True)
class Case:
    """A model with a batch of n, and its loss: (outputs of the model, targets) -> (loss, tensor given to the loss)."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]
    logits: Callable[[Any], Tensor] = lambda output: output
    labels: Callable[[int], Tensor] = lambda n: torch.randint(3, (n,))
    loss: str = "cross_entropy"

    def batch(self, n: int) -> tuple[tuple[Any, ...], Tensor]:
        """Inputs and targets, floats in float64."""
        return self.inputs(n), self.labels(n)

    def value(self, output: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the tensor that went into it."""
        logits = self.logits(output)
        return (F.mse_loss if self.loss == "mse" else F.cross_entropy)(logits, labels), logits


def _floats(*shape: int) -> Callable[[int], tuple[Tensor]]:
    return lambda n: (torch.randn(n, *shape, dtype=torch.float64),)


def _tokens(n: int) -> tuple[Tensor]:
    return (torch.randint(VOCABULARY, (n, 4)),)


CASES = {
    "vit": Case(ViT, _floats(3, 8, 8)),
    "unet": Case(UNet, _floats(1, 6, 6), labels=lambda n: torch.randint(3, (n, 6, 6))),
    "vae": Case(VAE, _floats(6), lambda o: o[0], labels=lambda n: torch.randn(n, 6, dtype=torch.float64), loss="mse"),
    "table": Case(
        Table, lambda n: ({"words": _tokens(n)[0], "numbers": _floats(4)(n)[0]},), lambda output: output.logits
    ),
    "gpt": Case(GPT, _tokens, lambda o: o.view(-1, VOCABULARY), labels=lambda n: torch.randint(VOCABULARY, (n * 4,))),
    "separable": Case(Separable, lambda n: (_floats(3, 6, 6)(n)[0].to(memory_format=torch.channels_last),)),
    "siamese": Case(Siamese, lambda n: (*_floats(4)(n), *_floats(4)(n))),
    "attention": Case(Attention, _floats(4, 6)),
    "recurrent": Case(Recurrent, _tokens),
    "raw": Case(Raw, _floats(4)),
}
