"""Steps that the exact quadratic model decides, against the dense Gauss-Newton matrix by plain autograd."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import fxcurv
from fxcurv.runtime.module import CurvatureModule
from fxcurv.runtime.optimizer import CurvatureOptimizer
from fxcurv.runtime.oracles import GGNOracle
from fxcurv.runtime.quadratic import Plane
from fxcurv.runtime.trust import adapted
from tests.methods.nets import Attention, convnet, mlp

pytestmark = pytest.mark.usefixtures("float64")
LossFn = Callable[[Tensor], Tensor]


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def dense(net: nn.Module, x: Tensor, loss: LossFn) -> Tensor:
    """J^T H J over all parameters, by plain autograd."""
    parameters = {n: p.detach() for n, p in net.named_parameters()}
    with torch.no_grad():
        outputs = net(x)
    found = jacrev(lambda w: functional_call(net, w, (x,)).reshape(-1))(parameters)
    j = torch.cat([found[n].reshape(outputs.numel(), -1) for n in parameters], 1)
    hessian = torch.autograd.functional.hessian(lambda f: loss(f.reshape(outputs.shape)), outputs.reshape(-1))
    return j.T @ hessian @ j


class Problem:
    """A network on one batch with the optimizer of its method under step="quadratic"."""

    def __init__(
        self, net: nn.Module | None = None, method: str = "kfac", x: Tensor | None = None, **options: Any
    ) -> None:
        self.net = mlp(4, 5, 3) if net is None else net
        self.x = torch.randn(12, 4) if x is None else x
        with torch.no_grad():
            outputs = self.net.eval()(self.x)
        self.net.train()
        self.y = torch.randint(0, 3, (outputs.shape[0], *outputs.shape[2:]))
        known = fxcurv.methods()[method].defaults
        own = {n: v for n, v in options.items() if n not in known}
        hyper = {n: v for n, v in options.items() if n in known}
        self.model: CurvatureModule = fxcurv.transform(
            self.net,
            method,
            loss="cross_entropy",
            example_inputs=(self.x,),
            **{"step": "quadratic", "damping": 0.5, **hyper},
        )
        self.opt: CurvatureOptimizer = fxcurv.optimizer(self.model, **own)

    def loss(self, outputs: Tensor) -> Tensor:
        return F.cross_entropy(outputs, self.y)

    def closure(self) -> Tensor:
        self.opt.zero_grad()
        outputs = self.model(self.x)
        loss = self.loss(outputs)
        self.model.backward(loss, outputs)
        return loss

    def step(self) -> tuple[Tensor, Tensor]:
        """(parameters before, change) of one step, flat."""
        before = self.parameters()
        self.opt.step(self.closure)
        return before, self.parameters() - before

    def parameters(self) -> Tensor:
        return flat(self.net.parameters())

    def objective(self, l2: float) -> float:
        with torch.no_grad():
            return float(self.loss(self.net(self.x)) + 0.5 * l2 * self.parameters().square().sum())

    @property
    def group(self) -> dict[str, Any]:
        return self.opt.param_groups[0]


def proposal(p: Problem, gamma: float, l2: float) -> tuple[Tensor, Tensor]:
    """(D, gradient of h) at the problem's state: a copy under the fixed step, with the program's damping gamma^2."""
    twin = copy.deepcopy(p.model)
    rule = twin._engine.method.rule
    object.__setattr__(rule, "kind", "step")
    try:
        twin.hyper["damping"] = gamma**2
        outputs = twin(p.x)
        twin.backward(p.loss(outputs), outputs)
        for q in twin.parameters():
            q.grad.add_(q.detach(), alpha=l2)
        gradient = flat(q.grad for q in twin.parameters())
        twin.precondition_()
        return -flat(q.grad for q in twin.parameters()), gradient
    finally:
        object.__setattr__(rule, "kind", "quadratic")


# Products -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv", "tokens"])
def test_forms_are_those_of_the_dense_matrix(kind: str) -> None:
    net, x = {
        "linear": (mlp(4, 5, 3), torch.randn(7, 4)),
        "conv": (convnet(), torch.randn(4, 2, 5, 5)),
        "tokens": (Attention(), torch.randn(3, 4, 3)),
    }[kind]
    y = torch.randint(0, 3, (net(x).shape[0], *net(x).shape[2:]))
    parameters = list(net.parameters())
    oracle = GGNOracle(parameters, fxcurv.losses.resolve_loss("cross_entropy"))
    for part in x.split(2):  # micro-batches
        oracle.add(net(part), None, None)
    vectors = [[torch.randn_like(p) for p in parameters] for _ in range(3)]
    matrix = torch.stack([flat(v) for v in vectors])
    expected = matrix @ dense(net, x, lambda f: F.cross_entropy(f, y)) @ matrix.T
    torch.testing.assert_close(oracle.forms(vectors), expected)


# The step -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["kfac", "ekfac", "foof"])
@pytest.mark.parametrize("l2", [0.0, 0.3])
def test_steps_solve_the_dense_model_on_the_plane(method: str, l2: float) -> None:
    p = Problem(method=method, l2=l2, damping_every=0, gamma_every=0, solve_every=1)
    last: Tensor | None = None
    for _ in range(4):
        delta, gradient = proposal(p, math.sqrt(0.5 + l2), l2)
        curvature = dense(p.net, p.x, p.loss)
        curvature = curvature + (0.5 + l2) * torch.eye(len(curvature))
        plane = torch.stack([delta] if last is None else [delta, last], 1)
        best = torch.linalg.solve(plane.T @ curvature @ plane, -(plane.T @ gradient))
        _, change = p.step()
        torch.testing.assert_close(change, plane @ best)
        info = p.opt.info
        assert info is not None
        coefficients = [info.rate, info.momentum][: len(best)]
        torch.testing.assert_close(torch.tensor(coefficients), best)
        half = 0.5 * (best @ (plane.T @ gradient))  # check (4) of the sheet: M is half its linear part
        value = 0.5 * change @ curvature @ change + gradient @ change
        torch.testing.assert_close(value, half)
        torch.testing.assert_close(torch.tensor(info.predicted), value)
        last = change


def test_a_fixed_momentum_leaves_the_length_to_the_model() -> None:
    p = Problem(l2=0.1, damping_every=0, gamma_every=0, fixed_momentum=0.7, solve_every=1)
    _, last = p.step()
    delta, gradient = proposal(p, math.sqrt(0.6), 0.1)
    curvature = dense(p.net, p.x, p.loss)
    curvature = curvature + 0.6 * torch.eye(len(curvature))
    alpha = -(0.7 * delta @ curvature @ last + gradient @ delta) / (delta @ curvature @ delta)
    torch.testing.assert_close(p.step()[1], alpha * delta + 0.7 * last)


def test_the_learning_rate_is_a_factor_on_the_step() -> None:
    torch.manual_seed(1)
    one, other = Problem(mlp(4, 5, 3)), None
    other = copy.copy(one)
    other.model = copy.deepcopy(one.model)
    other.net = other.model.strip()
    other.opt = fxcurv.optimizer(other.model, lr=0.25)
    torch.testing.assert_close(other.step()[1], 0.25 * one.step()[1])
    assert other.opt.info.predicted > one.opt.info.predicted


def test_parallel_directions_fall_back_to_no_momentum() -> None:
    plane = Plane(((4.0, 8.0), (8.0, 16.0 * (1 + 1e-15))), (-2.0, -4.0), ((1.0, 2.0), (2.0, 4.0)))
    assert plane.minimum(None, 1e-12) == (0.5, 0.0)
    assert plane.value(0.5, 0.0) == -0.5
    assert all(math.isnan(x) for x in Plane(((0.0, 0.0), (0.0, 1.0)), (0.0, 1.0), plane.squares).minimum(None, 1e-12))
    first = Plane(((4.0, 0.0), (0.0, 0.0)), (-2.0, 0.0), plane.squares)  # no last step yet
    assert first.minimum(None, 1e-12) == (0.5, 0.0)


@pytest.mark.parametrize("kind", ["conv", "norm", "attention", "dropout"])
def test_other_layers_and_a_training_mode(kind: str) -> None:
    net, x = {
        "conv": lambda: (convnet(groups=2), torch.randn(6, 2, 5, 5)),
        "norm": lambda: (
            nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)),
            torch.randn(9, 4),
        ),
        "attention": lambda: (Heads(), torch.randn(5, 4, 6)),
        "dropout": lambda: (
            nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)),
            torch.randn(9, 4),
        ),
    }[kind]()
    p = Problem(net, x=x, damping_every=1, solve_every=2, factor_every=3)
    losses = [float(p.opt.step(p.closure)) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0] or kind == "dropout" and min(losses[-4:]) < losses[0]
    assert p.opt.info is not None and p.opt.info.predicted < 0 and not p.opt.info.fallback


class Heads(nn.Module):
    """Fused attention, which has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(6, 18), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (z.unsqueeze(1) for z in self.qkv(x).chunk(3, -1))
        return self.head(F.scaled_dot_product_attention(q, k, v).squeeze(1)).transpose(1, 2)


