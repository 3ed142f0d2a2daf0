"""FOOF's identities, and the diagonal Fisher against dense per-example gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcurv.errors import FxcurvError
from fxcurv.methods import foof as foof_method
from fxcurv.methods import kfac
from fxcurv.methods.method import Method
from tests.methods.nets import Attention, convnet, mlp
from tests.methods.oracle import block_diagonal, example_gradients, ggn, step, transform

pytestmark = pytest.mark.usefixtures("float64")


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(*x.shape[:-1], 1)], -1)


def test_foof_is_kfac_with_an_identity_for_the_output_factor() -> None:
    """Check (1): G := I, pi = 1 and all damping on A."""
    net, x, y = mlp(3, 4, 2), torch.randn(6, 3), torch.randn(6, 2)
    foof = step(net, "foof", x, lambda f: F.mse_loss(f, y), damping=0.2)
    full = step(net, "kfac", x, lambda f: F.mse_loss(f, y), loss="mse", fisher="ggn", damping=0.2)
    for name in ("0", "2"):
        a = full.factors(name)["A"]
        assert set(foof.factors(name)) == {"A"}
        torch.testing.assert_close(foof.factors(name)["A"], a)
        gradient, direction = foof.pair(name)
        matrix = torch.kron(torch.eye(gradient.shape[1]), a + 0.2 * torch.eye(len(a)))
        torch.testing.assert_close(direction.flatten(), torch.linalg.solve(matrix, gradient.flatten()))


def test_foof_minimises_the_change_of_every_neuron() -> None:
    """Check (2): stationary in sum_i |dW a_i + eta g_i|^2 + lambda' |dW|^2, with lambda' = n lambda, dW = -eta U."""
    net, x, y = mlp(3, 4, 2), torch.randn(6, 3), torch.randn(6, 2)
    taken = step(net, "foof", x, lambda f: (f - y).square().sum() / 2 / 6, damping=0.2)
    rows = {"0": with_ones(x), "2": with_ones(net[1](net[0](x)).detach())}
    residual = (net(x) - y).detach()
    back = (residual @ net[2].weight.detach()) * (1 - net[1](net[0](x)).detach().square())
    for name, g in (("0", back), ("2", residual)):
        change = (-0.7 * taken.pair(name)[1].squeeze(0)).requires_grad_()
        objective = (rows[name] @ change.T + 0.7 * g).square().sum() + 6 * 0.2 * change.square().sum()
        (slope,) = torch.autograd.grad(objective, change)
        torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-10, rtol=0)
        assert objective > 1e-3


def test_foof_solves_least_squares_in_one_step() -> None:
    """Check (4): a linear layer, square loss of one half, damping towards 0, learning rate 1."""
    net, x, y = nn.Sequential(nn.Linear(3, 2)), torch.randn(9, 3), torch.randn(9, 2)
    taken = step(net, "foof", x, lambda f: (f - y).square().sum() / 2 / 9, damping=1e-12)
    weight = torch.cat([net[0].weight, net[0].bias[:, None]], 1).detach() - taken.pair("0")[1].squeeze(0)
    torch.testing.assert_close(weight.T, torch.linalg.lstsq(with_ones(x), y).solution, rtol=1e-6, atol=1e-8)


def test_foof_reads_patches_with_their_padding() -> None:
    net, x, y = convnet(groups=2), torch.randn(3, 2, 5, 5), torch.randint(0, 3, (3,))
    taken = step(net, "foof", x, lambda f: F.cross_entropy(f, y), damping=0.1)
    for group in range(2):
        patches = F.unfold(x[:, group : group + 1], 3, padding=1).transpose(1, 2)
        rows = with_ones(patches).flatten(0, 1)
        torch.testing.assert_close(taken.factors("0")["A"][group], rows.T @ rows / len(rows))


NETS = {
    "linear": lambda: (mlp(4, 5, 3), torch.randn(6, 4), torch.randint(0, 3, (6,)), {"0": 1, "2": 1}),
    "conv": lambda: (convnet(2), torch.randn(4, 2, 5, 5), torch.randint(0, 3, (4,)), {"0": 2, "2": 1, "5": 1}),
    "tokens": lambda: (Attention(), torch.randn(3, 4, 3), torch.randint(0, 3, (3, 4)), {"q": 1, "v": 1, "head": 1}),
    "norm": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Flatten(), nn.Linear(8, 3)),
        torch.randn(5, 2, 3), torch.randint(0, 3, (5,)), {"0": 1, "1": 4, "3": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("fisher", ["empirical", "ggn"])
def test_diag_is_the_diagonal_of_the_dense_fisher(kind: str, fisher: str) -> None:
    """Positions of one example are summed before the square."""
    net, x, y, names = NETS[kind]()

    def user(f: Tensor) -> Tensor:
        return F.cross_entropy(f, y)

    taken = step(net, "diag", x, user, loss="cross_entropy", fisher=fisher, damping=0.01)
    for name, groups in names.items():
        if fisher == "ggn":
            dense = block_diagonal(ggn(net, name, x, user, groups), groups)
        else:
            rows = example_gradients(
                net, name, x, lambda f, n: F.cross_entropy(f, y[n : n + 1], reduction="sum"), groups
            )
            dense = rows.T @ rows / y.numel()
        measured = taken.factors(name)["D"]
        torch.testing.assert_close(measured.flatten(), dense.diagonal())
        gradient, direction = taken.pair(name, groups)
        torch.testing.assert_close(direction.flatten(), gradient.flatten() / (dense.diagonal() + 0.01))


@pytest.mark.parametrize("method", ["kfac", "foof", "diag"])
def test_factors_average_with_the_warm_started_weight(method: str) -> None:
    """The k-th batch enters with weight max(1/k, 1 - ema)."""
    net = mlp(3, 4, 2)
    batches = [(torch.randn(5, 3), torch.randn(5, 2)) for _ in range(5)]
    options = {} if method == "foof" else {"loss": "mse", "fisher": "ggn"}
    model = transform(net, method, batches[0][0], ema=0.7, **options)
    expected: dict[str, Tensor] = {}
    for k, (x, y) in enumerate(batches):
        single = step(net, method, x, lambda f, y=y: F.mse_loss(f, y), **options)
        old = min(k / (k + 1), 0.7)
        expected = {p: v * (1 - old) + old * expected.get(p, 0.0) for p, v in single.factors("0").items()}
        model.zero_grad()
        outputs = model(x)
        loss = F.mse_loss(outputs, y)
        loss.backward() if method == "foof" else model.backward(loss, outputs)
        model.precondition_()
        for part, value in expected.items():
            torch.testing.assert_close(model.factors("0")[part], value)


@pytest.mark.parametrize("side, limit", [("A", 4), ("G", 3)])
def test_wide_factors_are_kept_diagonal(side: str, limit: int) -> None:
    net, x, y = nn.Sequential(nn.Linear(4, 3) if side == "A" else nn.Linear(2, 4)), None, None
    inputs = net[0].in_features
    x, y = torch.randn(6, inputs), torch.randn(6, net[0].out_features)

    def user(f: Tensor) -> Tensor:
        return F.mse_loss(f, y)

    full = step(net, "kfac", x, user, loss="mse", fisher="empirical", damping=0.1)
    short = step(net, "kfac", x, user, loss="mse", fisher="empirical", damping=0.1, max_factor_dim=limit)
    other = "G" if side == "A" else "A"
    torch.testing.assert_close(short.factors("0")[other], full.factors("0")[other])
    value = short.factors("0")[side]
    torch.testing.assert_close(value if value.ndim == 1 else value.diagonal(), full.factors("0")[side].diagonal())
    a, g = (short.factors("0")[k] for k in "AG")
    a, g = (m if m.ndim == 2 else torch.diag(m) for m in (a, g))
    pi = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
    matrix = torch.kron(g + 0.1**0.5 / pi * torch.eye(len(g)), a + 0.1**0.5 * pi * torch.eye(len(a)))
    gradient, direction = short.pair("0")
    torch.testing.assert_close(direction.flatten(), torch.linalg.solve(matrix, gradient.flatten()))


def test_a_published_method_is_made_of_parts() -> None:
    assert isinstance(kfac(damping=0.1), Method)
    assert kfac(damping=0.1).hyper["damping"] == 0.1


def test_bursts_average_the_batches_up_to_a_factorisation() -> None:
    """The amortised variant: batches between bursts are never measured, and the plain module runs for them."""
    torch.manual_seed(0)
    net, batches = mlp(3, 4, 2), [(torch.randn(6, 3) + k, torch.randn(6, 2)) for k in range(9)]
    model = transform(net, "foof", batches[0][0], loss="mse", burst=2, solve_every=4, ema=0.5)
    moments = [with_ones(x).T @ with_ones(x) / 6 for x, _ in batches]
    expected, seen = torch.zeros(4, 4), []
    for k, (x, y) in enumerate(batches):
        out = model(x)
        loss = F.mse_loss(out, y)
        model.backward(loss, out)
        before = model.factors("0")["A"].clone()
        info = model.precondition_()
        assert info.statistics == (k in (0, 3, 4, 7, 8)) and info.refresh == (k % 4 == 0)
        if info.statistics:
            old = 0.5 if seen else 0.0
            expected = old * expected + (1 - old) * moments[k]
            seen.append(k)
            torch.testing.assert_close(model.factors("0")["A"], expected)
        else:
            assert torch.equal(model.factors("0")["A"], before)
    assert model.block("0").shape == (16, 16)
    torch.testing.assert_close(model.block("0"), torch.kron(torch.eye(4), model.factors("0")["A"]))


@pytest.mark.parametrize(
    "hyper, words",
    [({"burst": 5, "solve_every": 4}, "at most solve_every=4"), ({"burst": 2, "factor_every": 2}, "factor_every=1")],
)
def test_bursts_fit_between_factorisations(hyper: dict[str, int], words: str) -> None:
    with pytest.raises(FxcurvError, match=words):
        foof_method(**hyper)
