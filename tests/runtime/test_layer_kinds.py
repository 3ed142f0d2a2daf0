"""Every kind of layer from the model to the step, under both front-ends, against Jacobians of the layer itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import fxcurv
from tests.methods import oracle

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore:fisher='ggn' runs")]

FRONTENDS = ("symbolic", "export")
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride": {"stride": 2, "padding": 1},
    "dilation": {"dilation": 2, "padding": 2},
    "same": {"padding": "same", "kernel_size": 4},
    "valid": {"padding": "valid"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate", "stride": 2},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "groups": {"groups": 2, "padding": 1, "padding_mode": "circular"},
    "depthwise": {"groups": 4, "padding": 1, "bias": False},
}
DAMPING = 1e-2


def patches(conv: nn.Module, x: Tensor) -> Tensor:
    """Rows that the weights of every group meet, (groups, batch * positions, d_in): the layer's own Jacobian."""
    parameters = {name: p.detach() for name, p in conv.named_parameters()}

    def first_outputs(weights: dict[str, Tensor]) -> Tensor:
        y = functional_call(conv, weights, (x,))
        return y.unflatten(1, (conv.groups, -1))[:, :, 0].flatten(2)  # batch, group, position

    jacobian = jacrev(first_outputs)(parameters)
    width = conv.out_channels // conv.groups
    rows = [jacobian["weight"].flatten(4).flatten(3, 3)[:, g, :, g * width] for g in range(conv.groups)]
    rows = [r.flatten(2).flatten(0, 1) for r in rows]
    if conv.bias is not None:
        rows = [torch.cat([r, torch.ones(len(r), 1)], 1) for r in rows]
    return torch.stack(rows)


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolution(dims: int, variant: str, frontend: str):
    options = {"kernel_size": 3 if dims < 3 else 2, **VARIANTS[variant]}
    if dims == 3 and variant == "same":
        options["kernel_size"] = 2
    conv = CONV[dims](4, 4, **options)
    x = torch.randn(3, 4, *((5,) * dims if dims < 3 else (4,) * dims))
    width = math.prod(conv(x).shape[1:])
    net = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(width, 3))
    y = torch.tensor([0, 2, 1])
    step = oracle.step(
        net, "kfac", x, lambda out: F.cross_entropy(out, y), loss="cross_entropy", fisher="ggn", frontend=frontend,
        damping_scheme="eigenvalue", damping=DAMPING, proofs=True,
    )  # fmt: skip
    assert step.model.report().frontend == frontend and step.model.uncovered == ()
    layer = step.model.layers[0]
    rows, groups = patches(conv, x), conv.groups
    assert layer.kind == f"conv{dims}d" and layer.shape == (groups, 4 // groups, rows.shape[2])
    a = rows.transpose(1, 2) @ rows / rows.shape[1]
    hidden = conv(x).detach().requires_grad_()
    probabilities = net[1:](hidden).softmax(1).detach()
    g = torch.zeros(groups, 4 // groups, 4 // groups)
    for c in range(3):  # H = sum_c p_c (e_c - p) (e_c - p)^T
        column = probabilities[:, c : c + 1].sqrt() * (F.one_hot(torch.tensor(c), 3) - probabilities)
        (grad,) = torch.autograd.grad(net[1:](hidden), hidden, column)
        at = grad.unflatten(1, (groups, -1)).flatten(3).permute(1, 0, 3, 2).flatten(1, 2)
        g += at.transpose(1, 2) @ at / len(x)
    factors = step.factors("0")
    torch.testing.assert_close(factors["A"], a if groups > 1 else a[0])
    torch.testing.assert_close(factors["G"], g if groups > 1 else g[0])
    gradient, direction = step.pair("0", groups)
    for i in range(groups):
        block = torch.kron(g[i], a[i])
        damped = block + DAMPING * torch.eye(len(block))
        torch.testing.assert_close(torch.linalg.solve(damped, gradient[i].flatten()), direction[i].flatten())


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dims", [1, 2])
def test_second_moment_of_a_convolution(dims: int, variant: str, frontend: str):
    """EKFAC's corrected matrix has the exact block's diagonal in its own basis."""
    conv = CONV[dims](4, 4, **{"kernel_size": 3, **VARIANTS[variant]})
    x = torch.randn(3, 4, *(5,) * dims)
    net = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(math.prod(conv(x).shape[1:]), 3))
    y = torch.tensor([0, 2, 1])
    model = oracle.transform(
        net, "ekfac", x, loss="cross_entropy", fisher="ggn", frontend=frontend, solve_every=2, proofs=True
    )
    for _ in range(2):
        step = oracle.accumulate(model, [(x, lambda out: F.cross_entropy(out, y), {})])
    groups = conv.groups
    exact = oracle.ggn(net, "0", x, lambda out: F.cross_entropy(out, y), groups)
    factors = {k: v if groups > 1 else v[None] for k, v in step.factors("0").items()}
    basis = torch.block_diag(*(torch.kron(g, a) for g, a in zip(factors["QG"], factors["QA"], strict=True)))
    torch.testing.assert_close(factors["S"].flatten(), (basis.T @ exact @ basis).diagonal())


NORMS = {
    "layer": (lambda: nn.LayerNorm(4), (5, 4)),
    "batch 1d": (lambda: nn.BatchNorm1d(4), (5, 4)),
    "batch 2d": (lambda: nn.BatchNorm2d(4), (5, 4, 3, 3)),
    "group": (lambda: nn.GroupNorm(2, 4), (5, 4, 3, 3)),
}


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("method", ["kfac", "ekfac"])
@pytest.mark.parametrize("kind", NORMS)
def test_norm(kind: str, method: str, frontend: str):
    make, shape = NORMS[kind]
    norm, x = make(), torch.randn(*shape)
    net = nn.Sequential(norm, nn.Tanh(), nn.Flatten(), nn.Linear(math.prod(shape[1:]), 3)).eval()
    net.train(not kind.startswith("batch"))
    y = torch.randint(0, 3, (5,))
    model = oracle.transform(
        net, method, x, loss="cross_entropy", fisher="ggn", frontend=frontend, damping=DAMPING, proofs=True
    )
    model.due(statistics=True)
    step = oracle.accumulate(model, [(x, lambda out: F.cross_entropy(out, y), {})])
    assert model.uncovered == () and model.layers[0].shape == (4, 1, 2)
    exact = oracle.ggn(net, "0", x, lambda out: F.cross_entropy(out, y), groups=4)
    gradient, direction = step.pair("0", groups=4)
    for unit in range(4):
        block = exact[2 * unit : 2 * unit + 2, 2 * unit : 2 * unit + 2]
        torch.testing.assert_close(step.factors("0")["F"][unit], block)
        solved = torch.linalg.solve(block + DAMPING * torch.eye(2), gradient[unit].flatten())
        torch.testing.assert_close(solved, direction[unit].flatten())


class Tied(nn.Module):
    """A table read by an embedding and by the output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, t: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(t)))).transpose(1, 2)


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("method", ["kfac", "ekfac", "foof", "diag"])
def test_tied_table(method: str, frontend: str):
    net, t = Tied(), torch.randint(0, 7, (5, 3))
    model = fxcurv.transform(net, method, example_inputs=(t,), loss="cross_entropy", frontend=frontend)
    (tied,) = [layer for layer in model.layers if len(layer.uses) == 2]
    assert [use.swapped for use in tied.uses] == [False, True]
    row = next(row for row in model.report().rows if row.parameter == "embed.weight")
    assert row.status in ("approximated", "diagonal") and row.uses == 2
    before = F.cross_entropy(net(t), t).item()
    opt = fxcurv.optimizer(model)
    for _ in range(5):
        opt.zero_grad()
        out = model(t)
        model.backward(F.cross_entropy(out, t), out)
        opt.step()
        assert opt.info is not None and not opt.info.fallback
    assert F.cross_entropy(net(t), t).item() < before
