"""KFLR and KFRA against dense Gauss-Newton blocks, the recursion written out, and their step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import FxcurvError, FxcurvWarning
from tests.methods.nets import convnet, mlp
from tests.methods.oracle import LossFn, Step, ggn, joined, kron, output_hessian, relative, step, stored, transform

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore::fxcurv.errors.FxcurvWarning")]

METHODS = ("kflr", "kfra")
FUNCTIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "tanh": (nn.Tanh, torch.tanh),
    "sigmoid": (nn.Sigmoid, torch.sigmoid),
    "relu": (nn.ReLU, torch.relu),
    "leaky_relu": (nn.LeakyReLU, F.leaky_relu),
    "softplus": (nn.Softplus, F.softplus),
    "identity": (nn.Identity, lambda s: s),
}


def row(*widths: int, function: str = "tanh", bias: bool = True) -> nn.Sequential:
    """Linear layers "0", "2", ... with a function in between."""
    torch.manual_seed(4)
    layers: list[nn.Module] = []
    for i, o in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(i, o, bias=bias), FUNCTIONS[function][0]()]
    return nn.Sequential(*layers[:-1])


def data(loss: str, n: int = 7, inputs: int = 4, outputs: int = 3) -> tuple[Tensor, LossFn]:
    draw = torch.Generator().manual_seed(6)
    x = torch.randn(n, inputs, generator=draw, dtype=torch.float64)
    y = torch.randn(n, outputs, generator=draw, dtype=torch.float64)
    labels = torch.randint(outputs, (n,), generator=draw)
    return x, {
        "mse": lambda f: F.mse_loss(f, y),
        "cross_entropy": lambda f: F.cross_entropy(f, labels),
        "bce": lambda f: F.binary_cross_entropy_with_logits(f, y.sigmoid()),
    }[loss]


def taken(net: nn.Module, method: str, x: Tensor, value: LossFn, loss: str, **options: Any) -> Step:
    return step(net, method, x, value, **{"loss": loss, "step": "fixed", **options})


def recursion(net: nn.Sequential, x: Tensor, value: LossFn, function: str) -> dict[str, Tensor]:
    """G of every layer: E[H] of one example's outputs, then (W^T G W) .* E[f' f'^T] with f' by autograd."""
    linear = [(name, m) for name, m in net.named_children() if isinstance(m, nn.Linear)]
    n, outputs = len(x), net(x)
    width = outputs.shape[1]
    H = output_hessian(outputs, value).reshape(n, width, n, width)  # of the mean loss
    found = {linear[-1][0]: sum(H[i, :, i] for i in range(n))}
    for (name, module), (after, following) in reversed(list(zip(linear, linear[1:], strict=False))):
        s = net[: int(name) + 1](x).detach().requires_grad_()
        (slopes,) = torch.autograd.grad(FUNCTIONS[function][1](s).sum(), s)
        W = following.weight.detach()
        found[name] = W.T @ found[after] @ W * (slopes.T @ slopes / n)
        assert module.out_features == len(found[name])
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy", "bce"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_kfra_is_the_recursion(function: str, loss: str, bias: bool) -> None:
    net, (x, value) = row(4, 6, 5, 3, function=function, bias=bias), data(loss)
    found = taken(net, "kfra", x, value, loss)
    for name, expected in recursion(net, x, value, function).items():
        torch.testing.assert_close(found.factors(name)["G"], expected)


@pytest.mark.parametrize("method", METHODS)
def test_blocks_of_a_deep_linear_net_are_exact(method: str) -> None:
    net, (x, value) = row(4, 5, 6, 3, function="identity"), data("mse")
    found = taken(net, method, x, value, "mse")
    for name in ("0", "2", "4"):
        torch.testing.assert_close(kron(found.factors(name)), ggn(net, name, x, value))


def test_one_nonlinear_layer_before_a_constant_hessian_is_exact_too() -> None:
    net, (x, value) = row(4, 6, 3), data("mse")
    one, other = (taken(net, method, x, value, "mse") for method in METHODS)
    for name in ("0", "2"):
        torch.testing.assert_close(one.factors(name)["G"], other.factors(name)["G"])
    deep = row(4, 6, 5, 3)
    one, other = (taken(deep, method, x, value, "mse") for method in METHODS)
    torch.testing.assert_close(one.factors("2")["G"], other.factors("2")["G"])
    assert 1e-3 < relative(other.factors("0")["G"], one.factors("0")["G"]) < 1  # from two on an approximation


@pytest.mark.parametrize("loss", ["mse", "cross_entropy", "bce"])
@pytest.mark.parametrize("method", METHODS)
def test_blocks_of_one_datum_are_exact(method: str, loss: str) -> None:
    """With one example the expectation inside the recursion is the one outside."""
    net, (x, value) = row(4, 6, 5, 3), data(loss, n=1)
    found = taken(net, method, x, value, loss)
    for name in ("0", "2", "4"):
        torch.testing.assert_close(kron(found.factors(name)), ggn(net, name, x, value))


@pytest.mark.parametrize("net", [mlp(2, 3, 3), convnet()], ids=["mlp", "conv"])
def test_kflr_is_kfac_with_exact_columns(net: nn.Module) -> None:
    x = torch.randn(4, 2) if isinstance(net[0], nn.Linear) else torch.randn(4, 2, 5, 5)
    net, y = net.double(), torch.randint(3, (4,))
    x = x.double()
    options = {"loss": "cross_entropy", "damping": 0.01, "kl_clip": None}
    one = taken(net, "kflr", x, lambda f: F.cross_entropy(f, y), "cross_entropy", damping=0.01)
    other = step(net, "kfac", x, lambda f: F.cross_entropy(f, y), fisher="ggn", **options)
    for name, direction in other.direction.items():
        torch.testing.assert_close(one.direction[name], direction)


class Tokens(nn.Module):
    """Linear layers on (batch, time, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def test_positions_are_rows() -> None:
    torch.manual_seed(1)
    net, x, y = Tokens(), torch.randn(4, 3, 4), torch.randn(4, 3, 3)
    one, other = (taken(net, m, x, lambda f: F.mse_loss(f, y), "mse") for m in METHODS)
    for name in ("b", "c"):
        torch.testing.assert_close(one.factors(name)["G"], other.factors(name)["G"])
    h = torch.tanh(net.a(x)).detach().reshape(-1, 6)
    slopes = 1 - h.square()
    W = net.b.weight.detach()
    expected = W.T @ other.factors("b")["G"] @ W * (slopes.T @ slopes / len(h))
    torch.testing.assert_close(other.factors("a")["G"], expected)


class Block(nn.Module):
    """A residual branch and an unknown function before a plain tail."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (nn.Linear(4, 4) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        h = F.gelu(self.c(torch.tanh(self.b(h)) + h))
        return self.e(torch.tanh(self.d(h)))


MIXED = [
    (Block, (4,), {"a", "b", "c", "e"}),  # d alone goes by the recursion
    (lambda: nn.Sequential(*convnet()[:5], nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), (2, 5, 5), {"0", "2", "7"}),
    (lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3)), (4,), {"0", "3"}),
]


@pytest.mark.parametrize(("make", "shape", "measured"), MIXED)
def test_where_layers_are_no_row_the_factor_is_that_of_kflr(make: Any, shape: Any, measured: set[str]) -> None:
    torch.manual_seed(1)
    net, x, y = make(), torch.randn(5, *shape), torch.randint(3, (5,))
    found = {}
    for method in METHODS:
        torch.manual_seed(2)  # of the dropout
        found[method] = taken(net, method, x, lambda f: F.cross_entropy(f, y), "cross_entropy")
    names = {t.name for t in found["kfra"].model._engine.facts.targets}
    for name in names:
        one, other = (found[m].factors(name)["G"] for m in METHODS)
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12) == (name in measured)
    assert measured <= names


def test_what_is_measured_is_named() -> None:
    x = torch.randn(2, 4)
    with pytest.warns(FxcurvWarning, match="'kfra' measures the output factor of a, b, c by gradients"):
        transform(Block(), "kfra", x, loss="cross_entropy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transform(row(4, 5, 3), "kfra", x, loss="cross_entropy")
        transform(Block(), "kflr", x, loss="cross_entropy")


def test_columns_go_back_to_the_last_layer_only() -> None:
    """The first of the three columns also asks for what inputs say; the last pass is the gradient's."""
    x, value = data("cross_entropy")
    measured, passes = {}, {}
    for method in METHODS:
        net, seen = row(4, 6, 5, 3), []
        model = transform(net, method, x, loss="cross_entropy", step="fixed")
        keys = [key for slots in model._engine.compilation.tapped.taps.values() for key in slots]
        measured[method] = sorted(key for key in keys if ".g" in key)

        def watch(module: nn.Module, args: Any, out: Tensor, seen: list[Tensor] = seen) -> None:
            out.register_hook(seen.append)

        net[1].register_forward_hook(watch)
        outputs = model(x)
        model.backward(value(outputs), outputs)
        passes[method] = len(seen)
    assert measured == {"kflr": ["gram(0.g)", "gram(2.g)", "gram(4.g)"], "kfra": ["gram(4.g)"]}
    assert passes == {"kflr": 4, "kfra": 2}


def test_wide_layers_end_the_recursion() -> None:
    net, (x, value) = row(4, 6, 5, 3), data("cross_entropy")
    one, other = (taken(net, m, x, value, "cross_entropy", max_factor_dim=5) for m in METHODS)
    for name in ("0", "2", "4"):
        torch.testing.assert_close(one.factors(name)["G"], other.factors(name)["G"])


@pytest.mark.parametrize("options", [{"disable": ("sink",)}, {"disable": ("share", "batch")}, {"backend": "reference"}])
def test_passes_change_nothing(options: dict[str, Any]) -> None:
    net, (x, value) = row(4, 6, 6, 6, 3), data("cross_entropy")
    one, other = (taken(net, "kfra", x, value, "cross_entropy", **o) for o in ({}, options))
    for name, direction in one.direction.items():
        torch.testing.assert_close(other.direction[name], direction)


def test_factors_are_averaged() -> None:
    net = row(4, 6, 5, 3)
    model = transform(net, "kfra", torch.randn(2, 4), loss="mse", step="fixed", ema=0.7)
    expected, old = {}, [0.0, 0.5, 2 / 3]
    for k in range(3):
        draw = torch.Generator().manual_seed(k)
        x, y = (torch.randn(5, d, generator=draw, dtype=torch.float64) for d in (4, 3))

        def value(f: Tensor, y: Tensor = y) -> Tensor:
            return F.mse_loss(f, y)

        outputs = model(x)
        model.backward(value(outputs), outputs)
        model.precondition_()
        for name, G in recursion(net, x, value, "tanh").items():
            expected[name] = old[k] * expected.get(name, 0) + (1 - old[k]) * G
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)
    for name, G in expected.items():
        torch.testing.assert_close(model.factors(name)["G"], G)


