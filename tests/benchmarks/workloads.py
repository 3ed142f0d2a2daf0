"""The models that speed is measured on, and a clock for comparing several ways to train them.

Every workload is a plain model with one random batch of its kind; losses are means, as peers' libraries expect them.
Sides of a comparison take turns in one process, so that a busy machine slows all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LossFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class Workload:
    """A model with one batch.

    build: a fresh model. inputs, targets: the batch. loss: its name for fxcurv; function: the same loss, a mean unless
    ``reduction="sum"``. rows: the outputs as the loss takes them, (terms, classes); ``function`` accepts both forms.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Tensor
    targets: Tensor
    loss: str
    function: LossFunction
    rows: Callable[[Tensor], Tensor] = lambda outputs: outputs

    @property
    def terms(self) -> int:
        """Terms of the loss in a batch: examples, or tokens."""
        return len(self.targets) if self.targets.is_floating_point() else self.targets.numel()

    def small(self, examples: int = 6) -> Workload:
        """The same with a few examples in float64, for comparisons to rounding."""
        inputs, targets = self.inputs[:examples], self.targets[:examples]
        if not inputs.is_floating_point():
            return replace(self, inputs=inputs[:, :24], targets=targets[:, :24])
        double = targets.double() if targets.is_floating_point() else targets
        return replace(self, inputs=inputs.double(), targets=double)


class Block(nn.Module):
    """The basic residual block of CIFAR ResNets, with a projection where the shape changes."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        same = stride == 1 and inputs == width
        self.down = nn.Identity() if same else nn.Conv2d(inputs, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.down(x))


def resnet(widths: tuple[int, ...] = (16, 32, 64), blocks: int = 3) -> nn.Sequential:
    """ResNet-20 for 32x32 images (He et al. 2016, section 4.2), or one of other widths and depth."""
    stages: list[nn.Module] = []
    inputs = widths[0]
    for stage, width in enumerate(widths):
        for i in range(blocks):
            stages.append(Block(inputs, width, 2 if stage and i == 0 else 1))
            inputs = width
    stem = [nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


class Attention(nn.Module):
    """Causal self-attention with separate projections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class GPT(nn.Module):
    """A small pre-norm transformer that predicts the next token: tokens (batch, T) -> logits (batch, T, vocabulary)."""

    def __init__(self, vocabulary: int = 512, width: int = 256, depth: int = 4, heads: int = 4, length: int = 128):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth + 1))
        self.attention = nn.ModuleList(Attention(width, heads) for _ in range(depth))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(depth)
        )
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for i, (attention, mlp) in enumerate(zip(self.attention, self.mlps, strict=True)):
            x = x + attention(self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(self.norms[-1](x))


class Tagger(nn.Module):
    """One LSTM layer with a linear read-out at its last step."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(width, width, batch_first=True), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class LoopTagger(nn.Module):
    """The function of :class:`Tagger`, its LSTM written as a loop over linear layers, which every library knows."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.ih, self.hh = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), self.hh.in_features)
        for step in x.unbind(1):
            i, f, g, o = (self.ih(step) + self.hh(h)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.head(h)

    def load(self, other: Tagger) -> None:
        """Take the weights of the fused one."""
        lstm = other.lstm
        self.ih.load_state_dict({"weight": lstm.weight_ih_l0, "bias": lstm.bias_ih_l0})
        self.hh.load_state_dict({"weight": lstm.weight_hh_l0, "bias": lstm.bias_hh_l0})
        self.head.load_state_dict(other.head.state_dict())


def autoencoder() -> nn.Sequential:
    """784-1000-500-250-30 and back (Hinton & Salakhutdinov 2006)."""
    sizes = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        layers += [nn.Linear(a, b)] + ([nn.Tanh()] if i not in (3, 7) else [])
    return nn.Sequential(*layers)


def deep(layers: int = 60, width: int = 32) -> nn.Sequential:
    """Many small layers: all that is left of a step's cost is Python."""
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*parts[:-1])


def _tokens_loss(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(_rows(outputs), targets.flatten(), reduction=reduction)


def _rows(outputs: Tensor) -> Tensor:
    return outputs.reshape(-1, outputs.shape[-1])


def _make(name: str) -> Workload:
    torch.manual_seed(0)
    if name == "W1":
        x = torch.rand(512, 784)
        return Workload("W1 autoencoder", autoencoder, x, x, "mse", F.mse_loss)
    if name == "W2":
        images, labels = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
        return Workload("W2 ResNet-20", resnet, images, labels, "cross_entropy", F.cross_entropy)
    if name == "W2w":
        images, labels = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
        wide = lambda: resnet((64, 128, 256), 1)  # noqa: E731
        return Workload("W2w ResNet wide", wide, images, labels, "cross_entropy", F.cross_entropy)
    if name == "W3":
        tokens = torch.randint(512, (8, 128))
        return Workload("W3 GPT", GPT, tokens, tokens.roll(-1, 1), "cross_entropy", _tokens_loss, _rows)
    if name in ("W4", "W4c"):
        x, labels = torch.randn(32, 32, 256), torch.randint(10, (32,))
        title, build = ("W4 LSTM", Tagger) if name == "W4" else ("W4c LSTM cells in a loop", LoopTagger)
        return Workload(title, build, x, labels, "cross_entropy", F.cross_entropy)
    if name == "small":
        x = torch.randn(64, 32)
        return Workload("60 layers of 32", deep, x, torch.randint(32, (64,)), "cross_entropy", F.cross_entropy)
    raise KeyError(f"there is no workload '{name}'; there are {', '.join(NAMES)}.")


NAMES = ("W1", "W2", "W2w", "W3", "W4", "W4c", "small")


def workload(name: str) -> Workload:
    """A workload by its short name; raises :class:`KeyError` for another."""
    return _make(name)


Key = TypeVar("Key")


def interleaved(
    sides: dict[Key, Callable[[], object]],
    rounds: int = 10,
    warm: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Key, list[float]]:
    """Seconds of every round by side; a round runs each side once, in order, after ``warm`` rounds that do not count.

    clock: ``time.process_time`` is the one that other work on the machine disturbs least, for a single thread.
    """
    times: dict[Key, list[float]] = {name: [] for name in sides}
    for i in range(warm + rounds):
        for name, run in sides.items():
            start = clock()
            run()
            if i >= warm:
                times[name].append(clock() - start)
    return times


def ratio(times: dict[str, list[float]], side: str, to: str) -> float:
    """Median over rounds of one side's time in units of another's."""
    return statistics.median(a / b for a, b in zip(times[side], times[to], strict=True))
