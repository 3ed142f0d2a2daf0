"""Profiler ranges: a name for every node of a slice and every statistic of a tap, and nothing without a profiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcurv
import fxcurv.passes
from fxcurv.ir.ranges import profiling, title
from fxcurv.runtime.module import CurvatureModule


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.q, self.k = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x)).flatten(1)
        return self.q(h) + self.k(h)


def transformed(**options: Any) -> CurvatureModule:
    torch.manual_seed(0)
    return fxcurv.transform(Net(), "kfac", loss="cross_entropy", example_inputs=(torch.randn(3, 1, 4, 4),), **options)


def step(model: CurvatureModule) -> list[Tensor]:
    torch.manual_seed(1)
    x, y = torch.randn(3, 1, 4, 4), torch.randint(4, (3,))
    out = model(x)
    model.backward(F.cross_entropy(out, y), out)
    model.precondition_()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def names(model: CurvatureModule) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(model)
    return {event.name for event in profile.events() if event.name.startswith("fxcurv::")}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_profile_names_every_node_of_the_slice_and_every_statistic(backend: str) -> None:
    model = transformed(backend=backend, disable=("batch",) if "batch" in fxcurv.passes.PASSES else ())
    found = names(model)
    lowered = model._engine.lowered
    (sliced,) = lowered.slices.values()
    wanted = {
        title(node.target.name, node.meta["owner"])
        for node in lowered.program.nodes
        if node.name in lowered.functions and f"    {node.name} = " in sliced.source
    }
    assert wanted and wanted <= found
    assert {"fxcurv::gram [conv]", "fxcurv::gram [q]", "fxcurv::gram [k]"} <= found  # taps, in the backward pass
    assert any(name.startswith("fxcurv::inverse") and "q" in name for name in found)


def test_the_plain_slice_has_no_ranges_and_both_agree() -> None:
    plain = transformed()
    expected = step(plain)
    (sliced,) = plain._engine.lowered.slices.values()
    assert "record_function" not in sliced.source and "record_function" not in sliced.scope
    assert sliced.ranged_source.count("with record_function(") > 5
    assert "ranged" not in vars(sliced)  # not even built

    profiled = transformed()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        found = step(profiled)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert all("ranged" in vars(piece) for piece in profiled._engine.lowered.slices.values())


def test_nothing_is_entered_without_a_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformed()

    def refuse(*_: Any) -> None:
        raise AssertionError("a range was entered")

    monkeypatch.setattr(torch.profiler, "record_function", refuse)
    assert not profiling()
    step(model)


def test_titles_are_short() -> None:
    assert title("gram", ["attn.q"]) == "fxcurv::gram [attn.q]"
    assert title("gram", [f"l{i}" for i in range(9)]) == "fxcurv::gram [l0, l1 +7]"
    assert title("dot", ()) == "fxcurv::dot"