# Damping --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "predicted", "expected"),
    [
        (-1.0, -1.0, 0.5),  # as predicted
        (-0.5, -1.0, 1.0),
        (-0.1, -1.0, 2.0),
        (1.0, -1.0, 2.0),  # a rise
        (1.0, 1.0, 2.0),  # a rise as predicted is no success
        (-1.0, 1.0, 2.0),
        (-1.0, 0.0, 2.0),
        (math.nan, -1.0, 2.0),
        (math.inf, -1.0, 2.0),
        (-1.0, math.nan, 2.0),
    ],
)
def test_damping_follows_the_ratio_and_its_signs(change: float, predicted: float, expected: float) -> None:
    assert adapted(1.0, change, predicted, 0.5, 2.0, 1e-8) == expected
    assert adapted(1e-8, -1.0, -1.0, 0.5, 2.0, 1e-8) == 1e-8


@pytest.mark.parametrize("damped", [True, False])
def test_the_ratio_compares_the_objective_with_its_model(damped: bool) -> None:
    p = Problem(l2=0.2, damping=5.0, damping_every=2, damped_prediction=damped)
    for k in range(1, 7):
        before, damping = p.objective(0.2), p.group["damping"]
        _, change = p.step()
        info = p.opt.info
        assert info is not None
        if k % 2:
            assert info.change is None and p.group["damping"] == damping
            continue
        assert info.change == pytest.approx(p.objective(0.2) - before, rel=1e-9)
        ratio = info.change / info.predicted
        expected = damping * 0.95**2 if ratio > 0.75 else damping / 0.95**2 if ratio < 0.25 else damping
        assert p.group["damping"] == pytest.approx(expected)
        assert p.model.hyper["damping"] == damping
    assert p.group["damping"] < 5.0