@pytest.mark.parametrize("method", METHODS)
def test_the_step_has_the_length_of_the_exact_model(method: str) -> None:
    """alpha = -h'^T D / (D^T F D + k |D|^2), k = damping + l2, F the whole network's exact Gauss-Newton matrix."""
    damping, l2 = 0.02, 0.003
    net, (x, value) = row(3, 4, 3), data("cross_entropy", inputs=3)
    model = transform(net, method, x, loss="cross_entropy", damping=damping)
    optimizer = fxcurv.optimizer(model, l2=l2)
    start = torch.cat([p.detach().flatten() for p in model.parameters()])

    def closure() -> Tensor:
        model.zero_grad()
        outputs = model(x)
        loss = value(outputs)
        model.backward(loss, outputs)
        return loss

    closure()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()]) + l2 * start
    names = list(dict(net.named_parameters()))
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(net, p, (x,)).flatten())(
        {n: p.detach() for n, p in net.named_parameters()}
    )
    J = torch.cat([jacobian[n].reshape(len(x) * 3, -1) for n in names], 1)
    exact = J.T @ output_hessian(net(x), value) @ J
    model.discard()
    optimizer.step(closure)
    D = []
    k = damping + l2
    for name in ("0", "2"):
        factors = model.factors(name)
        A, G = factors["A"], factors["G"]
        omega = torch.sqrt(A.trace() / len(A) / (G.trace() / len(G)))
        parts = dict(zip(names, gradient.split([p.numel() for p in net.parameters()]), strict=True))
        V = joined([parts[n].view_as(net.get_parameter(n)) for n in stored(net, name)])[0]
        left, right = G + k**0.5 / omega * torch.eye(len(G)), A + omega * k**0.5 * torch.eye(len(A))
        U = torch.linalg.solve(left, V) @ torch.linalg.inv(right)
        D += [-U[:, :-1].flatten(), -U[:, -1]]
    D = torch.cat(D)
    alpha = -(gradient @ D) / (D @ exact @ D + k * D @ D)
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in model.parameters()]), start + alpha * D)
    assert optimizer.info is not None and optimizer.info.rate == pytest.approx(float(alpha))
    optimizer.step(closure)
    assert optimizer.info.momentum == 0.0  # alpha alone, however often
    group = optimizer.param_groups[0]
    assert (group["damping"], group["gamma"]) == (damping, pytest.approx(k**0.5))
    assert (group["damping_every"], group["gamma_every"], group["averaging"]) == (0, 0, 0.0)
    own = fxcurv.optimizer(model, fixed_momentum=None, damping_every=5).param_groups[0]
    assert (own["fixed_momentum"], own["damping_every"], own["gamma_every"]) == (None, 5, 0)


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_falls_without_any_tuning(method: str) -> None:
    net, (x, value) = row(4, 8, 8, 3), data("cross_entropy", n=40)
    model = fxcurv.transform(net, method, example_inputs=(x,), loss="cross_entropy")
    optimizer = fxcurv.optimizer(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        outputs = model(x)
        loss = value(outputs)
        model.backward(loss, outputs)
        return loss

    values = [float(optimizer.step(closure)) for _ in range(12)]
    assert values[-1] < 0.5 * values[0] and max(values[1:]) < values[0]


def test_positions_that_are_summed_are_refused() -> None:
    with pytest.raises(FxcurvError, match="'kfra' goes back through the rows of each layer: leave sharing='expand'"):
        fxcurv.transform(mlp(2, 2, 2), "kfra", loss="mse", sharing="reduce")
