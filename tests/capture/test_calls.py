"""A captured call hands arguments over as the user did: by position what came by position, by keyword the rest."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcurv.capture import FRONTENDS, Call, Runner, StitchedRunner, capture


def scaled(forward: Any) -> Any:
    """Overrules a keyword of the forward that it decorates, as libraries do with their options."""

    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        kwargs["scale"] = 2.0 * (kwargs.get("scale") or 1.0)
        return forward(self, *args, **kwargs)

    return wrapper


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    @scaled
    def forward(self, x: Tensor, shift: Tensor | None = None, scale: float | None = None, *, sign: int = 1) -> Tensor:
        y = self.fc(x) * scale * sign
        return y if shift is None else y + shift


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [(1, {}), (1, {"scale": 3.0}), (2, {"sign": -1}), (1, {"shift": 0, "scale": 3.0}), (0, {"x": 0, "sign": -1})],
)
def test_keywords_stay_keywords(frontend: str, args: int, kwargs: dict[str, Any]):
    model = Net().double()
    given = (torch.randn(5, 4).double(), torch.randn(5, 3).double())
    kwargs = {**kwargs, **{name: given[k] for k, name in enumerate(("x", "shift")) if name in kwargs}}
    call = Call.of(model, given[:args], kwargs)
    captured = capture(model, call, frontend)
    runner = Runner(captured) if captured.stitched is None else StitchedRunner(captured)
    torch.testing.assert_close(runner(model, *call.leaves), model(*given[:args], **kwargs))


def test_calls_that_mean_the_same_share_a_key():
    model, x, y = Net(), torch.randn(5, 4), torch.randn(5, 3)
    calls = [Call.of(model, (x, y)), Call.of(model, (x,), {"shift": y}), Call.of(model, (), {"shift": y, "x": x})]
    assert len({call.key for call in calls}) == 1
    for count, call in zip((2, 1, 0), calls, strict=True):
        args, kwargs = call.rebuild(call.leaves)
        assert len(args) == count and list(kwargs) == [*("x", "shift")[count:], "scale", "sign"]
    assert all(call.leaves[0] is x and call.leaves[1] is y for call in calls)