def test_without_the_damping_term_the_prediction_is_that_of_the_undamped_model() -> None:
    torch.manual_seed(2)
    p = Problem(l2=0.0, damping=5.0, damping_every=1, damped_prediction=False)
    curvature = dense(p.net, p.x, p.loss)
    outputs = p.net(p.x)
    gradient = flat(torch.autograd.grad(p.loss(outputs), list(p.net.parameters())))
    _, change = p.step()
    torch.testing.assert_close(
        torch.tensor(p.opt.info.predicted), 0.5 * change @ curvature @ change + gradient @ change
    )


def test_the_loss_is_compared_under_the_same_random_draws() -> None:
    net = nn.Sequential(nn.Linear(4, 40), nn.Dropout(0.5), nn.BatchNorm1d(40), nn.Tanh(), nn.Linear(40, 3))
    p = Problem(net, x=torch.randn(16, 4), damping=1e6, damping_every=1, l2=0.0, damped_prediction=False)
    for _ in range(3):  # so small a step that its model is exact, and any other mask would show
        p.step()
        assert p.opt.info.change == pytest.approx(p.opt.info.predicted, rel=1e-2)
    assert int(net[2].num_batches_tracked) == 3


def test_a_step_into_infinity_is_taken_back() -> None:
    p = Problem(damping=1.0, damping_every=1)
    p.step()
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        loss = p.closure()
        return loss if calls == 1 else loss * float("inf")

    before = p.parameters()
    p.opt.step(closure)
    assert calls == 2 and torch.equal(p.parameters(), before)
    assert p.group["damping"] == pytest.approx(1.0) and "step" not in p.opt.state[next(iter(p.net.parameters()))]
    p.step()
    assert not torch.equal(p.parameters(), before)


def test_a_batch_that_is_not_finite_changes_nothing() -> None:
    p = Problem(damping_every=1)
    p.step()
    before, group = p.parameters(), dict(p.group)
    factors = p.model.factors("0")
    good, p.x = p.x, p.x * float("nan")
    with pytest.warns(fxcurv.FxcurvWarning):
        p.opt.step(p.closure)
    assert torch.equal(p.parameters(), before) and p.group["damping"] == group["damping"]
    assert all(torch.equal(p.model.factors("0")[k], v) for k, v in factors.items())
    p.x = good
    p.step()
    assert p.opt.info.predicted < 0 and torch.isfinite(p.parameters()).all()


