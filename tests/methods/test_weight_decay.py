"""Weight decay and L2 under a preconditioner, K-FAC-G, and the three mechanisms (Zhang, Wang, Xu & Grosse 2018)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcurv
from fxcurv import losses
from fxcurv.errors import FxcurvError
from fxcurv.tools.decay import curvature_norm, decay_table, is_scale_free, jacobian_norm
from tests.methods.nets import Attention, convnet, mlp
from tests.methods.oracle import jacobian, joined, kron, relative, step, stored, transform

pytestmark = pytest.mark.usefixtures("float64")
BETA, RATE = 0.3, 0.1


def data(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    return mlp(3, 4, 3), torch.randn(6, 3), torch.randint(0, 3, (6,))


def trained(method: str, decay: str, steps: int = 1, **options: Any) -> tuple[dict[str, Tensor], Any]:
    """Parameters after steps of fxcurv.optimizer on one batch."""
    net, x, y = data()
    beta = options.pop("weight_decay", BETA)
    model = transform(net, method, x, loss="cross_entropy", decay=decay, weight_decay=beta, lr=RATE, **options)
    optimizer = fxcurv.optimizer(model)
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = model(x)
        model.backward(F.cross_entropy(outputs, y), outputs)
        optimizer.step()
    return {n: p.detach().clone() for n, p in model.named_parameters()}, model


# L2 against decay ---------------------------------------------------------------------------------------------------


def test_l2_and_decay_agree_without_a_preconditioner() -> None:
    """C = I: one step of SGD is the same; with momentum the decay is not accumulated, so only without it."""
    for steps in (1, 4):
        l2, _ = trained("sgd", "l2", steps, momentum=0.0)
        decoupled, _ = trained("sgd", "decoupled", steps, momentum=0.0)
        plain, _ = trained("sgd", "decoupled", steps, momentum=0.0, weight_decay=0.0)
        for name, value in l2.items():
            torch.testing.assert_close(value, decoupled[name])
            assert relative(plain[name], value) > 1e-3


@pytest.mark.parametrize("method", ["kfac", "ekfac", "thor", "foof", "shampoo", "adam"])
def test_l2_and_decay_differ_under_a_preconditioner(method: str) -> None:
    l2, _ = trained(method, "l2", momentum=0.0)
    decoupled, _ = trained(method, "decoupled", momentum=0.0)
    assert max(relative(l2[name], decoupled[name]) for name in l2) > 1e-3


@pytest.mark.parametrize("fisher", ["empirical", "ggn"])
def test_l2_is_preconditioned_with_the_gradient(fisher: str) -> None:
    """theta - eta C^-1 (grad + beta theta), from ``precondition_`` itself, for parameters covered or not."""
    net, x, y = data()
    options = {"loss": "cross_entropy", "fisher": fisher, "damping": 0.1, "damping_scheme": "sqrt", "layers": ["0"]}
    taken = step(net, "kfac", x, lambda f: F.cross_entropy(f, y), decay="l2", weight_decay=BETA, **options)
    a, g = (m + 0.1**0.5 * torch.eye(len(m)) for m in taken.factors("0").values())
    gradient, direction = taken.pair("0")
    theta = joined([dict(net.named_parameters())[n].detach() for n in stored(net, "0")])
    expected = torch.linalg.solve(torch.kron(g, a), (gradient + BETA * theta).flatten())
    torch.testing.assert_close(direction.flatten(), expected)
    torch.testing.assert_close(taken.direction["2.weight"], taken.gradient["2.weight"] + BETA * net[2].weight.detach())


@pytest.mark.parametrize("kind", ["sum", "scaled", "rows"])
def test_l2_belongs_to_the_mean_loss(kind: str) -> None:
    """A summed loss, a gradient scaler and kept rows change nothing of the penalty."""
    torch.manual_seed(0)
    net, x, y = mlp(9, 9, 9), torch.randn(4, 9), torch.randint(0, 9, (4,))
    options: dict[str, Any] = {"fisher": "empirical", "damping": 0.1, "decay": "l2", "weight_decay": BETA}
    base = step(net, "kfac", x, lambda f: F.cross_entropy(f, y), loss="cross_entropy", **options)
    reduction = "sum" if kind == "sum" else "mean"
    loss = losses.CrossEntropy(reduction=reduction)
    model = transform(net, "kfac", x, loss=loss, weight_gradients=kind != "rows", **options)
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=kind == "scaled")
    outputs = model(x)
    model.backward(scaler.scale(F.cross_entropy(outputs, y, reduction=reduction)), outputs)
    assert (net[2].weight.grad is None) == (kind == "rows")
    model.precondition_(scaler)
    scale = 8.0 if kind == "scaled" else 1.0
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad / scale, base.direction[name])


def test_l2_is_added_once_and_not_to_what_has_no_gradient() -> None:
    net, x, y = data()
    model = transform(net, "sgd", x, decay="l2", weight_decay=BETA)
    F.cross_entropy(model(x), y).backward()
    net[0].bias.grad = None
    gradient = net[0].weight.grad.clone()
    model._engine.propose()
    model.precondition_()
    torch.testing.assert_close(net[0].weight.grad, gradient + BETA * net[0].weight.detach())
    assert net[0].bias.grad is None


def test_groups_have_their_own_strength() -> None:
    for decay in ("l2", "decoupled"):
        net, x, y = data()
        model = transform(net, "sgd", x, decay=decay, lr=RATE, momentum=0.0)
        optimizer = fxcurv.optimizer(model, weight_decay=BETA)
        weights = [p for p in model.parameters() if p.ndim > 1]
        optimizer.param_groups[0]["params"] = [p for p in model.parameters() if p.ndim == 1]
        optimizer.add_param_group({"params": weights, "weight_decay": 0.0})
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        F.cross_entropy(model(x), y).backward()
        gradient = {n: p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
        for name, p in model.named_parameters():
            beta = 0.0 if p.ndim > 1 else BETA
            torch.testing.assert_close(p.detach(), before[name] - RATE * (gradient[name] + beta * before[name]))


def test_decoupled_decay_stays_outside_clip_and_momentum() -> None:
    """The authors' rule: v = mu v + nu C^-1 g; theta -= eta (v + beta theta), with the clip on C^-1 g alone."""
    net, x, y = data()
    options = {"loss": "cross_entropy", "fisher": "ggn", "damping": 1e-2, "kl_clip": 1e-4, "lr": RATE}
    model = transform(net, "kfac", x, weight_decay=BETA, momentum=0.8, **options)
    twin_net, _, _ = data()
    twin = transform(twin_net, "kfac", x, **options)
    optimizer, velocity = fxcurv.optimizer(model), {}
    for _ in range(3):
        optimizer.zero_grad()
        outputs = model(x)
        model.backward(F.cross_entropy(outputs, y), outputs)
        info = optimizer.step() or optimizer.info
        twin.zero_grad()
        outputs = twin(x)
        twin.backward(F.cross_entropy(outputs, y), outputs)
        assert twin.precondition_().kl_scale == pytest.approx(info.kl_scale) and info.kl_scale < 1
        with torch.no_grad():
            for name, p in twin.named_parameters():
                velocity[name] = 0.8 * velocity.get(name, 0.0) + p.grad
                p -= RATE * (velocity[name] + BETA * p)
        for name, p in twin.named_parameters():
            torch.testing.assert_close(model.get_parameter(name), p)


