"""Character-level LSTM on text that a small grammar makes up: recurrent K-FAC beside K-FAC and SGD at equal steps.

A model file: ``build_model() -> nn.Module``, ``example_inputs``, ``loss``, ``batches(epoch)`` -> (inputs, targets), and
optionally ``prepare(model)``, ``evaluate(model) -> dict`` and ``settings`` (hyper-parameters by method).

Sentences agree in number over a relative clause, and brackets close what they opened, so there is something to
remember. The weights of an ``nn.LSTM`` are used at every character: ``transform`` shows them as products over all
characters, in time order, and method "kfac_rnn" measures how inputs and output gradients of neighbouring characters
depend on one another.

    python examples/recurrent_text.py
    fxcurv train examples/recurrent_text.py --method kfac_rnn
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from itertools import chain, count, islice

import torch
from torch import Tensor, nn

import fxcurv

EMBEDDING, HIDDEN = 16, 48
LENGTH, BATCH = 40, 16
STEPS_AN_EPOCH = 50
HELD_OUT = 4_000

NOUNS = ("cat", "owl", "king", "ship", "tree", "clerk")
VERBS = ("see", "follow", "carry", "want", "know")
CHARACTERS = sorted(set("abcdefghijklmnopqrstuvwxyz .,()[]"))

loss = "cross_entropy"
example_inputs = (torch.randint(len(CHARACTERS), (2, LENGTH), generator=torch.Generator().manual_seed(0)),)

# Mean training loss of steps 21 to 30. sgd and adam: the best of 4 and 5 learning rates; the others: of 3 KL clips.
settings = {
    "sgd": {"lr": 3.0, "momentum": 0.9},  # 0.66 nats
    "adam": {"lr": 0.1},  # 0.54 nats
    "kfac": {"lr": 0.3, "kl_clip": 3e-3},  # 0.55 nats
    "kfac_rnn": {"lr": 0.3, "kl_clip": 3e-3},  # 0.54 nats
}

# What ``compare`` tries: (learning rate, hyper-parameters). With a KL clip at work the learning rate matters little.
GRID: dict[str, list[tuple[float, dict[str, float]]]] = {
    "sgd": [(1.0, {}), (2.0, {}), (3.0, {}), (5.0, {})],
    "adam": [(0.05, {}), (0.1, {}), (0.15, {})],
    "kfac": [(0.3, {"kl_clip": 3e-3}), (0.3, {"kl_clip": 1e-2})],
    "kfac_rnn": [(0.3, {"kl_clip": 3e-3}), (0.3, {"kl_clip": 1e-2})],
}


def phrase(draw: random.Random, depth: int) -> tuple[str, bool]:
    """A noun phrase, and whether it is plural."""
    plural = draw.random() < 0.5
    words = f"the {draw.choice(NOUNS)}{'s' if plural else ''}"
    if depth and draw.random() < 0.4:
        words += f" that {clause(draw, plural, depth - 1)}"
    if depth and draw.random() < 0.2:
        left, right = draw.choice(("()", "[]"))
        words += f" {left}{sentence(draw, depth - 1)}{right}"
    return words, plural


def clause(draw: random.Random, plural: bool, depth: int) -> str:
    """A verb that agrees with its subject, and an object."""
    return f"{draw.choice(VERBS)}{'' if plural else 's'} {phrase(draw, depth)[0]}"


def sentence(draw: random.Random, depth: int = 2) -> str:
    """A subject and what it does."""
    subject, plural = phrase(draw, depth)
    return f"{subject} {clause(draw, plural, depth)}"


@cache
def text() -> tuple[Tensor, Tensor]:
    """The text as character numbers: what to train on, and its last 4,000 characters."""
    draw = random.Random(0)
    letters = "".join(f"{sentence(draw)}. " for _ in range(2_000))
    number = {character: i for i, character in enumerate(CHARACTERS)}
    numbers = torch.tensor([number[character] for character in letters])
    return numbers[:-HELD_OUT], numbers[-HELD_OUT:]


class TextLSTM(nn.Module):
    """Character numbers (batch, positions) to logits of the next character (batch, characters, positions)."""

    def __init__(self) -> None:
        super().__init__()
        self.character = nn.Embedding(len(CHARACTERS), EMBEDDING)
        self.memory = nn.LSTM(EMBEDDING, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, len(CHARACTERS))

    def forward(self, numbers: Tensor) -> Tensor:
        """See the class."""
        states, _ = self.memory(self.character(numbers))
        return self.head(states).transpose(1, 2)


def build_model() -> nn.Module:
    """Fresh network; its weights come from torch's global generator."""
    return TextLSTM()


def windows(numbers: Tensor, starts: Tensor) -> tuple[tuple[Tensor], Tensor]:
    """Pieces of text that begin at ``starts``, and as targets the same pieces one character later."""
    rows = numbers[starts.unsqueeze(1) + torch.arange(LENGTH + 1)]
    return (rows[:, :-1],), rows[:, 1:]


def batches(epoch: int) -> Iterator[tuple[tuple[Tensor], Tensor]]:
    """Pieces of the text that the epoch decides; 50 batches are called an epoch."""
    numbers, _ = text()
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(STEPS_AN_EPOCH):
        yield windows(numbers, torch.randint(len(numbers) - LENGTH, (BATCH,), generator=generator))


@torch.no_grad()
def evaluate(model: nn.Module) -> dict[str, float]:
    """Nats a character on the held-out text."""
    _, numbers = text()
    inputs, targets = windows(numbers, torch.arange(0, len(numbers) - LENGTH, LENGTH))
    return {"held-out nats": nn.functional.cross_entropy(model(*inputs), targets).item()}


def train(model: fxcurv.CurvatureModule, lr: float, steps: int) -> list[float]:
    """Training losses with the method's complete update rule."""
    optimizer = fxcurv.optimizer(model, lr=lr)
    values = []
    for inputs, targets in islice(chain.from_iterable(map(batches, count())), steps):
        optimizer.zero_grad()
        outputs = model(*inputs)
        value = nn.functional.cross_entropy(outputs, targets)
        model.backward(value, outputs)
        optimizer.step()
        values.append(value.item())
    return values


def transformed(method: str, **hyper: float) -> fxcurv.CurvatureModule:
    """A fresh network, the same one each time, under a method."""
    torch.manual_seed(0)
    return fxcurv.transform(build_model(), method, example_inputs=example_inputs, loss=loss, **hyper)


def main(steps: int = 30, method: str = "kfac_rnn") -> list[float]:
    """Train for some steps with the settings above; returns the training losses."""
    hyper = dict(settings[method])
    rate = hyper.pop("lr")
    model = transformed(method, **hyper)
    values = train(model, rate, steps)
    for step, value in enumerate(values, 1):
        print(f"step {step:3d}  {value:.4f} nats a character")
    print(evaluate(model))
    return values


def compare(steps: int = 30) -> dict[str, float]:
    """Mean loss of the last 10 of some steps by method, each with the best of its settings in GRID."""
    losses = {}
    for method, choices in GRID.items():
        runs = [train(transformed(method, **hyper), rate, steps) for rate, hyper in choices]
        losses[method] = min(sum(values[-10:]) / 10 for values in runs)
        print(f"{method:9s} {losses[method]:.3f} nats a character, the best of {len(choices)} settings")
    return losses


if __name__ == "__main__":
    main()
    compare()
