"""Products with the Hessian and the Gauss-Newton matrix against dense ones; AdaHessian and Hessian-free on top."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fxcurv
from fxcurv.ir.op import OPS
from fxcurv.losses import MSE, Gaussian
from fxcurv.runtime.oracles import GGNOracle, HessianOracle
from tests.methods.nets import Attention, convnet, mlp
from tests.methods.oracle import output_hessian, relative

pytestmark = pytest.mark.usefixtures("float64")

LossFn = Callable[[Tensor], Tensor]


def flat(net: nn.Module) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
    """(f, theta): the output as a function of all parameters in one vector, in the order of ``net.parameters()``."""
    names, tensors = zip(*net.named_parameters(), strict=True)
    sizes = [t.numel() for t in tensors]

    def call(theta: Tensor, x: Tensor) -> Tensor:
        parts = [part.view(t.shape) for part, t in zip(theta.split(sizes), tensors, strict=True)]
        return functional_call(net, dict(zip(names, parts, strict=True)), (x,))

    return call, torch.cat([t.detach().flatten() for t in tensors])


def dense_hessian(net: nn.Module, x: Tensor, loss: LossFn) -> Tensor:
    call, theta = flat(net)
    return torch.func.hessian(lambda t: loss(call(t, x)))(theta).detach()


def dense_ggn(net: nn.Module, x: Tensor, loss: LossFn) -> Tensor:
    call, theta = flat(net)
    j = torch.func.jacrev(lambda t: call(t, x).reshape(-1))(theta).detach()
    return j.T @ output_hessian(net(x), loss) @ j


def vectors(net: nn.Module) -> list[Tensor]:
    return [torch.randn_like(p) for p in net.parameters()]


def packed(parts: list[Tensor]) -> Tensor:
    return torch.cat([p.flatten() for p in parts])


CASES = {
    "mlp": lambda: (mlp(3, 4, 3), torch.randn(5, 3), torch.randint(0, 3, (5,))),
    "conv": lambda: (convnet(2), torch.randn(2, 2, 5, 5), torch.randint(0, 3, (2,))),
    "attention": lambda: (Attention(), torch.randn(2, 4, 3), torch.randint(0, 3, (2, 4))),
}


@pytest.mark.parametrize("case", CASES)
def test_hessian_products(case: str) -> None:
    net, x, y = CASES[case]()
    dense = dense_hessian(net, x, lambda f: F.cross_entropy(f, y))
    oracle = HessianOracle(list(net.parameters()))
    half = len(x) // 2
    for part in (slice(0, half), slice(half, None)):  # micro-batches add up
        share = y[part].numel() / y.numel()
        oracle.add(F.cross_entropy(net(x[part]), y[part]) * share)
    for _ in range(2):
        v = vectors(net)
        torch.testing.assert_close(packed(oracle.product(v)), dense @ packed(v))
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("case", CASES)
def test_gauss_newton_products(case: str) -> None:
    net, x, y = CASES[case]()
    dense = dense_ggn(net, x, lambda f: F.cross_entropy(f, y))
    oracle = GGNOracle(list(net.parameters()), fxcurv.losses.CrossEntropy())
    half = len(x) // 2
    for part in (slice(0, half), slice(half, None)):
        oracle.add(net(x[part]), None, None)
    u, v = vectors(net), vectors(net)
    torch.testing.assert_close(packed(oracle.product(v)), dense @ packed(v))
    assert packed(v) @ packed(oracle.product(v)) >= 0
    torch.testing.assert_close(packed(u) @ packed(oracle.product(v)), packed(v) @ packed(oracle.product(u)))
    assert relative(dense, dense_hessian(net, x, lambda f: F.cross_entropy(f, y))) > 0.01


def test_a_parameter_without_use_has_zero_products() -> None:
    net = mlp(3, 4, 2)
    net.register_parameter("idle", nn.Parameter(torch.randn(2)))
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    for oracle, entry in ((HessianOracle(list(net.parameters())), (F.mse_loss(net(x), y),)),
                          (GGNOracle(list(net.parameters()), MSE()), (net(x), None, None))):  # fmt: skip
        oracle.add(*entry)
        parts = dict(zip(dict(net.named_parameters()), oracle.product(vectors(net)), strict=True))
        assert not parts["idle"].any()
        assert parts["0.weight"].any()


# AdaHessian ----------------------------------------------------------------------------------------------------------


def test_mean_over_all_signs_is_the_diagonal() -> None:
    net, x, y = mlp(1, 2, 1), torch.randn(4, 1), torch.randn(4, 1)
    dense = dense_hessian(net, x, lambda f: F.mse_loss(f, y))
    oracle = HessianOracle(list(net.parameters()))
    oracle.add(F.mse_loss(net(x), y))
    sizes = [p.numel() for p in net.parameters()]
    draws = []
    for signs in itertools.product((-1.0, 1.0), repeat=sum(sizes)):
        z = torch.tensor(signs)
        parts = [part.view(p.shape) for part, p in zip(z.split(sizes), net.parameters(), strict=True)]
        draws.append(z * packed(oracle.product(parts)))
    rows = torch.stack(draws)
    torch.testing.assert_close(rows.mean(0), dense.diagonal())
    torch.testing.assert_close(rows.var(0, correction=0), dense.square().sum(1) - dense.diagonal().square())


@pytest.mark.parametrize("blocks, power, every", [(True, 1.0, 1), (False, 0.5, 1), (True, 1.0, 2)])
def test_adahessian_against_a_dense_re_implementation(blocks: bool, power: float, every: int) -> None:
    net = convnet(2)
    model = fxcurv.transform(
        net, "adahessian", seed=5, blocks=blocks, hessian_power=power, factor_every=every, beta1=0.8, beta2=0.9
    )
    opt = fxcurv.optimizer(model, lr=0.05)
    sizes = [p.numel() for p in net.parameters()]
    shapes = [p.shape for p in net.parameters()]
    m, v, diagonal = torch.zeros(sum(sizes)), torch.zeros(sum(sizes)), torch.zeros(0)
    for k in range(4):
        x, y = torch.randn(3, 2, 5, 5), torch.randint(0, 3, (3,))

        def user(f: Tensor, y: Tensor = y) -> Tensor:
            return F.cross_entropy(f, y)

        _, theta = flat(net)
        if k % every == 0:
            z = packed(
                [
                    OPS["signs"].reference(torch.zeros(s), torch.tensor(5.0), torch.tensor(float(k)), i)
                    for i, s in enumerate(shapes)
                ]
            )
            assert set(z.tolist()) == {-1.0, 1.0}
            product = (z * (dense_hessian(net, x, user) @ z)).split(sizes)
            kept = [d.view(s) for d, s in zip(product, shapes, strict=True)]
            if blocks:
                kept = [d.mean((2, 3), keepdim=True).expand(d.shape) if d.ndim == 4 else d for d in kept]
            diagonal = packed(kept)
        opt.zero_grad()
        outputs = model(x)
        loss = user(outputs)
        model.backward(loss, outputs)
        g = packed([p.grad for p in net.parameters()])
        opt.step()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * diagonal.square()
        root = (v / (1 - 0.9 ** (k + 1))).sqrt()
        theta = theta - 0.05 * (m / (1 - 0.8 ** (k + 1))) / (root**power + 1e-4)
        torch.testing.assert_close(flat(net)[1], theta)


# Hessian-free --------------------------------------------------------------------------------------------------------


def quadratic(weights: Tensor, data: tuple[Tensor, Tensor]) -> tuple[nn.Module, LossFn]:
    """A linear model, whose loss is a quadratic function of its weights."""
    net = nn.Sequential(nn.Linear(3, 2))
    with torch.no_grad():
        net[0].weight.copy_(weights)
        net[0].bias.zero_()
    return net, lambda f: F.mse_loss(f, data[1])


def closure_of(model: nn.Module, opt: torch.optim.Optimizer, x: Tensor, user: LossFn) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        opt.zero_grad()
        outputs = model(x)
        loss = user(outputs)
        model.backward(loss, outputs)
        return loss

    return closure


def test_conjugate_gradients_reach_the_newton_step_of_a_quadratic() -> None:
    data = torch.randn(12, 3), torch.randn(12, 2)
    net, user = quadratic(torch.randn(2, 3), data)
    dense, (_, theta) = dense_ggn(net, data[0], user), flat(net)
    model = fxcurv.transform(net, "hessian_free", loss="mse", damping=0.0, tolerance=0.0, iterations=4)
    opt = fxcurv.optimizer(model)
    before = user(net(data[0]))
    gradient = packed(list(torch.autograd.grad(before, list(net.parameters()))))
    opt.step(closure_of(model, opt, data[0], user))
    torch.testing.assert_close(flat(net)[1], theta - torch.linalg.solve(dense, gradient))
    iterates, values = model._engine.info["iterates"], model._engine.info["model_values"]
    assert len(iterates) <= 4  # 8 unknowns, but 4 distinct eigenvalues: every output has the same Hessian
    torch.testing.assert_close(user(net(data[0])) - before, values[-1])  # the quadratic model is the loss: rho = 1
    for row, value in zip(iterates, values, strict=True):
        torch.testing.assert_close(value, gradient @ row + 0.5 * row @ dense @ row)


def test_damping_follows_the_ratio_of_true_to_predicted_decrease() -> None:
    """On a quadratic the undamped model is right, so damping falls; where the model is far too hopeful it rises."""
    data = torch.randn(12, 3), torch.randn(12, 2)
    net, user = quadratic(torch.randn(2, 3), data)
    opt = fxcurv.optimizer(model := fxcurv.transform(net, "hessian_free", loss="mse", damping=0.3))
    opt.step(closure_of(model, opt, data[0], user))
    assert opt.param_groups[0]["damping"] == pytest.approx(0.2)
    steep = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Sigmoid())
    with torch.no_grad():
        steep[0].weight.fill_(8.0)  # saturated: a tiny curvature and a step far beyond where it holds
    opt = fxcurv.optimizer(model := fxcurv.transform(steep, "hessian_free", loss="mse", damping=1e-9))
    x, y = torch.ones(1, 1), torch.full((1, 1), 0.9)
    opt.step(closure_of(model, opt, x, lambda f: F.mse_loss(f, y)))
    assert opt.param_groups[0]["damping"] == pytest.approx(1.5e-9)


def test_the_damped_step_is_the_dense_solve_and_the_model_value_is_undamped() -> None:
    net, x, y = mlp(3, 4, 3), torch.randn(10, 3), torch.randint(0, 3, (10,))

    def user(f: Tensor) -> Tensor:
        return F.cross_entropy(f, y)

    dense = dense_ggn(net, x, user)
    model = fxcurv.transform(net, "hessian_free", loss="cross_entropy", damping=0.05, tolerance=0.0, iterations=60)
    opt = fxcurv.optimizer(model)
    gradient = packed(list(torch.autograd.grad(user(net(x)), list(net.parameters()))))
    opt.step(closure_of(model, opt, x, user))
    iterates, values = model._engine.info["iterates"], model._engine.info["model_values"]
    solved = -torch.linalg.solve(dense + 0.05 * torch.eye(len(dense)), gradient)
    torch.testing.assert_close(iterates[-1], solved, rtol=1e-6, atol=1e-9)
    for row, value in zip(iterates, values, strict=True):
        torch.testing.assert_close(value, gradient @ row + 0.5 * row @ dense @ row)
    damped = [gradient @ r + 0.5 * r @ dense @ r + 0.025 * r @ r for r in iterates]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(damped))


def test_warm_start_is_a_share_of_the_last_solution() -> None:
    """With no iteration allowed to move it, the solution of the second step is zeta^2 of that of the first."""
    net, x, y = mlp(3, 4, 2), torch.randn(10, 3), torch.randn(10, 2)
    model = fxcurv.transform(net, "hessian_free", loss="mse", zeta=0.5, iterations=5)
    opt = fxcurv.optimizer(model)
    closure = closure_of(model, opt, x, lambda f: F.mse_loss(f, y))
    opt.step(closure)
    first = model._engine.states.read("network.x").clone()
    oracle = GGNOracle(list(net.parameters()), MSE())
    oracle.add(net(x), None, None)
    gradient = packed(list(torch.autograd.grad(F.mse_loss(net(x), y), list(net.parameters()))))
    damping = torch.tensor(opt.param_groups[0]["damping"])
    expected = OPS["cg"].reference(oracle, -gradient, 0.5 * first, damping, 5, 5e-4)[0]
    opt.step(closure)
    torch.testing.assert_close(model._engine.states.read("network.x"), expected)


def test_scaling_loss_and_damping_leaves_the_step_unchanged() -> None:
    """MSE over two outputs is the Gaussian likelihood's scalar: here one output, where MSE is twice the likelihood."""
    x, y = torch.randn(10, 3), torch.randn(10, 1)
    start = mlp(3, 4, 1).state_dict()
    paths = []
    for scale, loss in ((1.0, Gaussian()), (2.0, MSE())):
        net = mlp(3, 4, 1)
        net.load_state_dict(start)
        model = fxcurv.transform(net, "hessian_free", loss=loss, damping=0.1 * scale)
        opt = fxcurv.optimizer(model, min_damping=0.0)

        def user(f: Tensor, scale: float = scale) -> Tensor:
            return scale * (f - y).square().sum() / 2 / 10

        for _ in range(3):
            opt.step(closure_of(model, opt, x, user))
        paths.append((flat(net)[1], opt.param_groups[0]["damping"] / scale))
    torch.testing.assert_close(paths[0][0], paths[1][0])
    assert paths[0][1] == pytest.approx(paths[1][1])


def test_hessian_free_trains_and_never_raises_the_loss() -> None:
    net, x, y = mlp(4, 8, 3), torch.randn(40, 4), torch.randint(0, 3, (40,))
    model = fxcurv.transform(net, "hessian_free", loss="cross_entropy")
    opt = fxcurv.optimizer(model)
    losses = [float(opt.step(closure_of(model, opt, x, lambda f: F.cross_entropy(f, y)))) for _ in range(15)]
    assert all(b < a for a, b in itertools.pairwise(losses))
    assert losses[-1] < 0.3 * losses[0]
