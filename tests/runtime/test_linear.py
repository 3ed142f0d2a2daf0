"""``transform`` and the first slice stay linear in the number of layers: counted in Python calls, not in seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from torch import nn

import fxcurv
from fxcurv.passes import PIPELINE, Compilation, Pass

FEW, MANY = 30, 120
GENEROUS = 1.25  # of linear growth


class Counter:
    """Counts the calls that Python and its built-in functions make."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        self.calls += event in ("call", "c_call")


@dataclass(frozen=True)
class Counted(Pass):
    """A pass that notes how many calls it makes."""

    inner: Any
    counter: Any
    found: Any
    name: ClassVar[str] = "counted"

    def __getattribute__(self, name: str) -> Any:
        own = name in ("inner", "counter", "found", "run") or name.startswith("__")
        return object.__getattribute__(self, name) if own else getattr(self.inner, name)

    def run(self, c: Compilation) -> int:
        before = self.counter.calls
        rewrites: int = self.inner.run(c)
        self.found[self.inner.name] = self.counter.calls - before
        return rewrites


def calls(layers: int, method: str, passes: tuple[Pass, ...] = PIPELINE) -> dict[str, int]:
    """Calls of every pass, of the whole transform and of the first slice for a chain of linear layers."""
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
    counter, found = Counter(), dict[str, int]()
    wrapped = tuple(Counted(step, counter, found) for step in passes)
    before = sys.getprofile()
    sys.setprofile(counter)
    try:
        model = fxcurv.transform(net, method, loss="cross_entropy", passes=wrapped)
        found["transform"] = counter.calls
        model._engine.lowered.slice({"statistics", "refresh"})
        found["slice"] = counter.calls - found["transform"]
    finally:
        sys.setprofile(before)
    return found


def grown(make: Callable[[int], dict[str, int]]) -> dict[str, float]:
    """By how much each part grows beyond linear; what it does once for all layers is left out of account."""
    few, many = make(FEW), make(MANY)
    return {name: many[name] / (MANY / FEW * few[name]) for name in many if few.get(name) and many[name] > 1000}


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_every_pass_is_linear_in_layers(method: str) -> None:
    calls(3, method)  # caches and imports
    found = grown(lambda layers: calls(layers, method))
    assert {"build", "share", "transform", "slice"} <= set(found)
    assert {name: factor for name, factor in found.items() if factor > GENEROUS} == {}


def test_a_quadratic_pass_would_show() -> None:
    @dataclass(frozen=True)
    class Quadratic(Pass):
        name: ClassVar[str] = "quadratic"

        def run(self, c: Compilation) -> int:
            assert c.program is not None
            nodes = list(c.program.nodes)
            return 0 * sum(len(other.name) for node in nodes[::10] for other in nodes)

    found = grown(lambda layers: calls(layers, "kfac", (*PIPELINE, Quadratic())))
    assert found["quadratic"] > 2 * GENEROUS
