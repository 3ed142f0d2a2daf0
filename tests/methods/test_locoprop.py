"""LocoProp: the direction is what each layer loses on its own local problem, written out and minimised by autograd."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import FxcurvError, FxcurvWarning
from tests.methods.nets import convnet, mlp
from tests.methods.oracle import Step, accumulate, joined, step, stored, transform

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore::fxcurv.errors.FxcurvWarning")]

METHODS = ("locoprop_s", "locoprop_m")
INTEGRALS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda s: s.square().sum() / 2,
    "tanh": lambda s: s.cosh().log().sum(),
    "sigmoid": lambda s: F.softplus(s).sum(),
    "softmax": lambda s: s.logsumexp(-1).sum(),
}
LINKS = {"cross_entropy": "softmax", "bce": "sigmoid", "mse": "identity"}


@dataclass
class Case:
    """A network, a batch, the loss by name with its targets, and the activation of each layer."""

    net: nn.Module
    x: Tensor
    loss: str
    y: Tensor
    activations: dict[str, str]
    groups: int = 1

    def value(self, f: Tensor) -> Tensor:
        of = {"cross_entropy": F.cross_entropy, "bce": F.binary_cross_entropy_with_logits, "mse": F.mse_loss}
        return of[self.loss](f, self.y)

    def rows(self, name: str) -> tuple[Tensor, Tensor]:
        """(a, g) of a layer, (groups, rows, d): inputs with the constant 1, and the gradient of the mean loss."""
        layer, seen = self.net.get_submodule(name), {}

        def watch(module: nn.Module, args: Any, out: Tensor) -> None:
            out.retain_grad()
            seen["x"], seen["y"] = args[0].detach(), out

        handle = layer.register_forward_hook(watch)
        self.value(self.net(self.x)).backward()
        handle.remove()
        self.net.zero_grad()
        x, g = seen["x"], seen["y"].grad
        if isinstance(layer, nn.Conv2d):
            x = F.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride).mT.flatten(0, 1)
            g = g.flatten(2).mT.flatten(0, 1)
        k = self.groups if name == "0" else 1
        x, g = (t.reshape(-1, k, t.shape[-1] // k).transpose(0, 1) for t in (x, g))
        return torch.cat([x, torch.ones_like(x[..., :1])], -1), g

    def matrix(self, name: str) -> Tensor:
        """[W b], (groups, d_out, d_in)."""
        parameters = dict(self.net.named_parameters())
        return joined([parameters[n].detach() for n in stored(self.net, name)], self.groups if name == "0" else 1)

    def local_loss(self, name: str, W: Tensor, activation: str, gamma: float, eta: float = 0.0) -> Tensor:
        """sum_i F(W a_i) - y_i . (W a_i) + |W - W_t|^2 / (2 eta) with y_i = f(W_t a_i) - gamma g_i."""
        a, g = self.rows(name)
        start = self.matrix(name)
        before = (a @ start.mT).requires_grad_()
        (f,) = torch.autograd.grad(INTEGRALS[activation](before), before)
        s = a @ W.mT
        proximal = (W - start).square().sum() / (2 * eta) if eta else 0.0
        return INTEGRALS[activation](s) - ((f - gamma * g) * s).sum() + proximal

    def descended(self, name: str, method: str, gamma: float, rate: float, steps: int, eta: float = 0.0) -> Tensor:
        """W_t - W after gradient descent by autograd on the local loss."""
        activation = self.activations[name] if method == "locoprop_m" else "identity"
        W = start = self.matrix(name)
        for t in range(steps):
            free = W.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self.local_loss(name, free, activation, gamma, eta), free)
            W = W - rate * max(1 - t / steps, 0.25) * gradient
        return start - W


class Tokens(nn.Module):
    """Linear layers on (batch, time, features) with a sigmoid between; the output is summed over time."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.sigmoid(self.inner(x)))


