"""Functions kept whole in a graph may work on lists that they are given, when shapes and proofs are computed too."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

import fxcurv


def shifted(x: Tensor, shifts: list[int], *, sizes: dict[str, int]) -> Tensor:
    """Rolls, unless the window is as large as the data; notes that in its arguments, as window attention does."""
    if sizes.pop("window") >= 4:
        shifts[0] = 0
    return x.roll(shifts, dims=[1])


fx.wrap("shifted")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(shifted(self.enter(x), [1], sizes={"window": 4}))


def test_a_function_may_change_the_lists_it_is_given():
    x = torch.randn(3, 4, dtype=torch.float64)
    model = fxcurv.transform(Net().double(), "kfac", example_inputs=(x,), loss="mse", frontend="symbolic")
    assert model.report().covered == 1.0
    assert {node.op for node in model.graph.graph.nodes if node.target is shifted} == {"call_function"}
    torch.testing.assert_close(model(x), model.strip()(x))
