"""Block-tridiagonal K-FAC against dense matrices."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcurv
from fxcurv.runtime.module import CurvatureModule
from tests.methods.nets import convnet, mlp
from tests.methods.oracle import as_function, joined, output_hessian, relative, split, step, stored, transform

pytestmark = pytest.mark.usefixtures("float64")
TRI: dict[str, Any] = {"blocks": "tridiagonal", "fisher": "ggn", "loss": "cross_entropy", "damping": 0.01}


def rows(net: nn.Sequential, x: Tensor, columns: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """(a, g) of every linear layer by plain autograd: inputs with a constant last, g for each column below each
    other."""
    inputs, outputs, value = {}, {}, x
    for name, module in net.named_children():
        if isinstance(module, nn.Linear):
            inputs[name] = torch.cat([value, torch.ones(*value.shape[:-1], 1)], -1).detach().flatten(0, -2)
        value = module(value)
        outputs[name] = value
    found = {}
    for name, a in inputs.items():
        g = [
            torch.autograd.grad(value, outputs[name], column, retain_graph=True)[0].flatten(0, -2) for column in columns
        ]
        found[name] = a.repeat(len(columns), 1), torch.cat(g)
    return found


def softmax_columns(outputs: Tensor) -> list[Tensor]:
    """Columns whose outer products sum to the Hessian of summed cross-entropies."""
    p = outputs.detach().softmax(-1)
    return [p[..., c : c + 1].sqrt() * (F.one_hot(torch.tensor(c), p.shape[-1]) - p) for c in range(p.shape[-1])]


def split_damping(a: Tensor, g: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    pi = torch.sqrt(a.trace() / len(a) / (g.trace() / len(g)))
    root = strength**0.5
    return a + pi * root * torch.eye(len(a)), g + root / pi * torch.eye(len(g))


def operator(model: CurvatureModule, names: list[str]) -> Tensor:
    """The matrix from gradients to directions over [W b].flatten() of the layers, by the model's own steps."""
    net = model.strip()
    parameters = dict(net.named_parameters())
    like = {name: [parameters[n] for n in stored(net, name)] for name in names}
    sizes = [joined(like[name]).numel() for name in names]
    columns = []
    for unit in torch.eye(sum(sizes)):
        for name, part in zip(names, unit.split(sizes), strict=True):
            for p, value in zip(like[name], split(part.reshape(joined(like[name]).shape), like[name]), strict=True):
                p.grad = value.clone()
        model.due(statistics=False, refresh=False)
        model.precondition_()
        columns.append(torch.cat([joined([p.grad for p in like[name]]).flatten() for name in names]))
    return torch.stack(columns, 1)


def after_a_step(net: nn.Sequential, x: Tensor, **options: Any) -> CurvatureModule:
    y = torch.randint(0, 2, x.shape[:-1])
    return step(net, "kfac", x, lambda f: F.cross_entropy(f.flatten(0, -2), y.flatten()), **{**TRI, **options}).model


def blocks_of(model: CurvatureModule, names: list[str], strength: float) -> dict[tuple[int, int], Tensor]:
    """kron(G_ij, A_ij) of layers in a row, damped on the diagonal, from the model's factors."""
    factors = [model.factors(name) for name in names]
    found = {}
    for i, own in enumerate(factors):
        a, g = split_damping(own["A"], own["G"], strength)
        found[i, i] = torch.kron(g, a)
        if i + 1 < len(names):
            found[i, i + 1] = torch.kron(own["CG"], own["CA"])
            found[i + 1, i] = found[i, i + 1].T
    return found


def test_moments_of_neighbours_are_those_of_plain_autograd() -> None:
    net, x = mlp(3, 4, 3, 2), torch.randn(9, 3)
    model = after_a_step(net, x)
    expected = rows(net, x, softmax_columns(net(x)))
    for one, other in (("0", "2"), ("2", "4")):
        (a, g), (next_a, next_g) = expected[one], expected[other]
        torch.testing.assert_close(model.factors(one)["CA"], a.T @ next_a / len(a))
        torch.testing.assert_close(model.factors(one)["CG"], g.T @ next_g / 9)
    assert "CA" not in model.factors("4")