def test_names_are_checked() -> None:
    with pytest.raises(FxcurvError, match="decay='huge' is unknown; choose one of decoupled, l2"):
        fxcurv.methods.kfac(decay="huge")
    with pytest.raises(FxcurvError, match="put the penalty in the loss"):
        fxcurv.methods.hessian_free(decay="l2")


# K-FAC-G ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv", "tokens"])
def test_logits_is_the_plain_gauss_newton_matrix(kind: str) -> None:
    """diag is exact in its own diagonal: that of J^T J / N, whatever the loss."""
    torch.manual_seed(0)
    net, x, y, name = {
        "linear": lambda: (mlp(4, 5, 3), torch.randn(6, 4), torch.randint(0, 3, (6,)), "0"),
        "conv": lambda: (convnet(), torch.randn(4, 2, 5, 5), torch.randint(0, 3, (4,)), "2"),
        "tokens": lambda: (Attention(), torch.randn(3, 4, 3), torch.randint(0, 3, (3, 4)), "q"),
    }[kind]()
    taken = step(net, "diag", x, lambda f: F.cross_entropy(f, y), loss="cross_entropy", fisher="logits")
    j = jacobian(net, name, x)
    torch.testing.assert_close(taken.factors(name)["D"].flatten(), (j.T @ j).diagonal() / y.numel())


