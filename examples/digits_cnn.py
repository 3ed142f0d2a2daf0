"""Small convolutional net with BatchNorm on scikit-learn's 8x8 digits.

A model file: ``build_model() -> nn.Module``, ``example_inputs``, ``loss``, ``batches(epoch)`` -> (inputs, targets), and
optionally ``prepare(model)``, ``evaluate(model) -> dict`` and ``settings`` (hyper-parameters by method).

Convolutions share their weights over positions, BatchNorm has a scale and a shift a channel, and its statistics differ
between training and evaluation: every kind of layer an image classifier has, in a net that trains in seconds.

    fxcurv train examples/digits_cnn.py --method ekfac
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import chain, count, islice

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fxcurv

BATCH = 128
HELD_OUT = 360

loss = "cross_entropy"
example_inputs = (torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)),)

# sgd and adam: chosen among 4 learning rates each (and momentum 0.9, 0.95) by the training loss after 100 steps, the
# number behind: the mean of the last 10. The others: 2-4 learning rates and at most 3 dampings and KL clips each.
settings = {
    "sgd": {"lr": 0.1, "momentum": 0.9},  # 0.0085
    "adam": {"lr": 0.01},  # 0.0072
    "kfac": {"lr": 0.03, "damping": 0.1, "kl_clip": 0.1},  # 0.0012
    "ekfac": {"lr": 0.01, "damping": 0.1, "kl_clip": 0.1},  # 0.0068
    "foof": {"lr": 0.06},  # 0.0007
    "diag": {"lr": 0.03, "damping": 0.1, "kl_clip": 0.1},  # 0.0097
    "shampoo": {"lr": 0.015},  # 0.032
    "adahessian": {"lr": 0.03},  # 0.10
    "hessian_free": {"lr": 1.0},  # 0.10 after 20 steps
}


@cache
def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images, labels) to train on (1437) and held out (360); images (n, 1, 8, 8) in [0, 1], shuffled once."""
    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held_out = order[:-HELD_OUT], order[-HELD_OUT:]
    return (images[train], labels[train]), (images[held_out], labels[held_out])


def build_model() -> nn.Module:
    """Fresh network; its weights come from torch's global generator."""
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 2 * 2, 10),
    )


def batches(epoch: int) -> Iterator[tuple[tuple[Tensor], Tensor]]:
    """The training digits in an order that the epoch decides; the last batch is smaller."""
    (images, labels), _ = digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
    for rows in order.split(BATCH):
        yield (images[rows],), labels[rows]


@torch.no_grad()
def evaluate(model: nn.Module) -> dict[str, float]:
    """Accuracy on the held-out digits, in evaluation mode."""
    _, (images, labels) = digits()
    training = model.training
    model.eval()
    correct = model(images).argmax(dim=1) == labels
    model.train(training)
    return {"held-out accuracy": correct.float().mean().item()}


def main(steps: int = 20, method: str = "ekfac", lr: float = 0.1) -> list[float]:
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
        print(f"step {len(values):3d}  loss {values[-1]:.4f}")
    print(evaluate(model))
    return values


if __name__ == "__main__":
    main()