def test_neighbouring_blocks_of_a_deep_linear_net_are_exact() -> None:
    net, x, y = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2)), torch.randn(9, 3), torch.randn(9, 2)

    def loss(f: Tensor) -> Tensor:
        return F.mse_loss(f, y)

    model = step(net, "kfac", x, loss, **{**TRI, "loss": "mse"}).model
    jacobians = []
    for name in ("0", "1", "2"):
        call, matrix = as_function(net, name)
        jacobians.append(torch.func.jacrev(lambda m, call=call: call(m, x).reshape(-1))(matrix).reshape(18, -1))
    hessian = output_hessian(net(x), loss)
    for i, name in enumerate(("0", "1")):
        factors = model.factors(name)
        torch.testing.assert_close(
            torch.kron(factors["CG"], factors["CA"]), jacobians[i].T @ hessian @ jacobians[i + 1]
        )


@pytest.mark.parametrize("tokens", [(), (3,)])
def test_the_inverse_is_block_tridiagonal_and_keeps_the_blocks_near_the_diagonal(tokens: tuple[int, ...]) -> None:
    net, names = mlp(3, 4, 3, 3, 2), ["0", "2", "4", "6"]
    model = after_a_step(net, torch.randn(9, *tokens, 3))
    expected = blocks_of(model, names, 0.01)
    inverse = operator(model, names)
    sizes = [len(expected[i, i]) for i in range(4)]
    torch.testing.assert_close(inverse, inverse.T)
    assert torch.linalg.eigvalsh(inverse).min() > 0
    parts = [row.split(sizes, 1) for row in inverse.split(sizes)]
    implied = [row.split(sizes, 1) for row in torch.linalg.inv(inverse).split(sizes)]
    for i in range(4):
        for j in range(4):
            if abs(i - j) > 1:
                assert parts[i][j].abs().max() < 1e-12 * inverse.abs().max()
                assert implied[i][j].norm() > 1e-3 * implied[i][i].norm()  # what the chain makes of the others
            else:
                torch.testing.assert_close(implied[i][j], expected[i, j])
                assert i == j or parts[i][j].norm() > 1e-3 * parts[i][i].norm()


def test_without_correlation_it_is_the_block_diagonal_method() -> None:
    net, x = mlp(3, 4, 3, 2), torch.randn(9, 3)
    model = after_a_step(net, x)
    states = model._engine.states
    for key in ("0.CA", "0.CG", "2.CA", "2.CG"):
        states.values[states.by_key[key]] = torch.zeros_like(states.read(key))
    directions = {}
    for kind, found in (("tridiagonal", model), ("diagonal", after_a_step(net, x, blocks="diagonal"))):
        torch.manual_seed(5)
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        found.due(statistics=False, refresh=True)
        found.precondition_()
        directions[kind] = [p.grad.clone() for p in net.parameters()]
    for one, other in zip(*directions.values(), strict=True):
        torch.testing.assert_close(one, other)