# Gamma ----------------------------------------------------------------------------------------------------------------


def test_gamma_starts_at_the_root_and_the_best_of_three_stays() -> None:
    p = Problem(l2=0.1, damping=0.3, gamma_every=3, damping_every=0, damping_decay=0.5, solve_every=50)
    assert p.group["gamma"] == pytest.approx(math.sqrt(0.4))
    changed = 0
    for k in range(1, 11):
        gamma, factor = p.group["gamma"], 0.5**1.5
        searching = k > 1 and (k - 1) % 3 == 0
        tried = [gamma, gamma * factor, gamma / factor] if searching else [gamma]
        if searching or k <= 3:
            p.model.due(refresh=True)
        pairs = [proposal(p, g, 0.1) for g in tried]
        p.model.due(refresh=None)
        last = p.opt.state[next(iter(p.net.parameters()))].get("step")
        curvature = dense(p.net, p.x, p.loss)
        curvature = curvature + 0.4 * torch.eye(len(curvature))
        values = []
        for delta, gradient in pairs:
            directions = [delta]
            if last is not None:
                directions.append(flat(p.opt.state[q]["step"] for q in p.net.parameters()))
            plane = torch.stack(directions, 1)
            slopes = plane.T @ gradient
            values.append(float(-0.5 * slopes @ torch.linalg.solve(plane.T @ curvature @ plane, slopes)))
        updates = p.model._engine.states.read("0.updates")
        p.step()
        assert p.model._engine.states.read("0.updates") == updates + 1  # once, however many were tried
        assert p.opt.info.refresh == (searching or k <= 3)
        assert p.opt.info.predicted == pytest.approx(min(values))
        assert p.group["gamma"] == pytest.approx(tried[values.index(min(values))])
        changed += p.group["gamma"] != gamma
    assert changed


def test_what_is_kept_of_a_search_belongs_to_the_gamma_that_stays() -> None:
    p = Problem(gamma_every=2, damping_every=0, damping_decay=0.5, solve_every=50)
    p.step(), p.step()
    gamma = p.group["gamma"]
    p.step()
    assert p.group["gamma"] != gamma
    state, model = p.model._engine.states, p.model
    for name in ("0", "2"):
        a, g = model.factors(name)["A"], model.factors(name)["G"]
        pi = torch.sqrt(a.trace() / len(a) / (g.trace() / len(g)))
        kept = {k: v for k, v in state.named().items() if k.startswith(f"{name}.A.") and v.shape == a.shape}
        assert kept
        for value in kept.values():
            torch.testing.assert_close(value, torch.linalg.inv(a + pi * p.group["gamma"] * torch.eye(len(a))))


def test_tied_gamma_follows_the_damping() -> None:
    p = Problem(l2=0.1, gamma_every=0, damping_every=1)
    for _ in range(4):
        expected = math.sqrt(p.group["damping"] + 0.1)
        p.step()
        assert p.group["gamma"] == pytest.approx(expected)
    assert p.group["damping"] != 0.5


# State ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
@pytest.mark.parametrize("after", [1, 4, 7])
def test_a_run_resumes_bit_for_bit(method: str, after: int) -> None:
    options = {"gamma_every": 3, "damping_every": 2, "solve_every": 4, "warmup": 1, "averaging": 0.9}
    p = Problem(method=method, **options)
    for _ in range(after):
        p.step()
    saved = copy.deepcopy((p.model.state_dict(), p.opt.state_dict()))
    for _ in range(6):
        p.step()
    q = Problem(method=method, x=p.x, **options)
    q.y = p.y
    q.step()
    q.model.load_state_dict(saved[0])
    q.opt.load_state_dict(saved[1])
    for _ in range(6):
        q.step()
    assert torch.equal(p.parameters(), q.parameters())
    assert {k: v for k, v in p.group.items() if k != "params"} == {k: v for k, v in q.group.items() if k != "params"}
    with p.opt.averaged(), q.opt.averaged():
        assert torch.equal(p.parameters(), q.parameters())


