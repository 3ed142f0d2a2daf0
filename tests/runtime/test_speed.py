"""The structure stays fast: transform is linear in the number of layers, and a large network takes no time to speak of.

Processor time, the best of some runs, and limits well above what is measured: see tests/benchmarks/structure.py for the
numbers themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import nn

import fxcurv
from fxcurv.capture import Call, capture
from tests.benchmarks.structure import chain, resnet50


def best(action: Callable[[], object], runs: int = 3) -> float:
    """Least processor time of some calls."""
    times = []
    for _ in range(runs):
        start = time.process_time()
        action()
        times.append(time.process_time() - start)
    return min(times)


def test_transform_is_linear_in_the_number_of_layers():
    small, large = (best(lambda n=n: fxcurv.transform(chain(n), "kfac", loss="cross_entropy")) for n in (15, 150))
    assert large < 16 * small  # ten times the layers


def test_transform_of_a_large_network():
    net: nn.Module = resnet50()
    capturing = best(lambda: capture(net, Call.default(net), "symbolic"), 2)
    whole = best(lambda: fxcurv.transform(net, "kfac", loss="cross_entropy"), 2)
    model = fxcurv.transform(net, "kfac", loss="cross_entropy")
    assert len(model.layers) == 107 and model.report().covered == 1.0 and model.report().frontend == "symbolic"
    assert whole - capturing < 4.0  # twice the limit, on a busy machine
