"""EKFAC against the explicit Fisher of single examples."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcurv.runtime.module import CurvatureModule
from tests.methods.nets import Attention, convnet, mlp
from tests.methods.oracle import accumulate, block_diagonal, corrected, example_gradients, ggn, kron, step, transform

pytestmark = pytest.mark.usefixtures("float64")


@dataclass
class Case:
    """A network, a batch with class targets, and a layer with its groups."""

    net: nn.Module
    x: Tensor
    y: Tensor
    name: str
    groups: int = 1

    def loss(self, f: Tensor) -> Tensor:
        return F.cross_entropy(f, self.y)

    def fisher(self) -> Tensor:
        """Empirical Fisher of the mean loss, groups uncoupled: examples' summed gradients, divided by all terms."""
        rows = example_gradients(
            self.net,
            self.name,
            self.x,
            lambda f, n: F.cross_entropy(f, self.y[n : n + 1], reduction="sum"),
            self.groups,
        )
        return block_diagonal(rows.T @ rows / self.y.numel(), self.groups)


def case(kind: str, seed: int = 0) -> Case:
    torch.manual_seed(seed)
    if kind == "linear":
        return Case(mlp(4, 5, 3), torch.randn(7, 4), torch.randint(0, 3, (7,)), "0")
    if kind == "conv":
        return Case(convnet(), torch.randn(4, 2, 5, 5), torch.randint(0, 3, (4,)), "0")
    if kind == "strided conv":
        return Case(convnet(), torch.randn(4, 2, 5, 5), torch.randint(0, 3, (4,)), "2")
    if kind == "grouped conv":
        return Case(convnet(groups=2), torch.randn(4, 2, 5, 5), torch.randint(0, 3, (4,)), "0", 2)
    return Case(Attention(), torch.randn(5, 4, 3), torch.randint(0, 3, (5, 4)), "k")


KINDS = ("linear", "conv", "strided conv", "grouped conv", "tokens")


def backward(model: CurvatureModule, c: Case) -> None:
    model.zero_grad()
    outputs = model(c.x)
    model.backward(c.loss(outputs), outputs)


