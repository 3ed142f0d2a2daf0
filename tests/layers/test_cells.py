"""Recurrent cells in a Python loop: every step is a use of the same two weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.layers.check import FRONTENDS, assert_exact
from tests.layers.whole import assert_same

pytestmark = pytest.mark.usefixtures("float64")
CELLS = {
    "LSTM": nn.LSTMCell,
    "GRU": nn.GRUCell,
    "RNN": nn.RNNCell,
    "relu": lambda *sizes, bias: nn.RNNCell(*sizes, bias=bias, nonlinearity="relu"),
}


class Unrolled(nn.Module):
    """A cell in a Python loop, from no state or a given one."""

    def __init__(self, kind: str, steps: int, bias: bool = True) -> None:
        super().__init__()
        self.cell, self.steps = CELLS[kind](3, 4, bias=bias), steps

    def forward(self, x: Tensor, hx: Any = None) -> Tensor:
        total = 0
        for t in range(self.steps):
            hx = self.cell(x[t], hx)
            total = total + (t + 1.0) * (hx[0] * hx[1] if isinstance(self.cell, nn.LSTMCell) else hx)
        return total


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize(("steps", "bias", "given"), [(1, True, True), (3, True, False), (3, False, True)])
def test_cells(kind: str, steps: int, bias: bool, given: bool, frontend: str) -> None:
    h = torch.randn(2, 4)
    args = ((h, torch.randn(2, 4)) if kind == "LSTM" else h,) if given else ()
    detection = assert_same(Unrolled(kind, steps, bias), (torch.randn(steps, 2, 3), *args), frontend)
    assert [len(layer.uses) for layer in detection.layers] == [steps, steps]


def test_a_cell_without_batch_axis() -> None:
    assert_same(Unrolled("LSTM", 2), (torch.randn(2, 3),))


def test_functions() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.u = nn.Parameter(torch.randn(12, 3)), nn.Parameter(torch.randn(12, 4))
            self.b, self.d = nn.Parameter(torch.randn(12)), nn.Parameter(torch.randn(12))

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return torch.gru_cell(x, h, self.w, self.u, self.b, self.d)

    detection = assert_same(Flat(), (torch.randn(2, 3), torch.randn(2, 4)))
    assert [layer.params for layer in detection.layers] == [("w", "b"), ("u", "d")]


class Handwritten(nn.Module):
    """A cell of linear layers in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], 4)
        for t in range(3):
            h = torch.tanh(self.inner(x[:, t]) + self.outer(h))
        return h


def test_handwritten_cell() -> None:
    detection = assert_exact(Handwritten(), torch.randn(2, 3, 3))
    assert [len(layer.uses) for layer in detection.layers] == [3, 3]
