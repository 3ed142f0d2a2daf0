"""``explain``: costs by hand, memory against the profiler's measurements, the critical path, and what is printed."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcurv
import fxcurv.passes
from fxcurv.errors import FxcurvError
from fxcurv.passes.launches import launches
from fxcurv.passes.lower import resolve
from fxcurv.runtime.module import CurvatureModule
from fxcurv.tools import calibrate
from fxcurv.tools.devices import Device, device, interpolate
from fxcurv.tools.estimate import Estimate, estimate
from fxcurv.tools.explain import explain, memory
from fxcurv.tools.path import critical_path
from fxcurv.tools.peak import nodes_of
from fxcurv.tools.recorder import Recorder, Work

Invoke = Callable[..., Any]
FLAT = ((1.0, 1e9),)
TOY = Device("toy", {"product": FLAT}, {"f32": 1.0}, FLAT, 0.0, "for tests")
"""A device of 1 Gflop/s and 1 GB/s without launch costs."""


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of its own with a made-up machine, so that nothing is measured here."""
    monkeypatch.setenv("FXCURV_CACHE", str(tmp_path / "cache"))
    calibrate.save(made_up())


def made_up() -> dict[str, Any]:
    kinds = ("product", "convolution", "cholesky", "inverse", "eigen")
    return {
        "format": calibrate.FORMAT, "processor": "toy", "threads": 1, "torch": "0", "launch": 1e-6,
        "rates": {kind: [[16.0, 1e9], [256.0, 1e10]] for kind in kinds}, "relative": {"f64": 0.5},
        "bandwidth": [[1e4, 1e10]],
    }  # fmt: skip


