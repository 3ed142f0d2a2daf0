"""A buffer that the forward binds to a tensor of another shape: a cache of what sizes alone decide, or a refusal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxcurv.capture import Call, Runner, capture
from fxcurv.errors import FxcurvError


class Positions(nn.Module):
    """Makes its table of distances when it first sees a number of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("distances", torch.zeros(1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.distances.shape[1] != x.shape[1]:
            places = torch.arange(x.shape[1], device=x.device)
            self.distances = (places[None] - places[:, None]).abs().to(x.dtype)
        return torch.exp(-self.distances) @ self.fc(x)


class Last(nn.Module):
    """Keeps its last input, of whatever shape."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("last", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.last = x * 2
        return self.fc(x)


@pytest.mark.parametrize("warm", [False, True])
def test_a_cache_is_computed_by_the_graph_and_left_alone_in_the_module(warm: bool):
    model, x = Positions().double(), torch.randn(3, 5, 4, dtype=torch.float64)
    if warm:
        model(x)
    before = model.distances
    captured = capture(model, Call.of(model, (x,)), "export")
    runner = Runner(captured)
    torch.testing.assert_close(runner(model, torch.cat([x, x])), model.__class__.forward(model, torch.cat([x, x])))
    again = Positions().double()
    again.load_state_dict(model.state_dict())
    held = again.distances
    torch.testing.assert_close(runner(again, x) if not warm else again(x), model(x))
    assert before.shape == ((5, 5) if warm else (1, 1)) and (warm or again.distances is held)


def test_what_the_input_decides_is_refused():
    model, x = Last().double(), torch.randn(3, 4, dtype=torch.float64)
    with pytest.raises(FxcurvError, match="binds the buffer 'last' to a tensor of another shape"):
        capture(model, Call.of(model, (x,)), "export")
