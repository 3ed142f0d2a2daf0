"""Averages of the parameters over the steps (Polyak), for evaluation: the iterates of a noisy method scatter around
something better than any of them.

The average lives in the optimizer's state, so that it is saved with it; ``opt.averaged()`` puts it in the parameters'
place for a while.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fxcurv.errors import FxcurvError

AVERAGE = "average"


def average(group: dict[str, Any], state: dict[Tensor, dict[str, Any]]) -> None:
    """Take the parameters of a group into their averages: weight min(1 - 1/k, group["averaging"]) on the old value."""
    decay = float(group.get("averaging") or 0.0)
    if not decay:
        return
    group["averaged"] = group.get("averaged", 0) + 1
    weight = min(1.0 - 1.0 / group["averaged"], decay)
    parameters = [p for p in group["params"] if p.requires_grad]
    for p in parameters:
        state[p].setdefault(AVERAGE, p.detach().clone())
    averages = [state[p][AVERAGE] for p in parameters]
    torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1.0 - weight)


@contextmanager
def averaged(opt: Optimizer) -> Iterator[None]:
    """The averages in the parameters' place; the parameters come back bit for bit, whatever happens.

    Raises :class:`FxcurvError` when there are no averages.
    """
    pairs = [
        (p, opt.state[p][AVERAGE]) for g in opt.param_groups for p in g["params"] if AVERAGE in opt.state.get(p, {})
    ]
    if not pairs:
        raise FxcurvError(
            "there are no averaged parameters: give fxcurv.optimizer averaging=0.99 and take a step first."
        )
    kept = [p.detach().clone() for p, _ in pairs]
    try:
        with torch.no_grad():
            for p, mean in pairs:
                p.copy_(mean)
        yield
    finally:
        with torch.no_grad():
            for (p, _), value in zip(pairs, kept, strict=True):
                p.copy_(value)
