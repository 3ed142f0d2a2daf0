"""Character-level GPT on the language reference that Python itself carries (``pydoc_data.topics``).

A model file: ``build_model() -> nn.Module``, ``example_inputs``, ``loss``, ``batches(epoch)`` -> (inputs, targets), and
optionally ``prepare(model)``, ``evaluate(model) -> dict`` and ``settings`` (hyper-parameters by method).

Queries, keys and values are three separate products of one input, so a layer-wise method needs one input factor for
the three of them. The logits come back as (batch, characters, positions), the layout that cross-entropy over positions
expects. The text, and with it the vocabulary, differs a little between Python versions.

    fxcurv train examples/char_gpt.py --method kfac
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import chain, count, islice
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

import fxcurv

WIDTH = 64
HEADS = 4
BLOCKS = 2
CONTEXT = 64
BATCH = 16
STEPS_AN_EPOCH = 50
HELD_OUT = 20_000

TEXT = "\n".join(topics[name] for name in sorted(topics))
CHARACTERS = sorted(set(TEXT))

loss = "cross_entropy"
example_inputs = (torch.randint(len(CHARACTERS), (2, CONTEXT), generator=torch.Generator().manual_seed(0)),)

# sgd and adam: chosen among 6-7 learning rates each (and momentum 0.9, 0.95) by the training loss after 100 steps, the
# number behind: the mean of the last 10. The others: 2-4 learning rates and at most 3 dampings and KL clips each.
settings = {
    "sgd": {"lr": 0.02, "momentum": 0.9},  # 2.80 nats
    "adam": {"lr": 0.003},  # 2.63 nats
    "kfac": {"lr": 0.3},  # 2.71 nats
    "ekfac": {"lr": 0.3},  # 2.71 nats
    "foof": {"lr": 0.01},  # 3.01 nats
    "diag": {"lr": 0.03},  # 2.75 nats
    "shampoo": {"lr": 0.005},  # 2.86 nats
    "adahessian": {"lr": 0.08},  # 2.80 nats
    "hessian_free": {"lr": 1.0},  # 3.32 nats after 10 steps
}


@cache
def text() -> tuple[Tensor, Tensor]:
    """The text as character numbers: what to train on, and its last 20,000 characters."""
    number = {character: i for i, character in enumerate(CHARACTERS)}
    numbers = torch.tensor([number[character] for character in TEXT], dtype=torch.int64)
    return numbers[:-HELD_OUT], numbers[-HELD_OUT:]


class Attention(nn.Module):
    """Causal self-attention with a projection each for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k = nn.Linear(WIDTH, WIDTH)
        self.v = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, positions, WIDTH) to the same shape."""
        q, k, v = (f(x).unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Attention and a feed-forward net, each behind a LayerNorm and around a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, positions, WIDTH) to the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class CharGPT(nn.Module):
    """Character numbers (batch, positions) to logits of the next character (batch, characters, positions)."""

    def __init__(self) -> None:
        super().__init__()
        self.character = nn.Embedding(len(CHARACTERS), WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, len(CHARACTERS))

    def forward(self, numbers: Tensor) -> Tensor:
        """See the class. Positions are counted from the input, so that a traced graph serves every length."""
        positions = torch.ones_like(numbers).cumsum(dim=1) - 1
        x = self.character(numbers) + self.position(positions)
        return self.head(self.norm(self.blocks(x))).transpose(1, 2)


def build_model() -> nn.Module:
    """Fresh network; its weights come from torch's global generator."""
    model = CharGPT()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02 if isinstance(module, nn.Embedding) else WIDTH**-0.5)
    return model


def windows(numbers: Tensor, starts: Tensor) -> tuple[tuple[Tensor], Tensor]:
    """Pieces of text that begin at ``starts``, and as targets the same pieces one character later."""
    rows = numbers[starts.unsqueeze(1) + torch.arange(CONTEXT + 1)]
    return (rows[:, :-1],), rows[:, 1:]


def batches(epoch: int) -> Iterator[tuple[tuple[Tensor], Tensor]]:
    """Pieces of the text that the epoch decides; 50 batches are called an epoch."""
    numbers, _ = text()
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(STEPS_AN_EPOCH):
        yield windows(numbers, torch.randint(len(numbers) - CONTEXT, (BATCH,), generator=generator))


@torch.no_grad()
def evaluate(model: nn.Module) -> dict[str, float]:
    """Nats a character on the held-out text."""
    _, numbers = text()
    inputs, targets = windows(numbers, torch.arange(0, len(numbers) - CONTEXT, CONTEXT))
    return {"held-out nats": nn.functional.cross_entropy(model(*inputs), targets).item()}


def main(steps: int = 10, method: str = "kfac", lr: float = 0.1) -> list[float]:
    """Train for some steps with the public interface; returns the training losses."""
    torch.manual_seed(0)
    model = fxcurv.transform(build_model(), method=method, example_inputs=example_inputs, loss=loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    values = []
    for inputs, targets in islice(chain.from_iterable(map(batches, count())), steps):
        optimizer.zero_grad()
        outputs = model(*inputs)
        value = nn.functional.cross_entropy(outputs, targets)
        model.backward(value, outputs)
        model.precondition_()
        optimizer.step()
        values.append(value.item())
        print(f"step {len(values):3d}  {values[-1]:.4f} nats a character")
    print(evaluate(model))
    return values


if __name__ == "__main__":
    main()
