"""Many small layers as one: the passes ``batch`` and ``defer`` change speed, and no number, name or decision."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxcurv
from fxcurv.layers.tap import Tap
from fxcurv.passes.launches import launches
from fxcurv.runtime.values import Values
from tests.runtime.steps import descend, same, states, step

OFF = ("batch", "defer")
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("kfac", {}),
    ("kfac", {"kl_clip": None, "damping_scheme": "sqrt"}),
    ("kfac", {"damping_scheme": "eigenvalue"}),
    ("kfac", {"fisher": "empirical"}),
    ("kfac", {"fisher_samples": 2}),
    ("kfac", {"fisher": "ggn"}),
    ("kfac", {"sharing": "reduce"}),
    ("ekfac", {}),
    ("ekfac", {"fisher": "empirical"}),
    ("foof", {}),
    ("diag", {}),
    ("shampoo", {}),
    ("adam", {}),
]


class Mixed(nn.Module):
    """Equal layers, layers that read one input, norms, an odd layer and a head."""

    def __init__(self, width: int = 5, depth: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(3)) for _ in range(4)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.odd, self.head = nn.Linear(width, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        for (q, k, v), norm in zip(self.blocks, self.norms, strict=True):
            x = x + torch.tanh(q(x) * k(x) + v(x))
            x = norm(x)
        return self.head(torch.tanh(self.odd(x)))


def data(n: int = 7, width: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, width, dtype=torch.float64, generator=generator), torch.arange(n) % 3


def pair(method: str = "kfac", net: nn.Module | None = None, **options: Any) -> tuple[Any, Any]:
    """One network under the method with and without the passes."""
    torch.manual_seed(0)
    net = (Mixed() if net is None else net).double()
    options = {"solve_every": 2, "damping": 0.05, "loss": "cross_entropy", **options}
    if method == "shampoo":
        del options["damping"]
    if method in ("shampoo", "adam", "foof"):
        options = {k: v for k, v in options.items() if k not in ("solve_every", "damping") or method == "foof"}
    example = options.pop("example_inputs", (data()[0],))
    on, off = (
        fxcurv.transform(copy.deepcopy(net), method, example_inputs=example, disable=disable, **options)
        for disable in ((), OFF)
    )
    return on, off


def differences(on: Any, off: Any, signs: bool = False) -> dict[str, float]:
    """Relative differences of parameters and curvature by key, with ``signs`` up to those of eigenvectors."""
    a, b = on.state_dict(), off.state_dict()
    assert list(a) == list(b)
    change = (lambda t: t.double().abs()) if signs else (lambda t: t.double())
    return {k: float((change(a[k]) - change(b[k])).norm() / b[k].double().norm().clamp(min=1e-30)) for k in b}


def assert_equal(on: Any, off: Any, tolerance: float = 1e-12, signs: bool = False) -> None:
    wrong = {key: error for key, error in differences(on, off, signs).items() if not error <= tolerance}
    assert not wrong


def ops(model: Any) -> list[str]:
    return [getattr(node.target, "name", "") for node in model.program.nodes]


@pytest.mark.parametrize(("method", "options"), METHODS, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_equal_to_layer_by_layer(method: str, options: dict[str, Any]) -> None:
    on, off = pair(method, **options)
    assert "stack" in ops(on) and "stack" not in ops(off)
    x, y = data()
    for _ in range(3):
        infos = [step(model, x, y) for model in (on, off)]
        assert infos[0].fallback == infos[1].fallback == ()
    eigen = method == "ekfac" or options.get("damping_scheme") == "eigenvalue"  # which magnify the last bits
    assert_equal(on, off, 1e-11 if eigen else 1e-12, signs=eigen)


def test_no_tap_of_a_small_layer_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(5, 5) for _ in range(4))).double()
    x, y = data()
    model = fxcurv.transform(net, "kfac", loss="cross_entropy", fisher="empirical")
    monkeypatch.setattr(Tap, "forward", staticmethod(lambda *a: pytest.fail("an ordinary tap ran")))
    for _ in range(2):
        step(model, x, y % 5)


def test_layers_that_are_frozen_or_skipped() -> None:
    net = Mixed()
    net.layers[1].weight.requires_grad_(False)
    net.layers[2].requires_grad_(False)
    on, off = pair(net=net, skip=["layers.4", "blocks.1.*"])
    x, y = data()
    for _ in range(3):
        step(on, x, y), step(off, x, y)
    assert_equal(on, off)


def test_large_layers_are_left_alone() -> None:
    net = nn.Sequential(*(nn.Linear(70, 70, bias=False) for _ in range(4)))
    model = fxcurv.transform(net, "kfac", loss="mse")
    assert "stack" not in ops(model)


# Failures -------------------------------------------------------------------------------------------------------------


def poison(model: Any, key: str, value: Tensor) -> None:
    model._engine.states.values[model._engine.states.by_key[key]] = value


def test_a_bad_gradient_falls_back_alone() -> None:
    on, off = pair(on_nonfinite="gradient")
    x, y = data()
    infos = []
    for model in (on, off):
        step(model, x, y)
        model.zero_grad()
        out = model(x)
        model.backward(F.cross_entropy(out, y), out)
        model.strip().layers[2].weight.grad[0, 0] = torch.inf
        with pytest.warns(fxcurv.FxcurvWarning, match=r"layers\.2 "):
            infos.append(model.precondition_())
    assert infos[0].fallback == infos[1].fallback == ("layers.2",)
    for a, b in zip(on.parameters(), off.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-13)
    assert_equal(on, off)


def test_a_bad_statistic_leaves_the_other_layers_alone() -> None:
    on, off = pair()
    x, y = data()
    infos = []
    for model in (on, off):
        step(model, x, y)
        bad = torch.full((6, 6), torch.nan, dtype=torch.float64)
        poison(model, "layers.2.A", bad)
        with pytest.warns(fxcurv.FxcurvWarning, match="something was not finite"):
            infos.append(step(model, x, y, lr=None))
        assert torch.isnan(model.state_dict()["curvature.layers.2.A"]).all()  # kept as it was
        assert torch.isfinite(model.state_dict()["curvature.layers.1.A"]).all()
        poison(model, "layers.2.A", torch.eye(6, dtype=torch.float64))
        infos.append(step(model, x, y))
    assert infos[0].fallback == infos[2].fallback == ("layers.2",)
    assert infos[1].fallback == infos[3].fallback == () and not infos[1].kept
    assert_equal(on, off)


@pytest.mark.parametrize("hopeless", [False, True])
def test_a_failed_factorisation_is_repaired_alone(hopeless: bool) -> None:
    on, off = pair(solve_every=1, damping_scheme="sqrt", damping=1e-2, kl_clip=None)
    x, y = data()
    infos = []
    line = torch.ones(6, dtype=torch.float64)
    line[5] = -1e9 if hopeless else -0.3
    for model in (on, off):
        step(model, x, y)
        poison(model, "layers.2.A", torch.diag(line))
        poison(model, "layers.2.updates", torch.tensor(1e9, dtype=torch.float64))
        model.hyper["ema"] = 1.0
        infos.append(step(model, x, y))
    assert (infos[0].kept, infos[0].repaired) == (infos[1].kept, infos[1].repaired)
    assert (infos[0].kept if hopeless else infos[0].repaired) == ("layers.2",)
    for model in (on, off):
        infos.append(step(model, x, y))
    assert_equal(on, off, 1e-10)


def test_raising_changes_nothing() -> None:
    on, _ = pair(on_nonfinite="raise")
    x, y = data()
    step(on, x, y)
    poison(on, "layers.2.G", torch.full((5, 5), torch.nan, dtype=torch.float64))
    before = {k: v for k, v in states(on).items() if not v.isnan().any()}
    with pytest.raises(fxcurv.FxcurvError, match=r"not finite in layers\.2; nothing was changed"):
        step(on, x, y)
    after = states(on)
    assert all(torch.equal(after[k], v) for k, v in before.items())


# State ----------------------------------------------------------------------------------------------------------------


def test_saved_states_move_between_the_two_bit_for_bit() -> None:
    on, off = pair()
    x, y = data()
    for _ in range(3):
        step(on, x, y)
    again, _ = pair()
    for other in (off, again):
        other.load_state_dict(on.state_dict())
        assert same(states(on), states(other))
    back, _ = pair()
    back.load_state_dict(off.state_dict())
    for _ in range(3):
        step(on, x, y), step(again, x, y), step(off, x, y), step(back, x, y)
    assert same(states(on), states(again)) and same(states(on), states(back))
    assert_equal(on, off)


def test_copies_are_independent() -> None:
    on, off = pair()
    x, y = data()
    step(on, x, y), step(off, x, y)
    copied, before = copy.deepcopy(on), states(on)
    for _ in range(2):
        step(copied, x, y), step(off, x, y)
    assert same(states(on), before)
    assert_equal(copied, off)


def test_factors_and_saved_rows_are_those_of_the_layer() -> None:
    on, off = pair()
    x, y = data()
    step(on, x, y), step(off, x, y)
    for name in ("layers.3", "blocks.2.1", "norms.1", "odd"):
        a, b = on.factors(name), off.factors(name)
        assert a.keys() == b.keys()
        for part in a:
            torch.testing.assert_close(a[part], b[part], rtol=1e-12, atol=1e-14)
    kept = on.state_dict()["curvature.layers.0.A"]
    before = kept.clone()
    step(on, x, y)
    assert torch.equal(kept, before)  # what was handed out does not change


def test_states_live_in_stacks_from_the_first_step_on() -> None:
    on, _ = pair()
    x, y = data()
    step(on, x, y)
    values = on._engine.states.values
    assert {len(bundle.roles) for bundle in values.stacks} >= {4, 5}
    assert len(values.alone) < len(values.home)
    assert on._engine.states.nbytes == sum(v.numel() * v.element_size() for v in values.values())


def test_a_row_that_is_set_leaves_its_stack() -> None:
    on, _ = pair()
    x, y = data()
    step(on, x, y)
    values = on._engine.states.values
    bundle = next(bundle for bundle in values.stacks if bundle.keys[0] == "layers.0.A")
    stack, (first, second) = values.stacks[bundle], bundle.roles[:2]
    values[first] = torch.zeros_like(stack[0])
    assert bundle not in values.stacks and not values[first].any() and torch.equal(values[second], stack[1])
    put_back = values.together(bundle)
    assert not put_back[0].any() and torch.equal(put_back[1:], stack[1:])
    values.put(bundle, put_back)
    assert values.together(bundle) is put_back and first not in values.alone
    del values[second]
    assert second not in values and len(values) == len(list(values))
    assert isinstance(values.clone(), Values)


# Deferred statistics --------------------------------------------------------------------------------------------------


class Inplace(nn.Module):
    """Operations in place right behind the layers, on what may be a view."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = layer(x)
            y.mul_(1.5)
            x = y.tanh_()
        return x.flatten(1)


