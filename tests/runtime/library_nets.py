"""Networks in the style of public libraries, small and from torch alone: stand-ins for the lists of the benchmark."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tests.runtime.user_nets import VOCABULARY, Case


class SqueezeExcite(nn.Module):
    """An inverted residual block with squeeze and excitation, activations in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.depth = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width, bias=False)
        self.bn2, self.fc1, self.fc2 = nn.BatchNorm2d(2 * width), nn.Conv2d(2 * width, 2, 1), nn.Conv2d(2, 2 * width, 1)
        self.project, self.act = nn.Conv2d(2 * width, width, 1, bias=False), nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.expand(x)))
        y = self.act(self.bn2(self.depth(y)))
        gate = self.fc2(F.silu(self.fc1(y.mean((2, 3), keepdim=True)))).sigmoid()
        y = self.project(y * gate)
        y += x
        return y


class Segmenter(nn.Module):
    """An ordered dictionary of a main and an auxiliary output, both resized to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 4, 3, 2, 1, bias=False), SqueezeExcite(4)
        self.classifier, self.auxiliary = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        stem = self.stem(x)
        heads = (("out", self.classifier(self.block(stem))), ("aux", self.auxiliary(stem)))
        size = x.shape[-2:]
        return OrderedDict((name, F.interpolate(y, size=size, mode="bilinear")) for name, y in heads)


def window_attention(x: Tensor, qkv: Tensor, qkv_bias: Tensor, out: Tensor, bias: Tensor, shift: list[int]) -> Tensor:
    """Attention in windows of 2 x 2 after a roll, on weights that are passed in; shifts of small maps are dropped."""
    b, h, w, c = x.shape
    if h <= 2:
        shift[0] = 0
    x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
    x = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
    q, k, v = F.linear(x, qkv, qkv_bias).reshape(len(x), 4, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
    weights = F.softmax(q @ k.transpose(-2, -1) / math.sqrt(c // 2) + bias, -1)
    x = F.linear((weights @ v).transpose(1, 2).reshape(-1, 4, c), out)
    x = x.view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
    return torch.roll(x, (shift[0], shift[1]), (1, 2))


fx.wrap("window_attention")


class Windows(nn.Module):
    """Shifted windows: the function that reads the weights is wrapped, the positions are indexed from a table."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 4, 2, 2), nn.LayerNorm(4)
        self.qkv, self.proj = nn.Linear(4, 12), nn.Linear(4, 4, bias=False)
        self.table, self.head = nn.Parameter(torch.randn(9, 2) / 10), nn.Linear(4, 3)
        places = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        distance = (places[:, :, None] - places[:, None]) + 1
        self.register_buffer("index", (3 * distance[0] + distance[1]).flatten())

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).permute(0, 2, 3, 1)
        bias = self.table[self.index].view(4, 4, 2).permute(2, 0, 1)
        for shift in (0, 1):
            y = self.norm(x)
            x = x + window_attention(y, self.qkv.weight, self.qkv.bias, self.proj.weight, bias, [shift, shift])
        return self.head(x.mean((1, 2)))


class LayerScale(nn.Module):
    """Channels last, a depthwise convolution, a scale for each channel, stochastic depth."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)
        self.gamma, self.head = nn.Parameter(0.1 * torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.down(F.gelu(self.up(self.norm(self.depth(x).permute(0, 2, 3, 1))))) * self.gamma
        if self.training:
            y = y * y.new_empty(y.shape[0], 1, 1, 1).bernoulli_(0.8).div_(0.8)
        return self.head((x + y.permute(0, 3, 1, 2)).mean((2, 3)))


class Mixer(nn.Module):
    """Products over tokens and over channels, an affine map in place of a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.alpha, self.beta = nn.Linear(6, 4), nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
        self.tokens, self.channels, self.head = nn.Linear(5, 5), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x)
        x = x + self.tokens(torch.addcmul(self.beta, self.alpha, x).transpose(1, 2)).transpose(1, 2)
        return self.head((x + F.gelu(self.channels(x))).mean(1))


@dataclass
class ModelOutput:
    """Named outputs, some of them missing."""

    logits: Tensor
    loss: Tensor | None = None
    hidden: tuple[Tensor, ...] = ()


