"""Cases in which a Kronecker product is the exact block: deep linear nets, one datum; and where it is not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcurv import losses
from tests.methods.oracle import block_diagonal, example_gradients, ggn, jacobian, kron, relative, step

pytestmark = pytest.mark.usefixtures("float64")


def deep_linear(*widths: int, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(i, o, bias=bias) for i, o in zip(widths, widths[1:], strict=False)))


def gaussian(target: Tensor, divisor: float) -> object:
    return lambda f: (f - target).square().sum() / 2 / divisor


X, Y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
SQUARED = {
    "mse": ("mse", lambda f: F.mse_loss(f, Y)),
    "mse module sum": (nn.MSELoss(reduction="sum"), lambda f: F.mse_loss(f, Y, reduction="sum")),
    "mse batchmean": (None, lambda f: F.mse_loss(f, Y, reduction="sum") / 6),
    "gaussian": ("gaussian", gaussian(Y, 6.0)),
}


@pytest.mark.parametrize("case", SQUARED)
@pytest.mark.parametrize("bias", [True, False])
def test_blocks_of_a_deep_linear_net_are_exact(case: str, bias: bool) -> None:
    loss, user = SQUARED[case]
    loss = losses.MSE(reduction="batchmean") if case == "mse batchmean" else loss
    net = deep_linear(3, 4, 3, 2, bias=bias)
    taken = step(net, "kfac", X, user, loss=loss, fisher="ggn")
    # a summed loss is normalised to the mean over its terms, that is to a hundredth and more of what autograd sees
    divisor = float(Y.numel()) if case == "mse module sum" else 1.0
    for name in ("0", "1", "2"):
        torch.testing.assert_close(kron(taken.factors(name)), ggn(net, name, X, user) / divisor, rtol=1e-10, atol=1e-12)


def test_a_summed_loss_gives_the_direction_of_the_mean_loss() -> None:
    net = deep_linear(3, 4, 2)
    mean = step(net, "kfac", X, lambda f: F.mse_loss(f, Y), loss="mse", fisher="ggn")
    total = step(
        net, "kfac", X, lambda f: F.mse_loss(f, Y, reduction="sum"), loss=nn.MSELoss(reduction="sum"), fisher="ggn"
    )
    for name, direction in mean.direction.items():
        torch.testing.assert_close(total.direction[name], direction)


CLASSES = torch.tensor([2])
PROBABILITIES = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)
BINARY = torch.tensor([[1.0, 0.0, 0.3]], dtype=torch.float64)
SINGLE = {
    "cross_entropy": ("cross_entropy", lambda f: F.cross_entropy(f, CLASSES)),
    "probabilities": ("cross_entropy", lambda f: F.cross_entropy(f, PROBABILITIES)),
    "bce": ("bce", lambda f: F.binary_cross_entropy_with_logits(f, BINARY)),
    "mse": ("mse", lambda f: F.mse_loss(f, BINARY)),
    "gaussian": ("gaussian", gaussian(BINARY, 1.0)),
}


@pytest.mark.parametrize("case", SINGLE)
@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_blocks_of_one_datum_are_exact(case: str, method: str) -> None:
    loss, user = SINGLE[case]
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 3))
    x = torch.randn(1, 4)
    taken = step(net, method, x, user, loss=loss, fisher="ggn")
    for name in ("0", "2", "4"):
        torch.testing.assert_close(kron(taken.factors(name)), ggn(net, name, x, user), rtol=1e-10, atol=1e-12)


def test_the_last_layer_is_exact_where_the_hessian_is_constant() -> None:
    """Rows share one output Hessian and the nonlinearity is below the layer."""
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    user = SQUARED["mse"][1]
    taken = step(net, "kfac", X, user, loss="mse", fisher="ggn")
    torch.testing.assert_close(kron(taken.factors("2")), ggn(net, "2", X, user))
    assert relative(kron(taken.factors("0")), ggn(net, "0", X, user)) > 0.01


@pytest.mark.parametrize("plain", [True, False])
def test_the_empirical_fisher_is_another_matrix(plain: bool) -> None:
    """Not the GGN block; its factors are those of the true gradients of single rows."""
    net = deep_linear(3, 4, 2)
    user = SQUARED["gaussian"][1]
    taken = step(net, "kfac", X, user, loss="gaussian", fisher="empirical", backward={"plain": plain})
    exact = ggn(net, "1", X, user)
    assert relative(kron(taken.factors("1")), exact) > 0.1
    residual = (net(X) - Y).detach()
    torch.testing.assert_close(taken.factors("1")["G"], residual.T @ residual / 6)
    torch.testing.assert_close(taken.factors("0")["G"], (residual @ net[1].weight).T @ (residual @ net[1].weight) / 6)
    rows = torch.cat([X, torch.ones(6, 1)], 1)
    torch.testing.assert_close(taken.factors("0")["A"], rows.T @ rows / 6)
    one = step(net, "kfac", X[:1], lambda f: (f - Y[:1]).square().sum() / 2, loss="gaussian", fisher="empirical")
    g = example_gradients(net, "0", X[:1], lambda f, n: (f - Y[n]).square().sum() / 2)
    torch.testing.assert_close(kron(one.factors("0")), g.T @ g)


def test_without_a_loss_the_fisher_is_empirical_and_counts_rows() -> None:
    net = deep_linear(3, 4, 2)
    taken = step(net, "kfac", X, SQUARED["gaussian"][1])
    residual = (net(X) - Y).detach()
    torch.testing.assert_close(taken.factors("1")["G"], residual.T @ residual / 6)
    assert "empirical" in str(taken.model.report())


def test_summed_empirical_statistics_are_normalised() -> None:
    net = deep_linear(3, 4, 2)
    user = gaussian(Y, 1.0)
    taken = step(net, "kfac", X, user, loss=losses.Gaussian(reduction="sum"), fisher="empirical")
    residual = (net(X) - Y).detach()
    torch.testing.assert_close(taken.factors("1")["G"], residual.T @ residual / 6)


def test_expand_is_exact_for_a_loss_on_every_position() -> None:
    net = deep_linear(3, 4, 2)
    x, y = torch.randn(3, 5, 3), torch.randn(3, 5, 2)
    taken = step(net, "kfac", x, lambda f: F.mse_loss(f, y), loss="mse", fisher="ggn", sharing="expand")
    for name in ("0", "1"):
        torch.testing.assert_close(kron(taken.factors(name)), ggn(net, name, x, lambda f: F.mse_loss(f, y)))


class Pooled(nn.Module):
    """Linear maps on every position and a mean over positions before the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)).mean(1))