class Tied(nn.Module):
    """Four layers in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            for layer in self.layers:
                x = torch.tanh(layer(x))
        return x


SOURCES = ["mc", "empirical"]


@pytest.mark.parametrize("fisher", SOURCES)
@pytest.mark.parametrize("positions", [None, 3])
def test_in_place_operations_behind_a_layer(fisher: str, positions: int | None) -> None:
    x, y = data()
    x = x if positions is None else x.unsqueeze(1).repeat(1, positions, 1) * torch.arange(1.0, 1 + positions)[:, None]
    on, off = pair(net=Inplace(), fisher=fisher, example_inputs=(x,))
    for _ in range(3):
        step(on, x, y), step(off, x, y)
    assert on.factors("layers.0")["A"].any()
    assert_equal(on, off)


@pytest.mark.parametrize("fisher", SOURCES)
def test_uses_passes_and_micro_batches_add_up(fisher: str) -> None:
    x, y = data()
    on, off = pair(net=Tied(), fisher=fisher)
    for _ in range(2):
        for model in (on, off):
            model.zero_grad()
            for part in (slice(0, 3), slice(3, 7)):  # of two sizes
                out = model(x[part])
                model.backward(F.cross_entropy(out, y[part]) / 2, out)
            model.precondition_()
            descend(model)
    assert_equal(on, off)


@pytest.mark.parametrize("fisher", SOURCES)
def test_two_forward_passes_behind_one_output(fisher: str) -> None:
    """Side by side, and one on the output of the other."""
    x, y = data()
    on, off = pair(net=Tied(), fisher=fisher)
    for model in (on, off):
        model.zero_grad()
        out = torch.cat([model(x), model(model(x.flip(0)))])
        model.backward(F.cross_entropy(out, y.repeat(2)), out)
        model.precondition_()
    assert_equal(on, off)


@pytest.mark.parametrize(("fisher", "reentrant"), [("mc", False), ("empirical", False), ("empirical", True)])
def test_activation_checkpointing(fisher: str, reentrant: bool) -> None:
    x, y = data()
    on, off = pair(net=Tied(), fisher=fisher)
    for model in (on, off):
        for _ in range(2):
            model.zero_grad()
            out = checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant)
            model.backward(F.cross_entropy(out, y), out)
            model.precondition_()
            descend(model)
    assert_equal(on, off)


@pytest.mark.parametrize("fisher", SOURCES)
def test_compiled_models_use_ordinary_taps(fisher: str) -> None:
    torch._dynamo.reset()
    x, y = data()
    on, off = pair(net=Tied(), fisher=fisher)
    compiled = torch.compile(on, backend="eager")
    for _ in range(2):
        on.zero_grad()
        out = compiled(x)
        on.backward(F.cross_entropy(out, y), out)
        on.precondition_()
        descend(on)
        step(off, x, y)
    assert_equal(on, off)


def test_gradients_that_the_user_asks_for_are_no_statistics() -> None:
    x, y = data()
    on, off = pair(net=Tied(), fisher="empirical")
    for model in (on, off):
        model.zero_grad()
        inputs = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(model(inputs), y), inputs, create_graph=True)
        assert not model._engine.statistics.arrived
        out = model(x)
        (F.cross_entropy(out, y) + 0.0 * slope.detach().sum()).backward()
        model.precondition_()
    assert_equal(on, off)


@pytest.mark.parametrize("fisher", SOURCES)
def test_a_forward_pass_without_backward_leaves_nothing(fisher: str) -> None:
    x, y = data()
    on, off = pair(net=Tied(), fisher=fisher)
    inputs = x.clone().requires_grad_()
    out = on(inputs * 2)
    gone = weakref.ref(out.grad_fn)
    del out
    gc.collect()
    assert gone() is None and not on._engine.statistics.arrived
    step(on, x, y), step(off, x, y)
    assert_equal(on, off)


def test_a_failed_backward_pass_leaves_nothing() -> None:
    x, y = data()
    on, off = pair(net=Tied(), fisher="empirical")

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            raise ValueError("stop")

    on.zero_grad()
    with pytest.raises(ValueError, match="stop"):
        F.cross_entropy(on(Fails.apply(x.clone().requires_grad_())), y).backward()
    for _ in range(2):
        step(on, x, y), step(off, x, y)
    assert_equal(on, off)


def test_half_precision_statistics_are_kept_in_float32() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(5, 5) for _ in range(4)))
    x, y = data()
    found = []
    for disable in ((), OFF):
        model = fxcurv.transform(copy.deepcopy(net), "kfac", loss="cross_entropy", fisher="empirical", disable=disable)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x.float()), y)
        loss.backward()
        model.precondition_()
        found.append(model.factors("2"))
    for part in ("A", "G"):
        assert found[0][part].dtype == torch.float32
        torch.testing.assert_close(found[0][part], found[1][part], rtol=1e-5, atol=1e-6)


# Launches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_launches_do_not_grow_with_the_number_of_equal_layers(method: str) -> None:
    totals = []
    for depth in (20, 60):
        net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(depth)))
        model = fxcurv.transform(net, method, loss="cross_entropy")
        lowered = model._engine.lowered
        counted = [launches(lowered, lowered.slice(due)) for due in ((), ("statistics",), ("statistics", "refresh"))]
        assert all(one.complete for one in counted) or method == "ekfac"
        totals.append([one.total for one in counted])
    assert totals[0] == totals[1]
    assert max(totals[0]) < 200
