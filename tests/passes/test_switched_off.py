"""Switching any single pass off, or all kernels, changes how a step is computed and no result beyond rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcurv
from fxcurv.passes import PIPELINE

NEEDED = {"detect", "build", "tap", "cadence", "lower"}  # without these there is nothing to run
SWITCHABLE = [step.name for step in PIPELINE if step.name not in NEEDED]


class Words(nn.Module):
    """Embedding, norm, three projections of one tensor, a recurrent layer and a read-out."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(11, 6), nn.LayerNorm(6)
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))
        self.cell, self.head = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.table(tokens))
        x = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        return self.head(self.cell(x)[0].mean(1))


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1, groups=2), nn.ReLU(),
        nn.Conv2d(6, 6, 1), nn.Tanh(), nn.Flatten(), nn.Linear(54, 3),
    )  # fmt: skip


def deep() -> nn.Module:
    layers = [layer for _ in range(6) for layer in (nn.Linear(8, 8), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(8, 20), nn.Tanh(), nn.Linear(20, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], Tensor]]] = {
    "words": (Words, lambda draw: torch.randint(11, (5, 7), generator=draw)),
    "images": (images, lambda draw: torch.randn(5, 2, 5, 5, generator=draw, dtype=torch.float64)),
    "deep": (deep, lambda draw: torch.randn(5, 8, generator=draw, dtype=torch.float64)),
}


def train(model: str, method: str, **options: Any) -> list[Tensor]:
    """All parameters after four steps, two with statistics and refresh."""
    build, make = MODELS[model]
    draw = torch.Generator().manual_seed(5)
    torch.manual_seed(0)
    net, x, y = build().double(), make(draw), torch.randint(3, (5,), generator=draw)
    cm = fxcurv.transform(
        net, method, example_inputs=(x,), loss="cross_entropy", factor_every=2, solve_every=2, **options
    )
    optimizer = torch.optim.SGD(cm.parameters(), lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        out = cm(x)
        cm.backward(F.cross_entropy(out, y), out)
        cm.precondition_()
        optimizer.step()
    return [p.detach().clone() for p in cm.parameters()]


BASE: dict[tuple[str, str], list[Tensor]] = {}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", ["kfac", "ekfac", "shampoo"])
@pytest.mark.parametrize("off", [*SWITCHABLE, "kernels", "weight gradients"])
def test_no_result_changes(off: str, method: str, model: str) -> None:
    options = {"damping": 0.1} if method != "shampoo" else {}
    if (model, method) not in BASE:
        BASE[model, method] = train(model, method, **options)
    if off == "weight gradients":
        switched: dict[str, Any] = {"weight_gradients": False}
    else:
        switched = {"backend": "reference"} if off == "kernels" else {"disable": (off,)}
    for mine, theirs in zip(train(model, method, **options, **switched), BASE[model, method], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)
