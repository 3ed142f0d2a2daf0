"""K-FAC on convolutions with cheaper input factors: uncorrelated pixels (SUA), and part of the positions.

The patches of the oracle come from ``F.unfold`` on the padded image, the statistics from loops over taps.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import FxcurvError
from fxcurv.layers.conv import ConvForm
from fxcurv.methods.dense import kron

DAMPING = 0.03


class Net(nn.Module):
    """One convolution, then a mean over pixels."""

    def __init__(self, bias: bool = True, groups: int = 1, **geometry: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, bias=bias, groups=groups, **geometry)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x)).mean((2, 3))


def stepped(net: nn.Module, x: Tensor, y: Tensor, **hyper: object) -> tuple[fxcurv.runtime.CurvatureModule, Tensor]:
    """The model after one step, and [dW db] before it."""
    settings = {"damping": DAMPING, "kl_clip": None, "fisher": "ggn", **hyper}
    model = fxcurv.transform(net, "kfac", example_inputs=(x,), loss="cross_entropy", **settings)
    out = model(x)
    loss = F.cross_entropy(out, y)
    model.backward(loss, out)
    gradient = joined(net)
    model.precondition_()
    return model, gradient


def joined(net: Net) -> Tensor:
    weight = net.conv.weight.grad
    assert weight is not None
    matrix = weight.flatten(1).clone()
    return matrix if net.conv.bias is None else torch.cat([matrix, net.conv.bias.grad[:, None]], 1)


def patches(net: Net, x: Tensor) -> Tensor:
    """(n, positions, C, K) from the padded image."""
    conv = net.conv
    found = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    return found.transpose(1, 2).unflatten(2, (x.shape[1], -1))


def uncorrelated(found: Tensor, bias: bool) -> Tensor:
    """kron(Sigma, I_K) + m m^T, from (n, positions, C, K)."""
    channels, taps = found.shape[2:]
    pixels = torch.cat([found[..., k].reshape(-1, channels) for k in range(taps)])
    mean = pixels.mean(0)
    sigma = (pixels - mean).T @ (pixels - mean) / len(pixels)
    factor = torch.zeros(channels * taps + bias, channels * taps + bias, dtype=found.dtype)
    m = torch.ones(channels * taps + bias, dtype=found.dtype)
    for k in range(taps):
        at = torch.arange(channels) * taps + k
        factor[at[:, None], at] = sigma
        m[at] = mean
    return factor + torch.outer(m, m)


GEOMETRIES = [{}, {"padding": 1}, {"padding": 1, "stride": 2}, {"dilation": 2, "padding": 2}]


@pytest.mark.parametrize("scheme", ["pi", "sqrt"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_uncorrelated_pixels_are_the_dense_solve(geometry: dict[str, object], bias: bool, scheme: str) -> None:
    torch.manual_seed(0)
    net = Net(bias, **geometry).double()
    x, y = torch.randn(5, 4, 7, 6).double() + 0.5, torch.randint(0, 6, (5,))
    model, gradient = stepped(net, x, y, spatial="uncorrelated", damping_scheme=scheme)
    outputs = model.factors("conv")["G"]
    omega = uncorrelated(patches(net, x), bias)
    pi = ((omega.diagonal().mean() / outputs.diagonal().mean()) ** 0.5) if scheme == "pi" else 1.0
    left = outputs + DAMPING**0.5 / pi * torch.eye(len(outputs)).double()
    right = omega + DAMPING**0.5 * pi * torch.eye(len(omega)).double()
    expected = torch.linalg.solve(right, torch.linalg.solve(left, gradient).T).T
    torch.testing.assert_close(joined(net), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(model.block("conv"), kron(outputs, omega), rtol=1e-9, atol=1e-12)


def test_output_factor_and_layers_without_taps_are_those_of_kfac() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).double()
    x, y = torch.randn(6, 3, 2, 2).double(), torch.randint(0, 3, (6,))
    found = []
    for spatial in ("correlated", "uncorrelated"):
        model = fxcurv.transform(net, "kfac", example_inputs=(x,), loss="cross_entropy", spatial=spatial)
        net.zero_grad()
        out = model(x)
        model.backward(F.cross_entropy(out, y), out)
        model.precondition_()
        found.append([p.grad.clone() for p in net.parameters()])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_groups_have_moments_of_their_own() -> None:
    torch.manual_seed(1)
    net = Net(groups=2, padding=1).double()
    x, y = torch.randn(5, 4, 6, 6).double() - 0.3, torch.randint(0, 6, (5,))
    model, gradient = stepped(net, x, y, spatial="uncorrelated", damping_scheme="sqrt")
    for group in range(2):
        rows = slice(3 * group, 3 * group + 3)
        omega = uncorrelated(patches(net, x)[:, :, 2 * group : 2 * group + 2], True)
        outputs = model.factors("conv")["G"][group]
        left = outputs + DAMPING**0.5 * torch.eye(3).double()
        right = omega + DAMPING**0.5 * torch.eye(len(omega)).double()
        expected = torch.linalg.solve(right, torch.linalg.solve(left, gradient[rows]).T).T
        torch.testing.assert_close(joined(net)[rows], expected, rtol=1e-9, atol=1e-12)


FORMS = [
    ((2, 3), (1, 1), (1, 1), ((0, 0), (0, 0)), "zeros"),
    ((3, 3), (2, 1), (1, 2), ((1, 1), (2, 2)), "zeros"),
    ((3, 2), (1, 1), (1, 1), ((1, 1), (1, 0)), "reflect"),
    ((3,), (2,), (1,), ((1, 1),), "circular"),
    ((2, 2, 2), (1, 1, 2), (1, 1, 1), ((1, 0), (0, 0), (1, 1)), "zeros"),
]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("geometry", FORMS, ids=str)
def test_channel_moments_need_no_patches(geometry: tuple[object, ...], groups: int) -> None:
    from fxcurv.ir.op import OPS

    kernel, stride, dilation, pads, mode = geometry
    taps = int(torch.tensor(kernel).prod())
    form = ConvForm(
        groups=groups, d_out=2, d_in=3 * taps + 1, bias=True, permutation=(), weight_shape=(), scale=0.7,
        kernel=kernel, stride=stride, dilation=dilation, pads=pads, mode=mode,
    )  # fmt: skip
    x = torch.randn(3, 3 * groups, *(6, 5, 4)[: len(kernel)]).double()
    expected = OPS["channel_gram"].reference(form.rows_a(x), taps)
    found = form.channel_gram(x)
    torch.testing.assert_close(found if groups > 1 else found[0], expected)


def test_part_of_the_positions() -> None:
    torch.manual_seed(2)
    net = Net(padding=1).double()
    x, y = torch.randn(4, 4, 5, 5).double(), torch.randint(0, 6, (4,))
    model, _ = stepped(net, x, y, position_every=3)
    rows = patches(net, x).flatten(2)[:, ::3].reshape(-1, 36)
    rows = torch.cat([rows, torch.ones(len(rows), 1).double()], 1)
    torch.testing.assert_close(model.factors("conv")["A"], rows.T @ rows / len(rows))
    whole, _ = stepped(net, x, y)
    torch.testing.assert_close(model.factors("conv")["G"], whole.factors("conv")["G"])


@pytest.mark.parametrize(
    "hyper, words",
    [
        ({"spatial": "near"}, "spatial='near' is unknown"),
        ({"spatial": "uncorrelated", "damping_scheme": "eigenvalue"}, "has no eigenbasis"),
        ({"spatial": "uncorrelated", "position_every": 2}, "choose one of them"),
        ({"position_every": 0}, "position_every=0"),
    ],
)
def test_settings_that_exclude_each_other(hyper: dict[str, object], words: str) -> None:
    with pytest.raises(FxcurvError, match=words):
        fxcurv.methods.kfac(**hyper)
