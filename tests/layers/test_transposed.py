"""Transposed convolutions: rows against autograd, and factors against the layer's own Jacobian."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev

from tests.layers.check import FRONTENDS, Fn, assert_exact, find, reasons
from tests.methods import oracle

pytestmark = pytest.mark.usefixtures("float64")
CONV = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}

GEOMETRY = {
    "plain": {"kernel_size": 3},
    "1x1": {"kernel_size": 1},
    "strided 1x1": {"kernel_size": 1, "stride": 2},
    "stride": {"kernel_size": 3, "stride": 2},
    "stride equals kernel": {"kernel_size": 2, "stride": 2},
    "stride beyond kernel": {"kernel_size": 2, "stride": 3, "output_padding": 1},
    "padding": {"kernel_size": 3, "padding": 1},
    "padding beyond reach": {"kernel_size": 2, "padding": 2, "stride": 2},
    "output padding": {"kernel_size": 3, "stride": 3, "padding": 1, "output_padding": 2},
    "dilation": {"kernel_size": 3, "dilation": 2, "padding": 1},
    "dilated output padding": {"kernel_size": 2, "dilation": 3, "output_padding": 2},
    "all": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1, "dilation": 2, "groups": 2},
    "groups": {"kernel_size": 2, "groups": 2, "stride": 2},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": 1},
    "no bias": {"kernel_size": 2, "bias": False},
}


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("nd", [1, 2, 3])
@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry(name, nd, frontend):
    options = GEOMETRY[name]
    model = nn.Sequential(CONV[nd](4, 8, **options), nn.Tanh())
    detection = assert_exact(model, torch.randn(2, 4, *(5, 4, 3)[:nd]), frontend=frontend)
    (layer,) = detection.layers
    groups, bias = options.get("groups", 1), options.get("bias", True)
    assert layer.kind == f"conv_transpose{nd}d" and not detection.uncovered
    assert layer.shape == (groups, 8 // groups, 4 // groups * options["kernel_size"] ** nd + bias)


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_sizes_differ_by_axis(frontend):
    options = {"stride": (2, 3), "padding": (1, 0), "output_padding": (0, 2), "dilation": (1, 2), "groups": 2}
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, (3, 2), **options))
    assert assert_exact(model, torch.randn(2, 4, 4, 5), frontend=frontend).layers[0].shape == (2, 3, 13)


@pytest.mark.parametrize("nd", [1, 2, 3])
def test_input_without_batch_axis(nd):
    x = torch.randn(4, *(5, 4, 3)[:nd])
    (layer,) = assert_exact(nn.Sequential(CONV[nd](4, 8, 2, stride=2, groups=2)), x).layers
    assert layer.form.rows_a(x).shape[0] == 1


class Upsampler(nn.Module):
    """The output's size is given, as numbers or as that of another tensor."""

    def __init__(self, given: bool):
        super().__init__()
        self.up, self.given = nn.ConvTranspose2d(3, 4, 3, stride=3, padding=1), given

    def forward(self, x, skip):
        y = self.up(x, output_size=skip.size()[2:] if self.given else [9, 12])
        return torch.relu_(y) + skip


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("given", [True, False])
def test_output_size(given, frontend):
    x, skip = torch.randn(2, 3, 3, 4), torch.randn(2, 4, 9, 12)
    model = Upsampler(given)
    detection = assert_exact(model, x, skip, frontend=frontend)
    assert not detection.uncovered
    (layer,) = detection.layers
    y = model.up(x, output_size=[9, 12])
    kept = layer.form.kept(x, *(y,) * len(layer.uses[0].aux))
    assert all(tensor.untyped_storage().nbytes() == y.element_size() for tensor in kept[1:])