def test_logits_mc_is_unbiased_and_deterministic() -> None:
    net, x, y = data()
    exact = step(net, "kfac", x, lambda f: F.cross_entropy(f, y), loss="cross_entropy", fisher="logits")
    options = {"loss": "cross_entropy", "fisher": "logits_mc", "fisher_samples": 400}
    first, again = (step(net, "kfac", x, lambda f: F.cross_entropy(f, y), **options) for _ in range(2))
    for name in ("0", "2"):
        assert torch.equal(first.factors(name)["G"], again.factors(name)["G"])
        assert relative(first.factors(name)["G"], exact.factors(name)["G"]) < 0.1
        torch.testing.assert_close(first.factors(name)["A"], exact.factors(name)["A"])


def test_logits_leaves_out_terms_that_do_not_count() -> None:
    net, x, y = data()
    y[2] = -100
    kept = [0, 1, 3, 4, 5]
    loss = losses.CrossEntropy(ignore_index=-100)
    mine = step(net, "diag", x, lambda f: F.cross_entropy(f, y), loss=loss, fisher="logits", backward={"targets": y})
    j = jacobian(net, "0", x[kept])
    torch.testing.assert_close(mine.factors("0")["D"].flatten(), (j.T @ j).diagonal() / 5)


# The three mechanisms -----------------------------------------------------------------------------------------------


def chain(*widths: int, nonlinear: bool) -> nn.Sequential:
    """Weight matrices without biases."""
    torch.manual_seed(2)
    layers: list[nn.Module] = []
    for i, o in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(i, o, bias=False)] + ([nn.ReLU()] if nonlinear else [])
    return nn.Sequential(*(layers[:-1] if nonlinear else layers))


@pytest.mark.parametrize("nonlinear", [True, False])
def test_three_weight_matrices_give_nine_times_the_outputs(nonlinear: bool) -> None:
    """theta^T G theta = (L + 1)^2 E|f|^2, against the dense Jacobian too; a bias breaks it."""
    net, x = chain(4, 6, 5, 3, nonlinear=nonlinear), torch.randn(7, 4)
    curved, square = jacobian_norm(net, (x,))
    assert curved / square == pytest.approx(9, rel=1e-10)
    names = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    j = torch.cat([jacobian(net, name, x) for name in names], 1)
    theta = torch.cat([p.detach().flatten() for p in net.parameters()])
    assert curved == pytest.approx(float((j @ theta).square().sum()) / 7)
    biased = mlp(4, 6, 3)
    curved, square = jacobian_norm(biased, (x,))
    assert abs(curved / square - 4) > 1e-2


def test_linear_net_has_three_times_the_outputs_in_the_block_diagonal_norm() -> None:
    """sum over layers of theta_l^T kron(G_l, A_l) theta_l = (L + 1) E|f|^2 for K-FAC-G on a deep linear net."""
    net, x, y = chain(4, 6, 5, 3, nonlinear=False), torch.randn(40, 4), torch.randint(0, 3, (40,))
    taken = step(net, "kfac", x, lambda f: F.cross_entropy(f, y), loss="cross_entropy", fisher="logits")
    table = decay_table(taken.model, inputs=(x,))
    square = float(net(x).detach().square().sum()) / 40
    assert [row.curvature_norm for row in table] == pytest.approx([square] * 3)
    assert not any(row.scale_free for row in table)


@pytest.mark.parametrize("method", ["kfac", "ekfac", "diag", "thor", "foof"])
def test_curvature_norm_is_that_of_the_block(method: str) -> None:
    torch.manual_seed(0)
    net, x, y = convnet(2), torch.randn(4, 2, 5, 5), torch.randint(0, 3, (4,))
    options = {} if method == "foof" else {"loss": "cross_entropy", "fisher": "empirical"}
    taken = step(net, method, x, lambda f: F.cross_entropy(f, y), **options)
    for name, groups in (("0", 2), ("5", 1)):
        found = curvature_norm(taken.model, name)
        theta = joined([dict(net.named_parameters())[n].detach() for n in stored(net, name)], groups)
        block = taken.model.block(name).reshape(groups, theta[0].numel(), -1)
        expected = sum(float(t.flatten() @ c @ t.flatten()) for t, c in zip(theta, block, strict=True))
        assert found == pytest.approx(expected)