class RMSNorm(nn.Module):
    """As transformer libraries write it, in float32 inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float64)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(x.dtype)


class Llama(nn.Module):
    """Rotary positions, grouped queries, a gated MLP, a causal mask made from the sizes, keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm1, self.norm2, self.norm3 = nn.Embedding(VOCABULARY, 8), RMSNorm(8), RMSNorm(8), RMSNorm(8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, n, bias=False) for n in (8, 4, 4, 8))
        self.gate, self.up, self.down = (nn.Linear(a, b, bias=False) for a, b in ((8, 12), (8, 12), (12, 8)))
        self.lm_head = nn.Linear(8, VOCABULARY, bias=False)
        self.register_buffer("frequencies", 1.0 / 100 ** (torch.arange(0, 4, 2) / 4), persistent=False)

    def _rotated(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[-2], device=x.device, dtype=x.dtype)
        angles = torch.outer(places, self.frequencies.to(x.dtype)).repeat(1, 2)
        left, right = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-right, left), -1) * angles.sin()

    def forward(self, input_ids: Tensor, mask: Tensor | None = None, use_cache: bool = False) -> ModelOutput:
        b, t = input_ids.shape
        x = self.words(input_ids)
        h = self.norm1(x)
        q, k, v = (p(h).view(b, t, -1, 4).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k, v = self._rotated(q), self._rotated(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        causal = torch.full((t, t), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
        y = F.scaled_dot_product_attention(q, k, v, causal if mask is None else causal + mask)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, -1))
        h = self.norm2(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return ModelOutput(self.lm_head(self.norm3(x)), hidden=(x,))


class EncoderDecoder(nn.Module):
    """Relative position buckets, cross attention, one embedding for source, target and output."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.bias = nn.Embedding(VOCABULARY, 8), nn.Embedding(5, 2)
        self.projections = nn.ModuleDict(
            {name: nn.Linear(8, 8, bias=False) for name in ("q", "k", "v", "cq", "ck", "cv")}
        )
        self.norm1, self.norm2 = RMSNorm(8), nn.LayerNorm(8)

    def _attend(self, names: tuple[str, str, str], x: Tensor, memory: Tensor, bias: Any = 0.0) -> Tensor:
        q, k, v = (self.projections[n](y) for n, y in zip(names, (x, memory, memory), strict=True))
        q, k, v = (y.view(y.shape[0], -1, 2, 4).transpose(1, 2) for y in (q, k, v))
        weights = torch.matmul(q, k.transpose(3, 2)) + bias
        return torch.matmul(F.softmax(weights, -1), v).transpose(1, 2).flatten(2)

    def forward(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        places = torch.arange(source.shape[1], device=source.device)
        buckets = (places[None] - places[:, None]).clamp(-2, 2) + 2
        x, y = self.shared(source), self.shared(target)
        x = x + self._attend(("q", "k", "v"), self.norm1(x), self.norm1(x), self.bias(buckets).permute(2, 0, 1)[None])
        y = y + self._attend(("cq", "ck", "cv"), self.norm2(y), x)
        return {"logits": y @ self.shared.weight.t() * 8**-0.5, "memory": x}


class GraphAttention(nn.Module):
    """Two layers by hand: normalised sums over edges, then attention by softmax over the edges of a node."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shift = nn.Linear(4, 6, bias=False), nn.Parameter(torch.zeros(6))
        self.second, self.attention = nn.Linear(6, 3, bias=False), nn.Parameter(torch.randn(2, 3) / 2)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges[0], edges[1]
        degree = torch.zeros_like(x[:, 0]).index_add(0, target, torch.ones_like(x[:, 0])[target]).clamp(min=1)
        h = self.first(x)
        h = torch.zeros_like(h).index_add(0, target, h[source] / degree[target, None]) + self.shift
        h = self.second(F.elu(h))
        scores = (h * self.attention[0]).sum(-1)[source] + (h * self.attention[1]).sum(-1)[target]
        weights = F.leaky_relu(scores, 0.2).exp()
        total = torch.zeros_like(degree).index_add(0, target, weights).clamp(min=1e-9)
        return torch.zeros_like(h).index_add(0, target, h[source] * (weights / total[target])[:, None])


class Attentive(nn.Module):
    """An LSTM encoder, a GRU cell that attends to it at each of four steps."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.encoder = nn.Embedding(VOCABULARY, 4), nn.LSTM(4, 5, batch_first=True, bidirectional=True)
        self.cell, self.query, self.out = nn.GRUCell(14, 6), nn.Linear(6, 10), nn.Linear(6, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, _ = self.encoder(self.words(source))
        state, y, outputs = memory.new_zeros(memory.shape[0], 6), self.words(target), []
        for step in range(4):
            weights = torch.bmm(memory, self.query(state)[:, :, None]).softmax(1)
            context = (weights * memory).sum(1)
            state = self.cell(torch.cat([y[:, step], context], 1), state)
            outputs.append(self.out(state))
        return torch.stack(outputs, 1)


def _floats(*shape: int) -> Any:
    return lambda n: (torch.randn(n, *shape, dtype=torch.float64),)


def _tokens(n: int) -> Tensor:
    return torch.randint(VOCABULARY, (n, 4))


def _words(n: int) -> Tensor:
    return torch.randint(VOCABULARY, (n * 4,))


def _graph(n: int) -> tuple[Tensor, Tensor]:
    ring = torch.arange(n)
    return torch.randn(n, 4, dtype=torch.float64), torch.stack(
        [ring.repeat(2), torch.cat([ring.roll(1), ring.roll(2)])]
    )


LIBRARY_CASES: dict[str, Case] = {
    "torchvision: dictionary of resized outputs": Case(
        Segmenter, _floats(3, 6, 6), lambda o: o["out"] + 0.4 * o["aux"], lambda n: torch.randint(3, (n, 6, 6))
    ),
    "torchvision: wrapped window attention": Case(Windows, _floats(3, 8, 8)),
    "timm: layer scale and stochastic depth": Case(LayerScale, _floats(3, 6, 6)),
    "timm: token mixer with affine maps": Case(Mixer, _floats(5, 6)),
    "transformers: grouped queries and rotary positions": Case(
        Llama, lambda n: (_tokens(n),), lambda o: o.logits.view(-1, VOCABULARY), _words
    ),
    "transformers: encoder and decoder": Case(
        EncoderDecoder, lambda n: (_tokens(n), _tokens(n)), lambda o: o["logits"].flatten(0, 1), _words
    ),
    "graph: sums and attention over edges": Case(GraphAttention, _graph),
    "recurrent: attention at every step": Case(
        Attentive, lambda n: (_tokens(n), _tokens(n)), lambda o: o.flatten(0, 1), _words
    ),
}