def measured(c: Case, **options: object) -> CurvatureModule:
    """EKFAC after a refresh and one more step on the same batch in the refreshed basis."""
    model = transform(c.net, "ekfac", c.x, loss="cross_entropy", **{"fisher": "empirical", **options})
    backward(model, c)
    model.precondition_()
    model.due(refresh=False)
    backward(model, c)
    model.precondition_()
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_second_moment_is_the_diagonal_of_the_projected_fisher(kind: str) -> None:
    c = case(kind)
    factors = measured(c).factors(c.name)
    fisher = c.fisher().reshape(c.groups, -1, c.groups, len(factors["S"].flatten()) // c.groups)
    for group in range(c.groups):
        part = {k: v[group] if c.groups > 1 else v for k, v in factors.items()}
        basis = torch.kron(part["QG"], part["QA"])
        torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis)))
        expected = (basis.T @ fisher[group, :, group] @ basis).diagonal()
        torch.testing.assert_close(part["S"].flatten(), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_never_farther_from_the_fisher_than_kfac(kind: str, seed: int) -> None:
    c = case(kind, seed)
    factors, fisher = measured(c).factors(c.name), c.fisher()
    error, kfac = (fisher - corrected(factors)).norm(), (fisher - kron(factors)).norm()
    assert error < kfac * (1 - 1e-6)
    torch.testing.assert_close(corrected(factors).trace(), fisher.trace())
    assert abs(float(kron(factors).trace() / fisher.trace()) - 1) > 1e-6


@pytest.mark.parametrize("kind", ["linear", "tokens"])
def test_trace_equals_that_of_the_exact_gauss_newton_block(kind: str) -> None:
    c = case(kind)
    factors = measured(c, fisher="ggn").factors(c.name)
    exact = ggn(c.net, c.name, c.x, c.loss)
    torch.testing.assert_close(corrected(factors).trace(), exact.trace())
    assert (exact - corrected(factors)).norm() < (exact - kron(factors)).norm()


def test_one_datum_is_exact_in_the_measured_basis() -> None:
    torch.manual_seed(1)
    c = Case(mlp(4, 5, 3), torch.randn(1, 4), torch.randint(0, 3, (1,)), "0")
    torch.testing.assert_close(corrected(measured(c, fisher="ggn").factors("0")), ggn(c.net, "0", c.x, c.loss))


@pytest.mark.parametrize("kind", KINDS)
def test_direction_solves_with_the_corrected_matrix(kind: str) -> None:
    c = case(kind)
    model = transform(c.net, "ekfac", c.x, loss="cross_entropy", fisher="empirical", damping=0.02)
    for refresh in (True, False):
        model.due(refresh=refresh)
        backward(model, c)
        names = [f"{c.name}.weight", f"{c.name}.bias"]
        gradient = _joined(model, names, c.groups)
        model.precondition_()
        matrix = corrected(model.factors(c.name))
        expected = torch.linalg.solve(matrix + 0.02 * torch.eye(len(matrix)), gradient.flatten())
        torch.testing.assert_close(_joined(model, names, c.groups).flatten(), expected)


def test_strong_damping_gives_the_gradient() -> None:
    c = case("conv")
    taken = step(c.net, "ekfac", c.x, c.loss, loss="cross_entropy", fisher="empirical", damping=1e9)
    for name, gradient in taken.gradient.items():
        torch.testing.assert_close(taken.direction[name] * 1e9, gradient, rtol=1e-6, atol=1e-9)


def test_second_moment_restarts_from_the_products_and_then_averages() -> None:
    """A refresh leaves eigenvalue products as one update; later batches enter with weight max(1/k, 1 - ema)."""
    torch.manual_seed(0)
    net = mlp(3, 4, 3)
    batches = [Case(net, torch.randn(6, 3), torch.randint(0, 3, (6,)), "0") for _ in range(4)]
    model = transform(net, "ekfac", batches[0].x, loss="cross_entropy", fisher="empirical", ema=0.6, solve_every=10)
    expected = None
    for k, c in enumerate(batches):
        backward(model, c)
        model.precondition_()
        factors = model.factors("0")
        basis = torch.kron(factors["QG"], factors["QA"])
        if expected is None:
            expected = (basis.T @ kron(factors) @ basis).diagonal()
        else:
            old = min(k / (k + 1), 0.6)
            expected = old * expected + (1 - old) * (basis.T @ c.fisher() @ basis).diagonal()
        torch.testing.assert_close(factors["S"].flatten(), expected)


def _joined(model: CurvatureModule, names: list[str], groups: int) -> Tensor:
    weight, bias = (model.get_parameter(name).grad.clone() for name in names)
    return torch.cat([weight.reshape(groups, len(bias) // groups, -1), bias.reshape(groups, -1, 1)], 2)


@pytest.mark.parametrize("kind", ["linear", "strided conv"])
@pytest.mark.parametrize("factor_every", [1, 3])
def test_running_spectrum_follows_the_mean_gradient(kind: str, factor_every: int) -> None:
    """EKFAC-ra: S <- ema S + (1 - ema) N (Q_G^T V Q_A)^2 in every step between refreshes, statistics or not."""
    c = case(kind)
    options = {"fisher": "empirical", "ema": 0.7, "damping": 0.1, "solve_every": 3, "factor_every": factor_every}
    model = transform(c.net, "ekfac", c.x, loss="cross_entropy", spectrum="gradient", **options)
    spectrum = None
    for k in range(5):
        taken = accumulate(model, [(c.x + 0.1 * k, c.loss, {})])
        (gradient,), (direction,) = taken.pair(c.name)
        found = model.factors(c.name)
        turned = found["QG"].T @ gradient @ found["QA"]
        if k % 3 == 0:
            values = [torch.diagonal(found[f"Q{s}"].T @ found[s] @ found[f"Q{s}"]) for s in "GA"]
            spectrum = torch.outer(*values)
        else:
            assert spectrum is not None
            spectrum = 0.7 * spectrum + 0.3 * len(c.y) * turned**2
        torch.testing.assert_close(found["S"], spectrum, rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(direction, found["QG"] @ (turned / (spectrum + 0.1)) @ found["QA"].T)