def batchnorm() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5, eps=1e-14), nn.Tanh(), nn.Linear(5, 3))


def test_effective_damping_of_a_scale_free_layer() -> None:
    """theta^ <- theta^ - eta (I - theta^ theta^^T) (C(theta^) + lambda |theta|^2 I)^-1 grad L(theta^), to first order.

    The step is the tool's at |theta| = 3; curvature and gradient are taken at the direction theta^ itself.
    """
    x, y, lam, rate = torch.randn(60, 4), torch.randint(0, 3, (60,)), 0.002, 1e-6
    taken = []
    for length in (3.0, 1.0):
        net = batchnorm()
        with torch.no_grad():
            net[0].weight *= length / net[0].weight.norm()
        options = {"loss": "cross_entropy", "fisher": "empirical", "damping_scheme": "eigenvalue", "damping": lam}
        taken.append(step(net, "kfac", x, lambda f: F.cross_entropy(f, y), **options))
    far, unit = taken
    theta = far.model.get_parameter("0.weight").detach().flatten()
    moved = theta - rate * far.direction["0.weight"].flatten()
    direction, block, gradient = theta / 3, kron(unit.factors("0")), unit.gradient["0.weight"].flatten()

    def predicted(damping: float) -> Tensor:
        inner = torch.linalg.solve(block + damping * torch.eye(20), gradient)
        return -rate * (inner - direction * (direction @ inner))

    row = decay_table(far.model, rate, (x,))[0]
    assert row.scale_free and row.effective_damping == pytest.approx(9 * lam)
    actual = moved / moved.norm() - direction
    assert relative(actual, predicted(row.effective_damping)) < 1e-4
    assert relative(actual, predicted(lam)) > 0.1


@pytest.mark.parametrize("c", [0.5, 3.0])
def test_scaling_a_normalised_layer(c: float) -> None:
    """BN: theta -> c theta multiplies the curvature by 1/c^2 and the undamped step by c."""
    x, y = torch.randn(60, 4), torch.randint(0, 3, (60,))
    results = []
    for factor in (1.0, c):
        net = batchnorm()
        with torch.no_grad():
            net[0].weight *= factor
        results.append(
            step(net, "kfac", x, lambda f: F.cross_entropy(f, y), loss="cross_entropy", fisher="empirical",
                 damping=1e-13, damping_scheme="eigenvalue")
        )  # fmt: skip
    first, second = results
    blocks = [kron(taken.factors("0")) for taken in results]
    torch.testing.assert_close(blocks[1], blocks[0] / c**2)
    torch.testing.assert_close(second.direction["0.weight"], first.direction["0.weight"] * c, rtol=1e-4, atol=1e-6)


def test_table_tells_scale_free_layers() -> None:
    net, x, y = batchnorm(), torch.randn(60, 4), torch.randint(0, 3, (60,))
    before = net[1].running_mean.clone()
    taken = step(net, "kfac", x, lambda f: F.cross_entropy(f, y), loss="cross_entropy", damping=0.02)
    mean = net[1].running_mean.clone()
    assert not torch.equal(mean, before)
    table = {row.layer: row for row in decay_table(taken.model, 0.5, (x,))}
    assert {name: row.scale_free for name, row in table.items()} == {"0": True, "1": False, "3": False}
    assert torch.equal(net[1].running_mean, mean), "trying it out leaves buffers alone"
    square = float(net[0].weight.detach().square().sum())
    assert table["0"].squared_norm == pytest.approx(square)
    assert table["0"].effective_rate == pytest.approx(0.5 / square)
    assert table["0"].effective_damping == pytest.approx(0.02 * square)
    assert decay_table(taken.model)[0].scale_free is None
    assert not is_scale_free(net, ["3.weight"], (x,))
    with pytest.raises(FxcurvError, match="takes a model made by fxcurv.transform"):
        decay_table(net)  # type: ignore[arg-type]
