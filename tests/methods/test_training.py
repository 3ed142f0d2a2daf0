"""Every published method trains: with its defaults it lowers the loss of a small network on digits, in float32."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fxcurv
from fxcurv.methods import PUBLISHED

STEPS = 30
CLEARLY = 0.95  # of the loss at the start
SLOW_START = {
    "adam": 0.98,  # lr=0.001 moves no weight farther than 0.03 in 30 steps
}
OPTIONS: dict[str, dict[str, object]] = {
    "hessian_free": {"iterations": 10},  # its defaults are for one large batch, and seconds a step
}


@cache
def digits() -> tuple[Tensor, Tensor]:
    """256 digits of 64 pixels in [0, 1], and their classes."""
    data = load_digits(n_class=10)
    return torch.tensor(data.data[:256] / 16, dtype=torch.float32), torch.tensor(data.target[:256])


def train(method: str, steps: int = STEPS) -> tuple[float, float]:
    """(loss before the first step, loss after the last) on a fixed batch of 128."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 10))
    x, y = (part[:128] for part in digits())
    loss = nn.CrossEntropyLoss()
    model = fxcurv.transform(
        net, method, example_inputs=(x,), loss="cross_entropy", proofs=False, **OPTIONS.get(method, {})
    )
    opt = fxcurv.optimizer(model)

    def closure() -> Tensor:
        opt.zero_grad()
        outputs = model(x)
        value = loss(outputs, y)
        model.backward(value, outputs, targets=y)
        return value

    before = loss(net(x), y).item()
    for _ in range(steps):
        opt.step(closure)
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters())
    with torch.no_grad():
        return before, float(loss(net(x), y))


@pytest.mark.parametrize("method", sorted(PUBLISHED))
def test_defaults_lower_the_loss(method: str) -> None:
    before, after = train(method)
    share = after / before
    assert share < SLOW_START.get(method, CLEARLY), f"{method} went from {before:.3f} to {after:.3f}"
