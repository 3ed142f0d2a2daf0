"""fuse, views, memory, pack, precision and stagger in whole training runs: what they change, and what they must not."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcurv
from fxcurv.ir.kept import kept_values
from fxcurv.ir.op import OPS
from fxcurv.ir.schedule import base_of, falls_due, offset_of

SPEED = ("fuse", "views", "memory")


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    first = nn.Linear(9, 40), nn.Tanh(), nn.Linear(40, 33), nn.LayerNorm(33)
    return nn.Sequential(*first, nn.ReLU(), nn.Linear(33, 17), nn.Linear(17, 4)).to(dtype)


def full_rank(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A network whose factors have simple eigenvalues, so that every way to compute them finds one eigenbasis."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 18), nn.Tanh(), nn.Linear(18, 4)).to(dtype)


def make(method: str = "kfac", dtype: torch.dtype = torch.float64, model: Any = net, **options: Any) -> Any:
    settings: dict[str, Any] = {"loss": "cross_entropy", "example_inputs": (torch.zeros(3, 9, dtype=dtype),)}
    return fxcurv.transform(model(dtype), method, **{"solve_every": 3, "damping": 0.1, **settings, **options})


def batch(k: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(k)
    return torch.randn(64, 9, generator=g, dtype=dtype), torch.randint(4, (64,), generator=g)


def step(model: Any, k: int, x: Tensor | None = None, lr: float = 0.1) -> fxcurv.StepInfo:
    inputs, labels = batch(k, next(model.parameters()).dtype)
    model.zero_grad()
    out = model(inputs if x is None else x)
    model.backward(F.cross_entropy(out, labels), out)
    info = model.precondition_()
    with torch.no_grad():
        for p in model.parameters():
            p -= lr * p.grad if lr else 0.0
    return info


def run(model: Any, steps: int) -> Any:
    for k in range(steps):
        step(model, k)
    return model


def curvature(model: Any) -> dict[str, Tensor]:
    """Copies of all saved curvature."""
    return {k: v.clone() for k, v in model.state_dict().items() if k.startswith("curvature.")}


def distance(one: Any, other: Any) -> float:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def rewrites(model: Any) -> dict[str, int]:
    return {record.name: record.rewrites for record in model.history}


@pytest.mark.parametrize("method", ["kfac", "ekfac", "foof", "diag"])
def test_without_a_pass_results_are_the_same(method: str) -> None:
    model_of = full_rank if method == "ekfac" else net
    reference = run(make(method, model=model_of, disable=SPEED), 7)
    for disabled in ((), *((name,) for name in SPEED)):
        model = run(make(method, model=model_of, disable=disabled), 7)
        assert distance(model, reference) < 1e-9, disabled
        done = rewrites(model)
        assert all(done[name] > 0 for name in SPEED if name not in disabled and "fuse" not in disabled), done


def test_an_average_takes_the_memory_of_its_statistic_and_never_that_of_its_state() -> None:
    model = make()
    run(model, 2)
    engine = model._engine
    before = {role: (value, value.clone()) for role, value in engine.states.values.items()}
    x, y = batch(5)
    out = model(x)
    model.backward(F.cross_entropy(out, y), out)
    taken = {key: value.untyped_storage().data_ptr() for key, value in engine.statistics.sums.items()}
    model.precondition_()
    for value, copied in before.values():
        assert torch.equal(value, copied)
    now = {value.untyped_storage().data_ptr() for value in engine.states.values.values()}
    assert {key for key, pointer in taken.items() if key.startswith("gram(") and pointer in now} == {
        key for key in taken if key.startswith("gram(")
    }
    assert rewrites(make(on_nonfinite="raise"))["memory"] == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
@pytest.mark.parametrize("disabled", [(), SPEED], ids=["passes", "none"])
def test_a_bad_batch_changes_no_state(bad: float, disabled: tuple[str, ...]) -> None:
    model = run(make(disable=disabled), 4)
    before = curvature(model)
    x, _ = batch(4)
    x[3, 2] = bad
    with pytest.warns(fxcurv.errors.FxcurvWarning):
        info = step(model, 4, x)
    after = curvature(model)
    assert "0" in info.fallback
    assert all(torch.equal(before[f"curvature.0.{part}"], after[f"curvature.0.{part}"]) for part in ("A", "A.inverse"))
    assert all(torch.isfinite(value).all() for value in after.values())


@pytest.mark.parametrize("options", [{}, {"stagger": True}, {"stale": "packed"}], ids=str)
def test_repairs_start_from_the_averages_of_the_step(options: dict[str, Any]) -> None:
    """An indefinite factor cannot be inverted as it is: the ladder ends at the same damping with and without passes."""
    found = []
    for disabled in ((), SPEED):
        model = run(make(disable=disabled, **options), 3)
        state = model._engine.states
        role = state.by_key["2.G"]
        state.values[role] = state.values[role] - 3.0 * torch.eye(33, dtype=torch.float64)
        model.due(refresh=True)
        info = step(model, 3)
        assert info.repaired == ("2",) and not info.fallback
        found.append(model)
    assert distance(*found) < 1e-11


def test_gradients_share_no_memory_with_curvature_or_each_other() -> None:
    model = run(make(), 2)
    pointers = [p.grad.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(pointers)) == len(pointers)
    assert not set(pointers) & {value.untyped_storage().data_ptr() for value in model._engine.states.values.values()}
    assert all(p.grad.is_contiguous() for p in model.parameters())


# Kept values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["kfac", "ekfac", "foof"])
@pytest.mark.parametrize("stale", ["packed", "bf16", "packed,bf16"])
def test_kept_values_take_less_memory_and_train_the_same(method: str, stale: str) -> None:
    full, small = run(make(method), 8), run(make(method, stale=stale), 8)
    assert method == "ekfac" or small._engine.states.nbytes < full._engine.states.nbytes
    error = max(float((a - b).detach().abs().max()) for a, b in zip(full.parameters(), small.parameters(), strict=True))
    assert error < (1e-13 if stale == "packed" else 2e-2) and (error > 0 or stale != "bf16")
    for name in ("0", "2"):
        wanted = full.factors(name)
        for part, value in small.factors(name).items():
            assert value.shape == wanted[part].shape and value.dtype in (torch.float32, torch.float64)
            assert torch.allclose(value @ value.mT if part[0] == "Q" else value, wanted[part] @ wanted[part].mT
                                  if part[0] == "Q" else wanted[part], rtol=2e-2, atol=5e-2)  # fmt: skip


def test_forms_of_kept_values() -> None:
    state = run(make(stale="packed,bf16"), 1).state_dict()
    assert state["curvature.2.A.inverse"].shape == (41 * 42 // 2,)
    assert state["curvature.2.G.inverse"].shape == (33 * 34 // 2,)
    assert state["curvature.5.G.inverse"].shape == (17, 17)  # too small to be worth it
    assert state["curvature.2.A.inverse"].dtype == torch.float64  # 861 numbers: as well
    assert run(make(stale="bf16"), 1).state_dict()["curvature.2.G.inverse"].dtype == torch.bfloat16
    packed = run(make(stale="packed"), 1)
    full = run(make(), 1).state_dict()["curvature.2.A.inverse"]
    assert torch.equal(OPS["unpack_triangle"](packed.state_dict()["curvature.2.A.inverse"]), full)
    assert all(base_of(switch.meta["every"]) == "refresh" for switch in kept_values(packed.program).values())
    with pytest.raises(fxcurv.FxcurvError, match="stale='half' must be one of full, packed, bf16"):
        make(stale="half")


OPTIONS = [
    ("kfac", {"stale": "packed"}),
    ("kfac", {"stale": "packed,bf16", "stagger": True}),
    ("ekfac", {"stale": "bf16"}),
    ("ekfac", {"basis": "qr"}),
    ("ekfac", {"basis": "qr", "stagger": True, "stale": "bf16"}),
    ("foof", {"stagger": True}),
]


@pytest.mark.parametrize(("method", "options"), OPTIONS, ids=str)
def test_resumes_bit_for_bit(method: str, options: dict[str, Any]) -> None:
    for stop in (1, 5):
        model = run(make(method, **options), stop)
        other = make(method, **options)
        other.load_state_dict(copy.deepcopy(model.state_dict()))
        for k in range(stop, stop + 5):
            step(model, k)
            step(other, k)
        assert distance(model, other) == 0.0


# Staggered refreshes -------------------------------------------------------------------------------------------------


def renewed(model: Any, k: int) -> set[str]:
    before = curvature(model)
    step(model, k)
    return {
        key.split(".")[1] for key, value in curvature(model).items()
        if key.endswith((".inverse", ".QA", ".QG")) and not torch.equal(value, before[key])
    }  # fmt: skip


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_every_layer_is_refreshed_once_in_a_period(method: str) -> None:
    model = make(method, stagger=True, solve_every=4)
    layers = {layer.name for layer in model.layers}
    turns = [renewed(model, k) for k in range(13)]
    assert turns[0] == layers
    for layer in layers:
        steps = [k for k, names in enumerate(turns) if layer in names]
        assert len({k % 4 for k in steps[1:]}) == 1 and steps[1] <= 4
        assert all(b - a == 4 for a, b in itertools.pairwise(steps[1:]))
    assert max(len(names) for names in turns[1:]) < len(layers)
    model.due(refresh=True)
    assert renewed(model, 13) == layers


def test_a_staggered_refresh_is_the_ordinary_one_at_another_time() -> None:
    model = run(make(stagger=True, solve_every=4), 4)
    plain = make(solve_every=4)
    plain.load_state_dict(copy.deepcopy(model.state_dict()))
    names = renewed(model, 4) | {"0"}
    plain.due(refresh=True)
    step(plain, 4)
    one, other = model.state_dict(), plain.state_dict()
    assert len(names) < 4
    for name in names - {"0"}:
        assert torch.equal(one[f"curvature.{name}.A.inverse"], other[f"curvature.{name}.A.inverse"])


def test_refreshes_follow_statistics() -> None:
    """With statistics every second step, no factorisation is renewed in a step without."""
    model = make(stagger=True, solve_every=6, factor_every=2)
    assert {offset_of(name) % 2 for name in model.program.cadences} == {0}
    assert sum(base_of(name) == "refresh" for name in model.program.cadences) == 3


def test_groups_cost_about_the_same() -> None:
    torch.manual_seed(0)
    widths = (8, 64, 64, 8, 64, 64, 8, 64, 64)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
    model = fxcurv.transform(model, stagger=True, solve_every=3, loss="mse")
    loads = {name: 0.0 for name in model.program.cadences if base_of(name) == "refresh"}
    for node in model.program.nodes:
        if node.target is OPS["inverse"]:
            loads[node.meta["every"]] += node.meta["type"].shape[-1] ** 3
    assert len(loads) == 3 and max(loads.values()) < 1.5 * min(loads.values())


def test_what_a_refresh_couples_stays_together() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.q(x) * self.k(x))

    x = torch.zeros(2, 6)
    model = fxcurv.transform(Joined(), "foof", stagger=True, solve_every=4, example_inputs=(x,), loss="mse")
    inverses = [node for node in model.program.nodes if node.target is OPS["inverse"]]
    every = {owner: node.meta["every"] for node in inverses for owner in node.meta["owner"]}
    assert every["q"] == every["k"] != every["out"]  # one inverse for both, since they read the same input


def test_off_by_default_and_not_worth_it_every_step() -> None:
    assert rewrites(make())["stagger"] == 0
    assert rewrites(make(stagger=True, solve_every=1))["stagger"] == 0
    assert rewrites(make(stagger=True))["stagger"] > 0


def test_a_failed_factorisation_is_tried_again_in_the_next_step() -> None:
    model = run(make(stagger=True, solve_every=4), 2)
    x, _ = batch(2)
    x[0, 0] = float("nan")
    with pytest.warns(fxcurv.errors.FxcurvWarning):
        info = step(model, 2, x, lr=0.0)
    assert info.refresh and info.fallback
    assert renewed(model, 3) == {layer.name for layer in model.layers}


@pytest.mark.parametrize(
    ("name", "base", "offset"),
    [("refresh", "refresh", 0), ("refresh_7", "refresh", 7), ("refresh_first", "refresh", 0), ("other", "other", 0)],
)
def test_names_of_shifted_cadences(name: str, base: str, offset: int) -> None:
    assert base_of(name) == base and offset_of(name) == offset
    assert [k for k in range(20) if falls_due(name, 10, k)] == sorted({0, offset, 10 + offset})


# Tracked bases -------------------------------------------------------------------------------------------------------


def test_the_first_basis_is_the_eigenbasis_and_so_is_one_that_is_asked_for() -> None:
    tracked, exact = make("ekfac", basis="qr"), make("ekfac")
    for k in range(3):
        step(tracked, k)
        step(exact, k)
    assert distance(tracked, exact) == 0.0
    step(tracked, 3)
    step(exact, 3)
    assert distance(tracked, exact) > 1e-6
    for model in (tracked, exact):
        model.due(refresh=True)
        step(model, 4)
    for name in ("0", "2"):
        found = tracked.factors(name)
        turned = found["QA"].mT @ found["A"] @ found["QA"]
        assert torch.allclose(turned, torch.diag(turned.diagonal()), atol=1e-10)
    with pytest.raises(fxcurv.FxcurvError, match="basis='svd' is unknown; choose one of eigh, qr"):
        make("ekfac", basis="svd")


def test_a_tracked_basis_follows_the_factor() -> None:
    model = run(make("ekfac", basis="qr", solve_every=2, ema=0.9), 40)
    coupled = 0
    for name, side in itertools.product(("0", "2", "5", "6"), ("A", "G")):
        found = model.factors(name)
        Q, factor = found[f"Q{side}"], found[side]
        assert torch.allclose(Q.mT @ Q, torch.eye(len(Q), dtype=Q.dtype), atol=1e-12)
        turned = Q.mT @ factor @ Q
        rest, own = ((M - torch.diag(M.diagonal())).norm() for M in (turned, factor))
        if own > 0.2 * factor.norm():  # the identity would not do
            coupled += 1
            assert rest < 0.4 * own
    assert coupled >= 4


def test_training_with_a_tracked_basis_goes_as_well() -> None:
    losses = []
    for basis in ("eigh", "qr"):
        model = make("ekfac", basis=basis, kl_clip=None, fisher="ggn")
        x, y = torch.cat([batch(k)[0] for k in range(4)]), None
        with torch.no_grad():
            y = (x @ torch.randn(9, 4, generator=torch.Generator().manual_seed(1), dtype=x.dtype)).argmax(1)
        for _ in range(40):
            model.zero_grad()
            out = model(x)
            loss = F.cross_entropy(out, y)
            model.backward(loss, out)
            model.precondition_()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.2 * p.grad
        losses.append(loss.item())
    assert losses[1] < 1.15 * losses[0] < 0.5
