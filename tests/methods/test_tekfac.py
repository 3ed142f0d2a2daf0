"""TEKFAC: EKFAC's diagonal in TKFAC's basis, against explicit per-example gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import FxcurvError
from fxcurv.methods.parts.estimate import Kron
from fxcurv.methods.parts.traces import Traces
from fxcurv.runtime.module import CurvatureModule
from tests.methods.nets import convnet, mlp
from tests.methods.oracle import accumulate, block_diagonal, corrected, kron, transform
from tests.methods.test_ekfac import KINDS, Case, backward, case, measured

pytestmark = pytest.mark.usefixtures("float64")


def twice(c: Case, method: str = "tekfac", **options: Any) -> CurvatureModule:
    """The method after a refresh and one more step on the same batch in the refreshed basis."""
    options = {"loss": "cross_entropy", "fisher": "empirical", **options}
    model = transform(c.net, method, c.x, **options)
    for refresh in (True, False):
        model.due(refresh=refresh)
        backward(model, c)
        model.precondition_()
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_never_farther_from_the_fisher_than_tkfac_and_of_its_trace(kind: str, seed: int) -> None:
    c = case(kind, seed)
    model, fisher = twice(c), c.fisher()
    block, factors = corrected(model.factors(c.name)), model.factors(c.name)
    delta = factors["A"].diagonal(dim1=-2, dim2=-1).sum(-1)
    tkfac = kron({"A": factors["A"], "G": factors["G"] / delta[..., None, None]})
    assert (fisher - block).norm() < (fisher - tkfac).norm() * (1 - 1e-6)
    torch.testing.assert_close(block.trace(), fisher.trace())
    own = model.block(c.name)
    torch.testing.assert_close(block, own if own.ndim == 2 else torch.block_diag(*own))


@pytest.mark.parametrize("kind", KINDS)
def test_basis_is_that_of_the_partial_traces(kind: str) -> None:
    """And not of EKFAC's factors: Q^T N Q is diagonal."""
    c = case(kind)
    factors = twice(c).factors(c.name)
    for side in "AG":
        turned = factors[f"Q{side}"].mT @ factors[side] @ factors[f"Q{side}"]
        torch.testing.assert_close(turned, torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1)))
    plain = measured(c).factors(c.name)
    turned = factors["QA"].mT @ plain["A"] @ factors["QA"]
    assert (turned - torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1))).norm() > 1e-3 * turned.norm()


def test_on_the_factors_of_kfac_it_is_ekfac(monkeypatch: pytest.MonkeyPatch) -> None:
    c = case("strided conv")
    ekfac = twice(c, "ekfac", damping=0.02)
    expected = {name: p.grad.clone() for name, p in ekfac.named_parameters()}
    monkeypatch.setattr(Traces, "measure", lambda self, *rest: Kron().measure(*rest))
    monkeypatch.setattr(Traces, "scale", lambda self, *rest: None)
    tekfac = twice(c, "tekfac", damping=0.02, conv_damping="fixed")
    for name, direction in expected.items():
        torch.testing.assert_close(tekfac.get_parameter(name).grad, direction)


def test_a_refresh_restarts_from_products_with_the_trace_of_the_block() -> None:
    c = case("conv")
    model = transform(c.net, "tekfac", c.x, loss="cross_entropy", fisher="empirical")
    backward(model, c)
    model.precondition_()
    factors = model.factors(c.name)
    values = [torch.linalg.eigvalsh(factors[side]) for side in "GA"]
    torch.testing.assert_close(factors["S"], torch.outer(*values) / factors["A"].trace())
    torch.testing.assert_close(factors["S"].sum(), factors["A"].trace())