def case(kind: str) -> Case:
    torch.manual_seed(2)
    if kind == "classes":
        net, x, y = mlp(4, 6, 5, 3), torch.randn(9, 4), torch.randint(3, (9,))
        return Case(net, x, "cross_entropy", y, {"0": "tanh", "2": "tanh", "4": "softmax"})
    if kind == "bits":
        net, x, y = mlp(4, 6, 3), torch.randn(9, 4), torch.rand(9, 3)
        return Case(net, x, "bce", y, {"0": "tanh", "2": "sigmoid"})
    if kind == "tokens":
        net, x, y = Tokens(), torch.randn(4, 3, 3), torch.randn(4, 3, 2)
        return Case(net, x, "mse", y, {"inner": "sigmoid", "outer": "identity"})
    groups = 2 if kind == "grouped" else 1
    net, x, y = convnet(groups), torch.randn(4, 2, 5, 5), torch.randint(3, (4,))
    return Case(net, x, "cross_entropy", y, {"0": "tanh", "2": "tanh", "5": "softmax"}, groups)


KINDS = ("classes", "bits", "tokens", "conv", "grouped")
PLAIN = {"inner": "sgd", "gamma": 3.0, "inner_lr": 0.05}


def taken(c: Case, method: str, backward: dict[str, Any] | None = None, **options: Any) -> Step:
    return step(c.net, method, c.x, c.value, loss=c.loss, backward=backward, **{**PLAIN, **options})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_one_plain_step_is_the_gradient(method: str, kind: str) -> None:
    """The first inner gradient is gamma times that of the mean loss, that is gamma / N times the summed one."""
    c = case(kind)
    found = taken(c, method, inner_steps=1)
    for name, gradient in found.gradient.items():
        torch.testing.assert_close(found.direction[name], 3.0 * 0.05 * gradient)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", [None, 0.7])
@pytest.mark.parametrize("method", METHODS)
def test_direction_is_descent_on_the_local_loss(method: str, eta: float | None, kind: str) -> None:
    c = case(kind)
    found = taken(c, method, inner_steps=5, eta=eta)
    for name in c.activations:
        _, direction = found.pair(name, c.groups if name == "0" else 1)
        torch.testing.assert_close(direction, c.descended(name, method, 3.0, 0.05, 5, eta or 0.0))