def test_what_is_no_chain_stays_block_diagonal() -> None:
    """Convolutions, a layer whose factor is a diagonal, and one whose output goes elsewhere too."""
    x = torch.randn(6, 2, 5, 5)
    net = nn.Sequential(*convnet(), nn.Tanh(), nn.Linear(3, 3))
    y = torch.randint(0, 3, (6,))

    def taken(**options: Any) -> Any:
        return step(net, "kfac", x, lambda f: F.cross_entropy(f, y), **{**TRI, **options})

    tri, diagonal = taken(), taken(blocks="diagonal")
    for name in ("0", "2"):
        assert "CA" not in tri.factors(name)
        torch.testing.assert_close(tri.pair(name)[1], diagonal.pair(name)[1])
    assert "CA" in tri.factors("5") and relative(tri.pair("5")[1], diagonal.pair("5")[1]) > 1e-3
    narrow, plain = taken(max_factor_dim=4), taken(max_factor_dim=4, blocks="diagonal")
    assert all("CA" not in narrow.factors(layer.name) for layer in narrow.model.layers)
    for name, direction in narrow.direction.items():
        torch.testing.assert_close(direction, plain.direction[name])


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("source", [{"fisher": "mc", "fisher_samples": 3}, {"fisher": "empirical"}])
def test_micro_batches_and_sources(sharing: str, source: dict[str, Any]) -> None:
    net, x, y = mlp(3, 4, 3, 2), torch.randn(8, 5, 3), torch.randint(0, 2, (8, 5))
    model = transform(net, "kfac", x, **{**TRI, **source, "sharing": sharing})
    for part, target in zip(x.split((5, 3)), y.split((5, 3)), strict=True):
        outputs = model(part).flatten(0, 1)
        model.backward(F.cross_entropy(outputs, target.flatten(), reduction="sum") / 40, outputs)
    model.precondition_()
    value = x
    inputs = []
    for module in net:
        if isinstance(module, nn.Linear):
            a = torch.cat([value, torch.ones(8, 5, 1)], -1)
            inputs.append((a.mean(1) if sharing == "reduce" else a.flatten(0, 1)).detach())
        value = module(value)
    torch.testing.assert_close(model.factors("0")["CA"], inputs[0].T @ inputs[1] / len(inputs[0]))
    a, g = (
        torch.cat(
            [
                torch.cat([model.factors("0")[s], model.factors("0")[c]], 1),
                torch.cat([model.factors("0")[c].T, model.factors("2")[s]], 1),
            ]
        )
        for s, c in (("A", "CA"), ("G", "CG"))
    )
    assert torch.linalg.eigvalsh(a).min() > -1e-12 and torch.linalg.eigvalsh(g).min() > -1e-12  # joint second moments
    assert model.factors("0")["CG"].norm() > 1e-3 * model.factors("0")["G"].norm()


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "reference"},
        {"disable": ("batch",)},
        {"disable": ("fuse",)},
        {"disable": ("defer",)},
        {"disable": ("sink",)},
        {"disable": ("share",)},
    ],
)
def test_every_pass_leaves_the_direction(options: dict[str, Any]) -> None:
    net = mlp(3, 4, 4, 4, 4, 4, 2)
    x, y = torch.randn(7, 3), torch.randint(0, 2, (7,))
    one, other = (step(net, "kfac", x, lambda f: F.cross_entropy(f, y), **TRI, **o) for o in ({}, options))
    for name, direction in one.direction.items():
        torch.testing.assert_close(direction, other.direction[name])


def test_a_run_resumes_bit_for_bit_and_descends() -> None:
    x, y = torch.randn(40, 3), torch.randint(0, 2, (40,))

    def train(model: CurvatureModule, opt: torch.optim.Optimizer, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            opt.zero_grad()
            outputs = model(x)
            losses.append(F.cross_entropy(outputs, y))
            model.backward(losses[-1], outputs)
            opt.step()
        return [float(loss.detach()) for loss in losses]

    def fresh() -> tuple[CurvatureModule, Any]:
        torch.manual_seed(3)
        model = fxcurv.transform(mlp(3, 6, 6, 2), "kfac", loss="cross_entropy", blocks="tridiagonal", solve_every=3)
        return model, fxcurv.optimizer(model, lr=0.3)

    model, opt = fresh()
    losses = train(model, opt, 4)
    saved = copy.deepcopy((dict(model.state_dict()), opt.state_dict()))
    again, other = fresh()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert train(model, opt, 5) == train(again, other, 5)
    assert train(model, opt, 30)[-1] < 0.9 * losses[0]


def test_a_bad_gradient_of_one_layer_falls_back_where_it_is_felt() -> None:
    net, x = mlp(3, 4, 3, 3, 2), torch.randn(9, 3)
    model = after_a_step(net, x)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    net[6].weight.grad[0, 0] = float("nan")
    before = {n: p.grad.clone() for n, p in net.named_parameters()}
    model.due(statistics=False, refresh=False)
    with pytest.warns(fxcurv.FxcurvWarning, match="keep their plain gradient"):
        info = model.precondition_()
    assert info.fallback == ("4", "6")
    assert torch.equal(net[4].weight.grad, before["4.weight"])
    assert torch.isfinite(net[0].weight.grad).all() and not torch.equal(net[0].weight.grad, before["0.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": "full"}, "blocks='full' is unknown; choose one of diagonal, tridiagonal"),
        ({"damping_scheme": "eigenvalue"}, "damping_scheme='eigenvalue' has no place.*pi, sqrt"),
    ],
)
def test_what_it_does_not_go_with(options: dict[str, str], message: str) -> None:
    with pytest.raises(fxcurv.FxcurvError, match=message):
        fxcurv.transform(mlp(3, 4, 2), "kfac", **{**TRI, **options})