W, B = (4, 6, 3, 3), (6,)
FUNCTIONS = {
    "functional": (lambda m, x: F.conv_transpose2d(x, m.w, m.b, 2, 1, 1), W, B),
    "keywords": (lambda m, x: F.conv_transpose2d(x, m.w, bias=m.b, stride=(2, 1), dilation=2), W, B),
    "separate bias": (lambda m, x: F.conv_transpose2d(x, m.w) + m.b, W, (6, 1, 1)),
    "scaled": (lambda m, x: F.conv_transpose2d(x, m.w * 0.5, m.b), W, B),
    "permuted": (lambda m, x: F.conv_transpose2d(x, m.w.permute(3, 2, 0, 1), m.b), (3, 3, 6, 4), B),
    "grouped": (lambda m, x: F.conv_transpose2d(x, m.w, m.b, groups=2), (4, 3, 3, 3), B),
    "one axis": (lambda m, x: F.conv_transpose1d(x.flatten(2), m.w, m.b), (4, 6, 3), B),
    "aten": (
        lambda m, x: torch.ops.aten.convolution.default(x, m.w, m.b, [2, 2], [1, 1], [1, 1], True, [1, 0], 2),
        (4, 3, 3, 3), B,
    ),
}  # fmt: skip


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name, frontend):
    function, weight, bias = FUNCTIONS[name]
    detection = assert_exact(Fn(function, w=weight, b=bias), torch.randn(2, 4, 3, 2), frontend=frontend)
    assert detection.layers[0].params == ("w", "b") and not detection.uncovered


def test_permuted_groups_are_refused():
    model = Fn(lambda m, x: F.conv_transpose1d(x, m.w.transpose(0, 1), groups=2), w=(3, 4, 2))
    assert "permuted weight" in reasons(find(model, torch.randn(2, 4, 3))[1])["w"]


def test_weight_shared_with_a_convolution_has_two_roles():
    model = Fn(lambda m, x: F.conv_transpose2d(F.conv2d(x, m.w).tanh(), m.w), w=(4, 2, 3, 3))
    assert "two roles" in reasons(find(model, torch.randn(2, 2, 5, 5))[1])["w"]


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("name", ["stride", "all", "output padding", "depthwise", "no bias"])
def test_factors_and_direction(name, frontend):
    """A from the layer's Jacobian, G from the output gradients, and the damped solution of both."""
    conv = nn.ConvTranspose2d(4, 4, **GEOMETRY[name])
    x, y = torch.randn(3, 4, 3, 2), torch.tensor([0, 2, 1])
    net = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(math.prod(conv(x).shape[1:]), 3))
    step = oracle.step(
        net, "kfac", x, lambda out: F.cross_entropy(out, y), loss="cross_entropy", fisher="empirical",
        frontend=frontend, damping_scheme="eigenvalue", damping=0.01, proofs=True,
    )  # fmt: skip
    assert step.model.uncovered == ()
    groups = conv.groups
    width = 4 // groups
    parameters = {key: p.detach() for key, p in conv.named_parameters()}

    def first_outputs(weights):
        return functional_call(conv, weights, (x,)).unflatten(1, (groups, -1))[:, :, 0].flatten(2)

    jacobian = jacrev(first_outputs)(parameters)
    rows = []
    for group in range(groups):
        own = jacobian["weight"].unflatten(3, (groups, -1))[:, group, :, group, :, 0].flatten(2).flatten(0, 1)
        rows.append(own if conv.bias is None else torch.cat([own, torch.ones(len(own), 1)], 1))
    a = torch.stack([r.T @ r / len(r) for r in rows])
    hidden = conv(x).detach().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(net[1:](hidden), y, reduction="sum"), hidden)
    at = grad.unflatten(1, (groups, -1)).flatten(3).permute(1, 0, 3, 2).flatten(1, 2)
    g = at.transpose(1, 2) @ at / len(x)
    torch.testing.assert_close(step.factors("0")["A"].view_as(a), a)
    torch.testing.assert_close(step.factors("0")["G"].view_as(g), g)

    def normal(part):
        weight = part["0.weight"].unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)
        return weight if conv.bias is None else torch.cat([weight, part["0.bias"].view(groups, width, 1)], 2)

    gradient, direction = normal(step.gradient), normal(step.direction)
    for i in range(groups):
        damped = torch.kron(g[i], a[i])
        damped = damped + 0.01 * torch.eye(len(damped))
        torch.testing.assert_close(torch.linalg.solve(damped, gradient[i].flatten()), direction[i].flatten())