def test_averages_of_the_parameters() -> None:
    p = Problem(averaging=0.7)
    with pytest.raises(fxcurv.FxcurvError, match="no averaged parameters"), p.opt.averaged():
        pass
    mean: Tensor | None = None
    for k in range(1, 8):
        p.step()
        weight = min(1 - 1 / k, 0.7)
        mean = p.parameters() if mean is None else weight * mean + (1 - weight) * p.parameters()
    before = p.parameters()
    with pytest.raises(ZeroDivisionError), p.opt.averaged():
        torch.testing.assert_close(p.parameters(), mean)
        raise ZeroDivisionError
    assert torch.equal(p.parameters(), before)


def test_averages_are_for_every_kind_of_step() -> None:
    net = mlp(4, 5, 3)
    model = fxcurv.transform(net, "sgd")
    opt = fxcurv.optimizer(model, lr=0.1, averaging=0.5)
    x, seen = torch.randn(8, 4), []
    for _ in range(2):
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
        seen.append(flat(net.parameters()))
    with opt.averaged():
        torch.testing.assert_close(flat(net.parameters()), (seen[0] + seen[1]) / 2)


def test_warm_up_takes_statistics_alone() -> None:
    p = Problem(warmup=2)
    before = p.parameters()
    factors = []
    for _ in range(2):
        p.x = torch.randn(12, 4)
        p.step()
        factors.append(p.model.factors("0")["A"])
    assert torch.equal(p.parameters(), before) and not torch.equal(factors[0], factors[1])
    p.step()
    assert not torch.equal(p.parameters(), before) and p.opt.info.momentum == 0.0


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "hyper", "message"),
    [
        ("adam", {"step": "quadratic"}, "'adam', which has no damping"),
        ("hessian_free", {"step": "quadratic"}, "'hessian_free', which is a whole optimizer"),
        ("kfac", {"step": "cubic"}, "step='cubic' is unknown; choose one of fixed, quadratic"),
        ("kfac", {"step": "quadratic", "weight_decay": 0.1}, "an l2 in its objective"),
        ("kfac", {"step": "quadratic", "loss": None}, "pass loss="),
        ("kfac", {"step": "quadratic", "loss": nn.CrossEntropyLoss(reduction="sum")}, "reduction='mean'"),
        ("kfac", {"step": "quadratic", "weight_gradients": False}, "weight_gradients=True"),
    ],
)
def test_a_method_that_it_does_not_go_with(method: str, hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(fxcurv.FxcurvError, match=message):
        fxcurv.transform(mlp(4, 5, 3), method, **{"loss": "cross_entropy", **hyper})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 0.9}, "no use for momentum=.*fixed_momentum="),
        ({"nesterov": True}, "no use for nesterov="),
        ({"speed": 1.0}, "no option 'speed'.*damping_every"),
        ({"l2": -1.0}, "l2=-1.0 must not be negative"),
        ({"damping_decay": 1.5}, "damping_decay=1.5"),
        ({"gamma_every": 1.5}, "whole number of steps"),
    ],
)
def test_an_option_that_it_does_not_have(options: dict[str, Any], message: str) -> None:
    with pytest.raises(fxcurv.FxcurvError, match=message):
        fxcurv.optimizer(Problem().model, **options)


def test_a_step_needs_its_closure_and_backward() -> None:
    p = Problem()
    with pytest.raises(fxcurv.FxcurvError, match="opt.step\\(closure\\)"):
        p.opt.step()
    p.closure()
    with pytest.raises(fxcurv.FxcurvError, match="step='quadratic' is a whole optimizer"):
        p.model.precondition_()

    def plain() -> Tensor:
        p.opt.zero_grad()
        loss = p.loss(p.model(p.x))
        loss.backward()
        return loss

    with pytest.raises(fxcurv.FxcurvError, match="model.backward"):
        p.opt.step(plain)


def test_defaults_are_those_of_the_paper() -> None:
    p = Problem(mlp(4, 5, 3), damping=150.0)
    assert p.model._engine.method.every.solve == 20 and p.model._engine.method.rescale is None
    expected = {
        "damping": 150.0,
        "l2": 1e-5,
        "damping_every": 5,
        "gamma_every": 20,
        "damping_decay": 0.95,
        "averaging": 0.99,
    }
    assert {name: p.group[name] for name in expected} == expected
    default = fxcurv.transform(mlp(4, 5, 3), "kfac", loss="mse", step="quadratic")
    assert default.hyper["damping"] == 150.0
    own = fxcurv.transform(mlp(4, 5, 3), "kfac", loss="mse", step="quadratic", damping=2.0, solve_every=3)
    assert own.hyper["damping"] == 2.0 and own._engine.method.every.solve == 3
