"""Small models, one for each thing that a front-end must get right, with example arguments in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, arange, nn
from torch.utils.checkpoint import checkpoint

Example = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class MLP(nn.Module):
    """Sub-modules under names that fxcurv and fx use themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        self.graph = nn.Linear(4, 4)
        self.program = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.program(self.graph(self.layers(x)).sigmoid())


class ConvNet(nn.Module):
    """BatchNorm, residual connection, in-place operations."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(x))
        y += x
        y = self.drop(F.relu_(y))
        return self.head(y.mean((2, 3)))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3))
        self.b = nn.Parameter(torch.randn(4))
        self.v = nn.ParameterList([nn.Parameter(torch.randn(2, 4))])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.w, self.b).tanh() * math.sqrt(x.shape[-1]), self.v[0])


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0, extra: Any = None) -> Tensor:
        y = self.fc(x) * scale
        if mask is not None:
            y = y.masked_fill(mask, 0.0)
        if extra is not None:
            y = y + extra["a"] * extra["b"][0]
        return y


@dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...] = ()
    loss: Tensor | None = None


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Outputs(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        y = h.tanh()
        return {
            "tuple": lambda: (y, [h, None]),
            "dict": lambda: {"y": y, "inner": {"h": h}, "n": 3},
            "dataclass": lambda: Output(y, (h, x)),
            "nested": lambda: [Output(y), {"pair": Pair(h, y), 1: "text"}],
        }[self.kind]()


class Tied(nn.Module):
    """Embedding and output projection share a weight; positions and causal mask follow the sequence length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.position = nn.Embedding(16, 8)
        self.qkv = nn.Linear(8, 24)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.tril(torch.ones(16, 16)).bool())

    def forward(self, tokens: Tensor) -> Tensor:
        b, t = tokens.shape
        assert len(tokens.shape) == 2 or t
        h = self.embed(tokens) + self.position(torch.arange(t, device=tokens.device))
        q, k, v = self.qkv(self.norm(h)).view(b, t, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))).masked_fill(~self.mask[:t, :t], float("-inf"))
        h = h + (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, 8)
        return self.head(h)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([self.fc, nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).relu()
        return self.fc(x)


class Constants(nn.Module):
    """Tensors made inside the forward, one of them written to; a plain tensor attribute; a counter buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.plain = torch.linspace(0, 1, 8, dtype=torch.float64)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        total = torch.zeros(x.shape[0], 8, dtype=x.dtype)
        total += arange(8)
        acc = torch.ones(8, dtype=torch.float64)
        acc[2] = x.sum()
        y = nn.ReLU()(self.fc(x) + total * acc + self.plain) + torch.tensor([1.0, 2.0] * 4) / len(x)
        alias = y
        y *= 2
        return alias + y


class Modes(nn.Module):
    """no_grad and autocast regions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.a(x)
        y = self.a(x) * 3
        with torch.autocast("cpu", torch.bfloat16):
            z = self.b(y.float())
        return (z.to(x.dtype) - target).square() + self.b(x.detach())


class RoundStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 0.5


class Quantised(nn.Module):
    """An autograd function with a backward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return RoundStraightThrough.apply(self.fc(x) * 3) * 2


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)
        self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 2)
        self.use_reentrant = use_reentrant

    def block(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.after(checkpoint(self.block, self.before(x), use_reentrant=self.use_reentrant))


class Noise(nn.Module):
    """A fresh draw on every call, of a shape that does not depend on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x + torch.randn(4, dtype=torch.float64)) * torch.rand(1, dtype=torch.float64)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.mha(y, y, y, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 5, batch_first=True)
        self.fc = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0])


class Ema(nn.Module):
    """Binds a buffer to a new tensor: beyond symbolic tracing, export writes it back."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("ema", torch.zeros(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        with torch.no_grad():
            self.ema = 0.9 * self.ema + 0.1 * y.mean(0)
        return y - self.ema


def parametrised() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def frozen_statistics() -> nn.Module:
    model = ConvNet(0.3)
    model.bn1.eval()
    model.drop.eval()
    return model


def tokens() -> Tensor:
    return torch.randint(0, 11, (3, 7))


SEVERAL = {"mask": torch.eye(3).bool(), "extra": {"a": x(3), "b": [x(3)]}, "scale": 2.0}
NETS: dict[str, Callable[[], Example]] = {
    "mlp": lambda: (MLP(), (x(4, 6),), {}),
    "convnet": lambda: (ConvNet(), (x(4, 3, 5, 5),), {}),
    "convnet_eval": lambda: (ConvNet(0.5).eval(), (x(4, 3, 5, 5),), {}),
    "dropout": lambda: (ConvNet(0.5), (x(4, 3, 5, 5),), {}),
    "eval_inside_train": lambda: (frozen_statistics(), (x(4, 3, 5, 5),), {}),
    "functional": lambda: (Functional(), (x(4, 3),), {}),
    "optional_absent": lambda: (Optional(), (x(3, 3),), {}),
    "optional_given": lambda: (Optional(), (x(3, 3),), SEVERAL),
    "positional": lambda: (Optional(), (x(3, 3), torch.eye(3).bool()), {}),
    "tuple": lambda: (Outputs("tuple"), (x(4, 3),), {}),
    "dict": lambda: (Outputs("dict"), (x(4, 3),), {}),
    "dataclass": lambda: (Outputs("dataclass"), (x(4, 3),), {}),
    "nested": lambda: (Outputs("nested"), (x(4, 3),), {}),
    "tied": lambda: (Tied(), (tokens(),), {}),
    "twice": lambda: (Twice(), (x(3, 4),), {}),
    "constants": lambda: (Constants(), (x(3, 8),), {}),
    "modes": lambda: (Modes(), (x(3, 4),), {}),
    "quantised": lambda: (Quantised(), (x(3, 4),), {}),
    "checkpoint": lambda: (Checkpointed(False), (x(3, 4),), {}),
    "checkpoint_reentrant": lambda: (Checkpointed(True), (x(3, 4),), {}),
    "noise": lambda: (Noise(), (x(3, 4),), {}),
    "attention": lambda: (Attention(), (x(2, 5, 8),), {}),
    "encoder": lambda: (encoder(), (x(2, 5, 8),), {}),
    "recurrent": lambda: (Recurrent(), (x(2, 3, 4),), {}),
    "parametrised": lambda: (parametrised(), (x(3, 4),), {}),
    "linear_root": lambda: (nn.Linear(4, 2), (x(3, 4),), {}),
    "ema": lambda: (Ema(), (x(3, 4),), {}),
}


def build(name: str) -> Example:
    """The model in float64 (mixed-precision regions cast by themselves) and its arguments."""
    torch.manual_seed(0)
    model, args, kwargs = NETS[name]()
    model = model.double()
    if name == "modes":
        model.b.float()
        model, args = model.float(), tuple(a.float() for a in args)
    return model, args, kwargs