class Attention(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (p(h).unflatten(-1, (2, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head((x + self.down(F.gelu(self.up(x)))).mean(1))


def network(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name == "linear":
        return nn.Sequential(nn.Linear(200, 300), nn.Tanh(), nn.Linear(300, 100), nn.Tanh(), nn.Linear(100, 10)), (
            torch.randn(256, 200)
        )
    if name == "conv":
        layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 64, 10)), torch.randn(32, 3, 16, 16)
    return Attention(), torch.randn(32, 48, 32)


def transformed(name: str, method: str = "kfac", **options: Any) -> tuple[CurvatureModule, Tensor]:
    net, x = network(name)
    return fxcurv.transform(net, method, example_inputs=(x,), loss="cross_entropy", **options), x


def peak_of(step: Callable[[], Any]) -> int:
    """Most bytes beyond those at the start, from the allocator's events as the profiler saw them."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("name", ["linear", "conv", "transformer"])
def test_memory_is_predicted_within_ten_percent(name: str, fisher: str) -> None:
    model, x = transformed(name, fisher=fisher, factor_every=1, solve_every=1)
    y = torch.randint(10, (len(x),))

    def step() -> None:
        model.zero_grad()
        out = model(x)
        model.backward(F.cross_entropy(out, y), out)
        model.precondition_()

    def backward() -> None:
        out = model(x)
        model.backward(F.cross_entropy(out, y), out)

    step()
    step()
    model.zero_grad()
    in_backward = peak_of(backward)
    model.precondition_()
    model.zero_grad()
    whole = peak_of(step)
    predicted = memory(estimate(model, TOY))
    assert predicted["states"] == model._engine.states.nbytes
    assert predicted["backward_peak"] == pytest.approx(in_backward, rel=0.1)
    assert predicted["peak"] == pytest.approx(whole, rel=0.1)


def test_plain_step_and_statistics_by_hand() -> None:
    """One linear layer: 2 n i o forward, 2 n i o for its weights; Grams 2 n d^2, in the second pass nothing but g."""
    n, i, o = 64, 40, 24
    net = nn.Sequential(nn.Linear(i, o, bias=False))
    model = fxcurv.transform(net, "kfac", example_inputs=(torch.randn(n, i),), loss="mse", backend="reference")
    e = estimate(model, TOY)
    products = sum(w.flops * w.count for w in e.dry.plain if w.kind == "product")
    assert products == 4 * n * i * o
    grams = {item.name: sum(w.flops for w in item.works if w.kind == "product") for item in e.taps}
    assert grams["gram(0.a)"] == 2 * n * i * i and grams["gram(0.g)"] == 2 * n * o * o
    assert e.columns == 1 and all(w.kind != "product" for w in e.dry.second)  # nothing behind the first layer
    apply = [item for item in e.nodes.values() if item.op == "kron_apply"]
    assert sum(w.flops for item in apply for w in item.works if w.kind == "product") == 2 * o * o * i + 2 * o * i * i


def test_a_sampled_fisher_costs_a_backward_pass_without_weight_gradients() -> None:
    n, d = 32, 48
    net = nn.Sequential(*(nn.Linear(d, d, bias=False) for _ in range(3)))
    options: dict[str, Any] = {"example_inputs": (torch.randn(n, d),), "loss": "mse"}
    sampled = estimate(fxcurv.transform(net, "kfac", **options), TOY)
    assert sum(w.flops * w.count for w in sampled.dry.second if w.kind == "product") == 2 * 2 * n * d * d
    empirical = estimate(fxcurv.transform(net, "kfac", fisher="empirical", **options), TOY)
    assert empirical.columns == 0 and empirical.dry.second == () or empirical.source_seconds < sampled.source_seconds
    exact = estimate(fxcurv.transform(net, "kfac", fisher="ggn", **options), TOY)
    assert exact.columns == d
    pairs = zip(sampled.taps, exact.taps, strict=True)
    for one, many in pairs:  # inputs are measured once, output gradients in every pass
        assert many.times == (d if one.name.endswith("g)") else 1), one.name


def test_ratios_follow_the_periods() -> None:
    model, _ = transformed("linear", factor_every=2, solve_every=10)
    e = estimate(model, TOY)
    seconds = {name: e.part(name).seconds for name in e.periods}
    second = e.columns * e.second.seconds + e.rewritten.seconds
    by_hand = 1 + (seconds["step"] + (seconds["statistics"] + second) / 2 + seconds["refresh"] / 10) / e.plain.seconds
    assert e.ratio() == pytest.approx(by_hand)
    assert e.step_ratio(()) == pytest.approx(1 + seconds["step"] / e.plain.seconds)
    assert e.ratio({"refresh": 20}) == pytest.approx(by_hand - seconds["refresh"] / 20 / e.plain.seconds)
    found = explain(model, TOY)
    assert found["average_ratio"] == pytest.approx(by_hand)
    advised = next(text for text in found["advice"] if text.startswith("refresh every 20 instead of 10"))
    assert f"{e.ratio():.2f}x to {e.ratio({'refresh': 20}):.2f}x of a plain step" in advised


def test_layers_and_kinds_add_up_to_the_cadences() -> None:
    model, _ = transformed("transformer")
    found = explain(model, TOY)
    for rows in (found["layers"], list(found["kinds"].values())):
        for name, part in found["cadences"].items():
            assert sum(row["seconds"][name] for row in rows) == pytest.approx(part["seconds"])
    assert json.loads(json.dumps(found)) == found


def test_the_convolution_is_costed_in_the_form_that_runs() -> None:
    """The reference multiplies all patches; the kernel must not cost more than that."""
    costs = {}
    for backend in ("reference", "aten"):
        model, _ = transformed("conv", backend=backend)
        e = estimate(model, TOY)
        costs[backend] = sum(i.executed.flops for i in e.taps if i.name.startswith("gram(") and i.name.endswith(".a)"))
    assert 0 < costs["aten"] <= 1.05 * costs["reference"]


def test_critical_path_is_the_longest_chain() -> None:
    model, _ = transformed("linear", disable=tuple(n for n in ("batch",) if n in fxcurv.passes.PASSES))
    lowered = model._engine.lowered
    nodes = [node for node in lowered.program.nodes if node.name in lowered.functions]
    weights = {node: 1.0 + k % 3 for k, node in enumerate(nodes)}
    found = critical_path(lowered, frozenset({"step", "statistics", "refresh"}), weights)
    everything = frozenset({"step", "statistics", "refresh"})
    best: dict[Any, float] = {}

    def longest(node: Any) -> float:  # by recursion, the other way round
        if node not in best:
            before = (longest(resolve(operand, everything)) for operand in node.all_input_nodes)
            best[node] = weights.get(node, 0.0) + max(before, default=0.0)
        return best[node]

    assert found.seconds == pytest.approx(max(longest(node) for node in nodes_of(lowered, everything)))
    assert found.seconds == pytest.approx(sum(weights.get(node, 0.0) for node in found.nodes))
    assert 0 < found.seconds < found.total
    alone = critical_path(lowered, frozenset({"step"}), weights)
    assert alone.total < found.total


def test_recorder_counts_by_hand() -> None:
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    with Recorder() as recorder:
        c = a @ b
        d = c.t().exp()
        c.add_(1.0)
    products = [w for w in recorder.works if w.kind == "product"]
    assert products == [Work("product", 120.0, 4.0 * (12 + 20 + 15), torch.float32, pytest.approx(60 ** (1 / 3)))]
    assert [w.bytes for w in recorder.works if w.kind == "pointwise"] == [120.0, 120.0]  # exp; add_ in place
    assert recorder.live == recorder.peak == 120
    del c, d
    assert recorder.live == 0


def test_factorisations_by_hand() -> None:
    n, batch = 6, 3
    A = torch.eye(n, dtype=torch.float64).expand(batch, n, n).contiguous()
    expected = {"cholesky": n**3 / 3, "inverse": 2 * n**3 / 3, "eigen": 9 * n**3}
    with Recorder() as recorder:
        factor, _ = torch.linalg.cholesky_ex(A)
        torch.cholesky_inverse(factor)
        torch.linalg.eigh(A)
    found = {w.kind: w for w in recorder.works if w.kind in expected}
    assert {kind: w.flops for kind, w in found.items()} == {k: pytest.approx(batch * v) for k, v in expected.items()}
    assert all(w.size == n and w.dtype == torch.float64 for w in found.values())


def test_time_is_the_larger_of_arithmetic_and_traffic() -> None:
    assert TOY.seconds([Work("product", 3e9, 1e9, torch.float32, 1.0, 2)]) == pytest.approx(6.0)
    assert TOY.seconds([Work("product", 1e9, 4e9, torch.float32, 1.0)]) == pytest.approx(4.0)
    assert TOY.seconds([Work("pointwise", 9e9, 2e9, torch.float32)]) == pytest.approx(2.0)
    slow = Device("slow", {"product": FLAT, "eigen": ((1.0, 1e8),)}, {"f64": 0.5}, FLAT, 0.25, "for tests")
    assert slow.seconds([Work("eigen", 1e8, 1.0, torch.float32, 9.0, 2)]) == pytest.approx(2 * 1.25)
    assert slow.seconds([Work("cholesky", 1e9, 1.0, torch.float64, 9.0)]) == pytest.approx(2.25)  # as a product


def test_devices() -> None:
    for name in ("a100", "h100", "h200", "mi300x"):
        found = device(name)
        assert found.source and found.seconds([Work("product", 1e12, 1e6, torch.bfloat16, 1e4)]) < 0.01
        assert found.seconds([Work("pointwise", 1.0, 1e9, torch.float32)]) > 1e-4
    with pytest.raises(FxcurvError, match="no device 'tpu'.*cpu, a100"):
        device("tpu")
    assert interpolate(((10.0, 1.0), (1000.0, 100.0)), 100.0) == pytest.approx(10.0)
    assert interpolate(((10.0, 1.0), (1000.0, 100.0)), 1.0) == 1.0
    assert interpolate(((10.0, 1.0), (1000.0, 100.0)), 1e5) == 100.0


def test_without_shapes_there_is_nothing_to_say() -> None:
    model = fxcurv.transform(nn.Sequential(nn.Linear(3, 2)), "kfac", loss="mse")
    with pytest.raises(FxcurvError, match="depends on the batch.*--input"):
        estimate(model, TOY)


@pytest.mark.parametrize("method", ["kfac", "ekfac", "shampoo", "adam", "diag", "foof", "hessian_free"])
def test_explain_prints_and_gives_json(method: str, model_file: Path, invoke: Invoke, invoke_json: Invoke) -> None:
    text = invoke("explain", model_file, "--method", method, "-v").stdout
    assert "plain step" in text and "of a plain step" in text and "Memory" in text and "Critical path" in text
    found = invoke_json("explain", model_file, "--method", method)
    assert found["method"] == method and found["inputs"] == ["f32[6, 5]"]
    assert found["plain"]["flops"] > 0 and found["average_ratio"] >= 1
    assert set(found["cadences"]["step"]) == {"every", "flops", "bytes", "launches", "seconds", "ratio"}
    assert found["memory"]["states"] >= 0 and found["memory"]["peak"] > 0


def test_explain_for_a_gpu_and_other_inputs(model_file: Path, invoke: Invoke, invoke_json: Invoke) -> None:
    gpu = invoke_json("explain", model_file, "--device", "h100", "--input", "f32[512,5]")
    assert (
        gpu["device"]["name"] == "h100" and "data sheet" in gpu["device"]["source"] and gpu["inputs"] == ["f32[512, 5]"]
    )
    assert gpu["plain"]["flops"] > invoke_json("explain", model_file)["plain"]["flops"] * 20
    assert "no device 'z9'" in invoke("explain", model_file, "--device", "z9", code=1).stderr


def test_estimates_leave_the_model_as_it_was() -> None:
    model, x = transformed("conv")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    e: Estimate = estimate(model, TOY)
    assert e.dry.peak > 0 and torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and not model._engine.arrived


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_launches_agree_with_the_count_of_whole_slices(method: str) -> None:
    """Node by node on fake tensors of a GPU, against a slice that runs as a whole."""
    model, _ = transformed("transformer", method)
    gpu = Device("toy", TOY.rates, TOY.relative, TOY.bandwidth, 0.0, "for tests", kind="cuda")
    e = estimate(model, gpu)
    lowered = model._engine.lowered
    for due in (frozenset(), frozenset({"statistics"}), frozenset(e.periods)):
        counted = launches(lowered, lowered.slice(due, bundled=True))
        nodes = [node for node in nodes_of(lowered, due | {"step"}) if node in e.nodes]
        mine = {node.name: e.nodes[node].executed.launches for node in nodes}
        assert counted.complete and sum(mine.values()) == pytest.approx(counted.total, rel=0.05), due