def test_reduce_is_exact_after_mean_pooling_where_expand_is_not() -> None:
    net, x, y = Pooled(), torch.randn(4, 5, 3), torch.randn(4, 2)

    def user(f: Tensor) -> Tensor:
        return F.mse_loss(f, y)

    reduced = step(net, "kfac", x, user, loss="mse", fisher="ggn", sharing="reduce")
    expanded = step(net, "kfac", x, user, loss="mse", fisher="ggn", sharing="expand")
    for name in ("first", "second"):
        exact = ggn(net, name, x, user)
        torch.testing.assert_close(kron(reduced.factors(name)), exact)
        assert relative(kron(expanded.factors(name)), exact) > 0.05
    torch.testing.assert_close(kron(reduced.factors("head")), ggn(net, "head", x, user))


class PerPosition(nn.Module):
    """A convolution, then linear maps of channels at every position."""

    def __init__(self, **geometry: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, **geometry)
        self.map = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(self.conv(x))


@pytest.mark.filterwarnings("ignore:fisher='ggn' runs")
@pytest.mark.parametrize(
    "geometry",
    [{}, {"padding": 1}, {"stride": 2, "padding": 1}, {"dilation": 2}, {"bias": False}, {"groups": 2}],
    ids=str,
)
def test_convolution_before_maps_of_single_positions_is_exact(geometry: dict[str, object]) -> None:
    net = PerPosition(**geometry)
    x = torch.randn(2, 2, 6, 5)
    y = torch.randn_like(net(x))
    groups = int(geometry.get("groups", 1))  # type: ignore[call-overload]

    def user(f: Tensor) -> Tensor:
        return F.mse_loss(f, y)

    taken = step(net, "kfac", x, user, loss="mse", fisher="ggn")
    exact = ggn(net, "conv", x, user, groups)
    torch.testing.assert_close(kron(taken.factors("conv")), block_diagonal(exact, groups))
    torch.testing.assert_close(kron(taken.factors("map")), ggn(net, "map", x, user))


@pytest.mark.parametrize("groups", [1, 2])
def test_patch_and_position_grams_against_the_jacobian(groups: int) -> None:
    """A is read off the layer's own Jacobian, G off that of the loss in the layer's output."""
    conv = nn.Conv2d(2, 4, 3, padding=1, stride=2, groups=groups)
    net = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(36, 3))
    x, y = torch.randn(3, 2, 5, 5), torch.tensor([0, 2, 1])

    def user(f: Tensor) -> Tensor:
        return F.cross_entropy(f, y)

    taken = step(net, "kfac", x, user, loss="cross_entropy", fisher="empirical")
    j = jacobian(conv, "", x, groups).reshape(3, groups, 4 // groups, 9, groups, 4 // groups, -1)
    patches = torch.stack([j[:, g, 0, :, g, 0] for g in range(groups)])
    expected = torch.einsum("gnpi,gnpj->gij", patches, patches) / (3 * 9)
    torch.testing.assert_close(taken.factors("0")["A"], expected.squeeze(0))
    assert float(expected[0, -1, -1]) == pytest.approx(1.0)
    middle = conv(x).detach().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(net[1:](middle), y, reduction="sum"), middle)
    rows = g.reshape(3, groups, 4 // groups, 9)
    torch.testing.assert_close(taken.factors("0")["G"], (torch.einsum("ngop,ngqp->goq", rows, rows) / 3).squeeze(0))


def test_convolution_of_one_pixel_is_a_linear_layer() -> None:
    linear = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    conv = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        conv[0].weight.copy_(linear[0].weight[:, :, None, None])
        conv[0].bias.copy_(linear[0].bias)
    conv[3].load_state_dict(linear[2].state_dict())
    user = SQUARED["mse"][1]
    for method in ("kfac", "ekfac", "foof", "diag"):
        options = {} if method == "foof" else {"loss": "mse", "fisher": "mc"}
        a = step(linear, method, X, user, **options)
        b = step(conv, method, X[:, :, None, None], user, **options)
        for part, value in a.factors("0").items():
            torch.testing.assert_close(b.factors("0")[part], value, msg=f"{method} {part}")
        torch.testing.assert_close(b.direction["0.weight"].flatten(1), a.direction["0.weight"])