def solved(model: CurvatureModule, c: Case, gradient: Tensor, strength: Tensor) -> Tensor:
    """Dense solve with the corrected blocks of a layer; strength: lambda of each group."""
    matrix = corrected(model.factors(c.name))
    added = strength.repeat_interleave(len(matrix) // c.groups)
    return torch.linalg.solve(matrix + torch.diag(added), gradient)


def joined(model: CurvatureModule, c: Case) -> Tensor:
    weight, bias = (model.get_parameter(f"{c.name}.{part}").grad.clone() for part in ("weight", "bias"))
    return torch.cat([weight.reshape(c.groups, len(bias) // c.groups, -1), bias.reshape(c.groups, -1, 1)], 2).flatten()


@pytest.mark.parametrize("floor", [1e-9, 50.0])
@pytest.mark.parametrize("groups", [1, 2])
def test_damping_of_convolutions_is_the_mean_of_theta_and_dense_layers_keep_pace(groups: int, floor: float) -> None:
    """In every step, whether the basis is renewed in it or not."""
    torch.manual_seed(0)
    net, x, y = convnet(groups), torch.randn(4, 2, 5, 5), torch.randint(0, 3, (4,))
    cases = [Case(net, x, y, "0", groups), Case(net, x, y, "2"), Case(net, x, y, "5")]
    model = transform(
        net, "tekfac", x, loss="cross_entropy", fisher="empirical", damping=0.05, ema=0.5, trace_floor=floor
    )
    for refresh in (True, False, False):
        model.due(refresh=refresh)
        backward(model, cases[0])
        gradients = [joined(model, c) for c in cases]
        model.precondition_()
        strengths = []
        for c in cases[:2]:
            theta = model.factors(c.name)["S"].reshape(c.groups, -1)
            strengths.append(theta.sum(1).clamp(min=floor) / theta.shape[1])
        strengths.append(0.05 * torch.cat(strengths).max()[None])
        for c, gradient, strength in zip(cases, gradients, strengths, strict=True):
            torch.testing.assert_close(joined(model, c), solved(model, c, gradient, strength))


def test_without_convolutions_the_damping_is_fixed() -> None:
    c = case("linear")
    model = transform(c.net, "tekfac", c.x, loss="cross_entropy", fisher="empirical", damping=0.05)
    backward(model, c)
    gradient = joined(model, c)
    model.precondition_()
    torch.testing.assert_close(joined(model, c), solved(model, c, gradient, torch.tensor([0.05])))


@pytest.mark.parametrize("spectrum", [None, 0.3])
def test_theta_has_an_average_of_its_own(spectrum: float | None) -> None:
    torch.manual_seed(0)
    net = mlp(3, 4, 3)
    cases = [Case(net, torch.randn(6, 3), torch.randint(0, 3, (6,)), "0") for _ in range(4)]
    model = transform(
        net, "tekfac", cases[0].x, loss="cross_entropy", fisher="empirical", ema=0.6, ema_spectrum=spectrum,
        solve_every=10,
    )  # fmt: skip
    theta = None
    for k, c in enumerate(cases):
        accumulate(model, [(c.x, c.loss, {})])
        factors = model.factors("0")
        basis = torch.kron(factors["QG"], factors["QA"])
        old = min(k / (k + 1), 0.6 if spectrum is None else spectrum)
        theta = (
            factors["S"].flatten()
            if theta is None
            else old * theta + (1 - old) * (basis.T @ c.fisher() @ basis).diagonal()
        )
        torch.testing.assert_close(factors["S"].flatten(), theta)


@pytest.mark.parametrize("basis", ["eigh", "qr"])
@pytest.mark.parametrize("off", ["sink", "batch", "fuse", "defer", "reference"])
def test_passes_change_nothing(off: str, basis: str) -> None:
    c = case("grouped conv")
    options: dict[str, Any] = {"backend": "reference"} if off == "reference" else {"disable": (off,)}
    plain, switched = (twice(c, basis=basis, **more) for more in ({}, options))
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(switched.get_parameter(name).grad, parameter.grad)


def test_strong_fixed_damping_gives_the_gradient() -> None:
    c = case("conv")
    model = transform(c.net, "tekfac", c.x, loss="cross_entropy", fisher="empirical", damping=1e9, conv_damping="fixed")
    backward(model, c)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.precondition_()
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad * 1e9, gradient, rtol=1e-6, atol=1e-9)


def test_theta_of_groups_is_measured_in_their_own_basis() -> None:
    c = case("grouped conv")
    factors, fisher = twice(c).factors(c.name), block_diagonal(c.fisher(), 2)
    basis = torch.block_diag(*(torch.kron(g, a) for g, a in zip(factors["QG"], factors["QA"], strict=True)))
    torch.testing.assert_close(factors["S"].flatten(), (basis.T @ fisher @ basis).diagonal())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("damping_scheme", "sqrt", "choose one of eigenvalue, floor, relative, mask"),
        ("conv_damping", "pi", "choose one of trace, fixed"),
        ("ema_spectrum", "much", "must be a number"),
        ("ema_spectrum", 1.5, "at most 1"),
        ("basis", "svd", "choose one of eigh, qr"),
    ],
)
def test_bad_options_are_refused(option: str, value: object, message: str) -> None:
    with pytest.raises(FxcurvError, match=message):
        fxcurv.transform(nn.Sequential(nn.Linear(2, 2)), "tekfac", loss="mse", **{option: value})
