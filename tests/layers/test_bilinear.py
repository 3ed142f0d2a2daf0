"""Bilinear layers: rows against autograd, and the factor of the outer products against an explicit sum."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxcurv
from tests.layers.check import FRONTENDS, Fn, assert_exact, find, reasons

pytestmark = pytest.mark.usefixtures("float64")


class Net(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.pair, self.head = nn.Bilinear(3, 2, 4, bias=bias), nn.Linear(4, 3)

    def forward(self, x, z):
        return self.head(torch.tanh(self.pair(x, z)))


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(5,), (5, 2), (5, 2, 2)])
def test_module(lead, bias, frontend):
    detection = assert_exact(Net(bias), torch.randn(*lead, 3), torch.randn(*lead, 2), frontend=frontend)
    layer = detection.layers[0]
    assert (layer.kind, layer.shape) == ("bilinear", (1, 4, 6 + bias)) and not detection.uncovered
    assert layer.form.rows_a(torch.randn(*lead, 3), torch.randn(*lead, 2)).shape[0] == 5


def test_vectors():
    (layer, _) = assert_exact(Net(), torch.randn(3), torch.randn(2)).layers
    assert layer.form.rows_a(torch.randn(3), torch.randn(2)).shape == (1, 1, 1, 7)


FUNCTIONS = {
    "functional": (lambda m, x: F.bilinear(x, x.tanh(), m.w, m.b), (4, 3, 3), (4,)),
    "separate bias": (lambda m, x: F.bilinear(x, x.tanh(), m.w) + m.b, (4, 3, 3), (4,)),
    "transposed": (lambda m, x: F.bilinear(x, x[:, :2], 2 * m.w.permute(2, 0, 1), m.b), (3, 2, 4), (4,)),
}


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name, frontend):
    function, weight, bias = FUNCTIONS[name]
    detection = assert_exact(Fn(function, w=weight, b=bias), torch.randn(5, 3), frontend=frontend)
    assert detection.layers[0].params == ("w", "b") and not detection.uncovered


def test_second_operand_that_is_a_parameter():
    model = Fn(lambda m, x: F.bilinear(x, m.v, m.w), v=(5, 2), w=(4, 3, 2))
    why = reasons(find(model, torch.randn(5, 3))[1])
    assert "another parameter" in why["w"] and "another parameter" in why["v"]


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_factors_and_direction(frontend):
    net, x, z, y = Net(), torch.randn(6, 3), torch.randn(6, 2), torch.randint(0, 3, (6,))
    model = fxcurv.transform(
        net, "kfac", example_inputs=(x, z), loss="cross_entropy", fisher="empirical", frontend=frontend, ema=0.0,
        kl_clip=None, damping=0.1, damping_scheme="eigenvalue", solve_every=1,
    )  # fmt: skip
    assert model.uncovered == ()
    out = model(x, z)
    model.backward(F.cross_entropy(out, y), out)
    gradient = torch.cat([net.pair.weight.grad.flatten(1), net.pair.bias.grad[:, None]], 1)
    model.precondition_()
    rows = torch.cat([torch.einsum("ni,nj->nij", x, z).flatten(1), torch.ones(6, 1)], 1)
    hidden = net.pair(x, z).detach().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(net.head(hidden.tanh()), y, reduction="sum"), hidden)
    a, g = rows.T @ rows / 6, g.T @ g / 6
    torch.testing.assert_close(model.factors("pair")["A"], a)
    torch.testing.assert_close(model.factors("pair")["G"], g)
    solved = torch.linalg.solve(torch.kron(g, a) + 0.1 * torch.eye(28), gradient.flatten()).view(4, 7)
    torch.testing.assert_close(net.pair.weight.grad.flatten(1), solved[:, :-1])
    torch.testing.assert_close(net.pair.bias.grad, solved[:, -1])


def test_wide_outer_product_has_a_diagonal_factor():
    net, x, z = Net(), torch.randn(6, 3), torch.randn(6, 2)
    model = fxcurv.transform(net, "kfac", example_inputs=(x, z), max_factor_dim=5)
    row = next(row for row in model.report().rows if row.parameter == "pair.weight")
    assert "input factor diagonal" in row.reason