def test_the_two_losses_differ_behind_an_activation_only() -> None:
    c = case("tokens")
    s, m = (taken(c, method, inner_steps=5).direction for method in METHODS)
    assert not torch.allclose(s["inner.weight"], m["inner.weight"], rtol=1e-3)
    torch.testing.assert_close(s["outer.weight"], m["outer.weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_many_steps_reach_the_closed_form(kind: str) -> None:
    c, eta = case(kind), 0.5
    closed = taken(c, "locoprop_s", solve="closed", eta=eta).direction
    long = taken(c, "locoprop_s", inner_steps=4000, inner_lr=0.01, eta=eta).direction
    for name in closed:
        torch.testing.assert_close(long[name], closed[name], rtol=1e-8, atol=1e-10)
    for name in c.activations:
        a, g = c.rows(name)
        solved = torch.linalg.solve(a.mT @ a + torch.eye(a.shape[-1]) / eta, g.mT @ a, left=False)
        names = stored(c.net, name)
        torch.testing.assert_close(joined([closed[n] for n in names], len(solved)), 3.0 * solved)


def test_the_closed_form_is_the_direction_of_foof() -> None:
    """gamma V (H + I/eta)^-1 = (gamma/n) V (A + I/(eta n))^-1 for n rows."""
    c, eta = case("classes"), 0.5
    n = len(c.x)
    closed = taken(c, "locoprop_s", solve="closed", eta=eta).direction
    foof = step(c.net, "foof", c.x, c.value, loss=c.loss, damping=1 / (eta * n)).direction
    for name in closed:
        torch.testing.assert_close(closed[name], 3.0 / n * foof[name])


def test_a_small_eta_gives_the_gradient() -> None:
    c, eta = case("classes"), 1e-9
    found = taken(c, "locoprop_s", solve="closed", eta=eta)
    for name, gradient in found.gradient.items():
        torch.testing.assert_close(found.direction[name] / (3.0 * eta), gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_matching_loss_decreases_with_every_step(kind: str) -> None:
    c = case(kind)
    for name, activation in c.activations.items():
        groups = c.groups if name == "0" else 1
        values = [c.local_loss(name, c.matrix(name), activation, 3.0).item()]
        for steps in range(1, 8):
            _, direction = taken(c, "locoprop_m", inner_steps=steps, inner_lr=0.002).pair(name, groups)
            values.append(c.local_loss(name, c.matrix(name) - direction, activation, 3.0).item())
        assert all(after < before for before, after in zip(values, values[1:], strict=False))


@pytest.mark.parametrize("method", METHODS)
def test_slots_go_on_from_batch_to_batch(method: str) -> None:
    """RMSProp over two batches by hand: the rate is inside the momentum, the second moment starts at 1."""
    c = case("classes")
    options = {"inner": "rmsprop", "beta1": 0.7, "beta2": 0.8, "epsilon": 1e-3, "inner_steps": 3}
    model = transform(c.net, method, c.x, loss=c.loss, **{**PLAIN, **options})
    slots = {name: [torch.zeros_like(c.matrix(name)), torch.ones_like(c.matrix(name))] for name in c.activations}
    for batch in range(2):
        c.x = torch.randn(9, 4, generator=torch.Generator().manual_seed(batch))
        found = accumulate(model, [(c.x, c.value, {})])
        for name, activation in c.activations.items():
            activation = activation if method == "locoprop_m" else "identity"
            W = start = c.matrix(name)
            for t in range(3):
                free = W.clone().requires_grad_()
                (g,) = torch.autograd.grad(c.local_loss(name, free, activation, 3.0), free)
                slots[name][1] = 0.8 * slots[name][1] + 0.2 * g**2
                slots[name][0] = 0.7 * slots[name][0] + 0.05 * [1, 2 / 3, 1 / 3][t] * g / (slots[name][1] + 1e-3).sqrt()
                W = W - slots[name][0]
            _, direction = found.pair(name)
            torch.testing.assert_close(direction, start - W)


@pytest.mark.parametrize("method", METHODS)
def test_adam_counts_its_steps_over_all_batches(method: str) -> None:
    c = case("classes")
    options = {"inner": "adam", "beta1": 0.7, "beta2": 0.8, "epsilon": 1e-3, "inner_steps": 1}
    model = transform(c.net, method, c.x, loss=c.loss, **{**PLAIN, **options})
    lost = {name: torch.zeros_like(c.matrix(name)).requires_grad_() for name in c.activations}
    reference = torch.optim.Adam(lost.values(), 0.05, (0.7, 0.8), 1e-3)
    for batch in range(3):
        c.x = torch.randn(9, 4, generator=torch.Generator().manual_seed(batch))
        found = accumulate(model, [(c.x, c.value, {})])
        for name, activation in c.activations.items():
            with torch.no_grad():
                lost[name].zero_()  # slots stay, the weight has not moved
            loss = c.local_loss(name, c.matrix(name) - lost[name], activation, 3.0)
            (lost[name].grad,) = torch.autograd.grad(loss, lost[name])
        reference.step()
        for name in c.activations:
            torch.testing.assert_close(found.pair(name)[1], lost[name].detach())


@pytest.mark.parametrize("inner", ["adam", "momentum", "nesterov", "adagrad"])
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_same(method: str, inner: str) -> None:
    c = case("classes")
    model = transform(c.net, method, c.x, loss=c.loss, inner=inner, inner_lr=1e-3, inner_steps=3)
    accumulate(model, [(c.x, c.value, {})])
    other = transform(copy.deepcopy(c.net), method, c.x, loss=c.loss, inner=inner, inner_lr=1e-3, inner_steps=3)
    other.load_state_dict(model.state_dict())
    one, two = (accumulate(m, [(c.x, c.value, {})]) for m in (model, other))
    fresh = taken(c, method, inner=inner, inner_lr=1e-3, gamma=10.0, inner_steps=3)
    for name, direction in one.direction.items():
        assert torch.equal(direction, two.direction[name])
        assert not torch.allclose(direction, fresh.direction[name])  # slots matter


@pytest.mark.parametrize("method", METHODS)
def test_sums_and_micro_batches_are_one_batch(method: str) -> None:
    c = case("classes")
    whole = taken(c, method, inner_steps=3).direction
    model = transform(c.net, method, c.x, loss=c.loss, inner_steps=3, **PLAIN)
    halves = [
        (c.x[:3], lambda f: F.cross_entropy(f, c.y[:3]) / 3),
        (c.x[3:], lambda f: 2 * F.cross_entropy(f, c.y[3:]) / 3),
    ]
    parts = accumulate(model, [(x, loss, {}) for x, loss in halves]).direction
    summed = step(
        c.net, method, c.x, lambda f: F.cross_entropy(f, c.y, reduction="sum"),
        loss=fxcurv.losses.CrossEntropy(reduction="sum"), inner_steps=3, **PLAIN,
    ).direction  # fmt: skip
    plain = taken(c, method, inner_steps=3, backward={"plain": True}).direction
    for name, direction in whole.items():
        for other in (parts, summed, plain):
            torch.testing.assert_close(other[name], direction)


@pytest.mark.parametrize("rate", [1.0, 0.4])
def test_a_step_at_rate_one_ends_at_the_local_solution(rate: float) -> None:
    c = case("classes")
    before = {name: c.matrix(name) for name in c.activations}
    lost = {name: c.descended(name, "locoprop_m", 3.0, 0.05, 4) for name in c.activations}
    model = transform(c.net, "locoprop_m", c.x, loss=c.loss, inner_steps=4, **PLAIN)
    optimizer = fxcurv.optimizer(model) if rate == 1.0 else torch.optim.SGD(model.parameters(), lr=rate)
    c.value(model(c.x)).backward()
    if rate != 1.0:
        model.precondition_()
    optimizer.step()
    for name in c.activations:
        torch.testing.assert_close(c.matrix(name), before[name] - rate * lost[name])


class Branches(nn.Module):
    """The second branch is taken on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, both: bool = True) -> Tensor:
        return self.out(torch.tanh(self.a(x) + self.b(x) if both else self.a(x)))


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_was_not_reached_stays_where_it_is(method: str) -> None:
    torch.manual_seed(0)
    net, x, y = Branches(), torch.randn(5, 3), torch.randint(2, (5,))
    model = transform(net, method, x, loss="cross_entropy", inner="momentum", inner_lr=0.01)
    for both in (True, False):
        model.zero_grad()
        F.cross_entropy(model(x, both), y).backward()
        kept = model.state_dict()["curvature.b.first"].clone() if not both else None
        model.precondition_()
        assert bool(model.get_parameter("a.weight").grad.any())
    assert kept is not None and kept.any() and torch.equal(model.state_dict()["curvature.b.first"], kept)
    gradient = model.get_parameter("b.weight").grad
    assert gradient is None or not gradient.any()


class Bag(nn.Module):
    """An embedding before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens).mean(1))


@pytest.mark.parametrize("method", METHODS)
def test_an_embedding_goes_by_its_token_counts(method: str) -> None:
    """With one-hot inputs H is diagonal: row by row, each token's vector on its own."""
    torch.manual_seed(0)
    net, x, y = Bag(), torch.randint(7, (5, 6)), torch.randint(3, (5,))
    found = step(net, method, x, lambda f: F.cross_entropy(f, y), loss="cross_entropy", inner_steps=4, **PLAIN)
    counts = torch.bincount(x.flatten(), minlength=7).double()
    V, D = 3.0 * found.gradient["table.weight"], torch.zeros(7, 4)
    for t in range(4):
        D = D + 0.05 * max(1 - t / 4, 0.25) * (V - counts[:, None] * D)
    torch.testing.assert_close(found.direction["table.weight"], D)


@pytest.mark.parametrize("kind", ["classes", "conv", "grouped"])
def test_wide_inputs_go_by_rows_and_give_the_same(kind: str) -> None:
    c = case(kind)
    wide, narrow = (taken(c, "locoprop_s", inner_steps=4, max_factor_dim=d) for d in (2, 8192))
    for name, direction in narrow.direction.items():
        torch.testing.assert_close(wide.direction[name], direction)
    program = wide.model.program.text()
    assert "fit_squared" not in program and "fit_matching" in program


@pytest.mark.parametrize("kind", ["conv", "classes"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "options", [{"disable": ("sink",)}, {"disable": ("batch", "fuse", "defer")}, {"backend": "reference"}]
)
def test_passes_change_nothing(options: dict[str, Any], method: str, kind: str) -> None:
    c = case(kind)
    one, other = (taken(c, method, inner="adam", inner_lr=1e-3, **o).direction for o in ({}, options))
    for name, direction in one.items():
        torch.testing.assert_close(other[name], direction)


def test_what_has_no_matching_loss_is_named() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(2, 2))
    x = torch.randn(2, 1, 4, 4)
    with pytest.warns(FxcurvWarning, match="'locoprop_m' fits 0 by the squared loss"):
        fxcurv.transform(net, "locoprop_m", example_inputs=(x,), loss="cross_entropy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxcurv.transform(net, "locoprop_s", example_inputs=(x,), loss="cross_entropy")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("locoprop_s", {"inner": "lbfgs"}, "inner='lbfgs' is unknown; choose one of rmsprop, sgd"),
        ("locoprop_m", {"inner_steps": 0}, "inner_steps=0 must be a whole number of steps, at least 1"),
        ("locoprop_m", {"eta": 0.0}, "eta=0.0 must be positive, or None for no proximal term"),
        ("locoprop_s", {"solve": "closed"}, "solve='closed' needs the proximal term: give eta"),
        ("locoprop_s", {"solve": "newton"}, "solve='newton' is unknown; choose one of iterate, closed"),
        ("locoprop_m", {"factor_every": 2}, "leave factor_every=1"),
        ("locoprop_m", {"sharing": "reduce"}, "leave sharing='expand'"),
        ("locoprop_m", {"solve": "closed"}, "has no hyper-parameter 'solve'"),
    ],
)
def test_what_cannot_be_is_said(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FxcurvError, match=message):
        fxcurv.transform(mlp(2, 2, 2), method, example_inputs=(torch.randn(2, 2),), **options)


@pytest.mark.parametrize("method", METHODS)
def test_more_inner_steps_train_an_autoencoder_faster(method: str) -> None:
    torch.manual_seed(0)
    codes = torch.randn(64, 3)
    x = torch.sigmoid(2 * codes @ torch.randn(3, 12))
    final = {}
    for steps in (1, 10):
        torch.manual_seed(1)
        model = fxcurv.transform(
            mlp(12, 16, 3, 16, 12), method, loss="bce", inner_steps=steps, inner_lr=1e-4, gamma=100.0
        )
        optimizer = fxcurv.optimizer(model)
        for _ in range(40):
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(model(x), x)
            loss.backward()
            optimizer.step()
        final[steps] = loss.item()
    floor = float(F.binary_cross_entropy(x, x))  # of a perfect reconstruction
    assert final[10] - floor < 0.7 * (final[1] - floor)
