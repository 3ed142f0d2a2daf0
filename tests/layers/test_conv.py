"""Convolutions: rows against autograd in float64, over dimensions, geometries and padding modes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.layers.check import FRONTENDS, Fn, assert_exact

pytestmark = pytest.mark.usefixtures("float64")
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

GEOMETRY = {
    "plain": {"kernel_size": 3},
    "1x1": {"kernel_size": 1},
    "strided 1x1": {"kernel_size": 1, "stride": 2},
    "stride and pad": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilation": {"kernel_size": 2, "dilation": 2, "padding": 1},
    "stride and dilation": {"kernel_size": 2, "dilation": 3, "stride": 2, "padding": 2},
    "groups": {"kernel_size": 2, "groups": 2},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 4},
    "depthwise single": {"kernel_size": 3, "groups": 4, "out": 4, "bias": False},
    "same": {"kernel_size": 3, "padding": "same"},
    "same even": {"kernel_size": 4, "padding": "same", "dilation": 1},
    "same dilated": {"kernel_size": 2, "padding": "same", "dilation": 3},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "no bias": {"kernel_size": 2, "bias": False},
    "reflect": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "stride": 2},
    "circular": {"kernel_size": 3, "padding": 2, "padding_mode": "circular", "dilation": 2},
    "circular same even": {"kernel_size": 4, "padding": "same", "padding_mode": "circular"},
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("nd", [1, 2, 3])
@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry(name, nd):
    options = dict(GEOMETRY[name])
    out = options.pop("out", 8)
    model = nn.Sequential(CONV[nd](4, out, **options), nn.Tanh())
    detection = assert_exact(model, torch.randn(2, 4, *(7, 6, 5)[:nd]))
    (layer,) = detection.layers
    groups, bias = options.get("groups", 1), options.get("bias", True)
    assert layer.kind == f"conv{nd}d"
    assert layer.shape == (groups, out // groups, 4 // groups * options["kernel_size"] ** nd + bias)
    assert not detection.uncovered


EXPORTED = [(2, name) for name in GEOMETRY]
EXPORTED += [(nd, name) for nd in (1, 3) for name in ("stride and pad", "groups", "same even", "replicate", "circular")]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("nd, name", EXPORTED)
def test_export(nd, name):
    options = dict(GEOMETRY[name])
    model = nn.Sequential(CONV[nd](4, options.pop("out", 8), **options), nn.Tanh())
    detection = assert_exact(model, torch.randn(2, 4, *(7, 6, 5)[:nd]), frontend="export")
    assert detection.layers[0].kind == f"conv{nd}d"
    assert not detection.uncovered


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_sizes_differ_by_axis(frontend):
    conv = nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2)
    detection = assert_exact(nn.Sequential(conv), torch.randn(2, 2, 7, 6), frontend=frontend)
    assert detection.layers[0].shape == (2, 2, 7)


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("nd", [1, 2, 3])
def test_input_without_batch_axis(nd, frontend):
    model = nn.Sequential(CONV[nd](4, 8, 2, groups=2))
    detection = assert_exact(model, torch.randn(4, *(7, 6, 5)[:nd]), frontend=frontend)
    assert detection.layers[0].form.rows_a(torch.randn(4, *(7, 6, 5)[:nd])).shape[0] == 1


def same_by_hand(m, x):
    """Padding as another framework's "same" with a stride, by an operation of its own."""
    rows, columns = x.shape[-2:]
    high, wide = max(-(-rows // 2) * 2 - 2 + 3 - rows, 0), max(-(-columns // 2) * 2 - 2 + 3 - columns, 0)
    x = F.pad(x, [wide // 2, wide - wide // 2, high // 2, high - high // 2])
    return F.conv2d(x, m.w, m.b, stride=2)


def same_of_fixed_sizes(m, x):
    return F.conv2d(F.pad(x, [0, 1, 1, 1]), m.w, m.b, stride=2)


FUNCTIONS = {
    "same": (lambda m, x: F.conv2d(x, m.w, m.b, padding="same"), {"w": (8, 4, 3, 3), "b": (8,)}),
    "valid": (lambda m, x: F.conv2d(x, m.w, m.b, padding="valid", stride=2), {"w": (8, 4, 3, 3), "b": (8,)}),
    "same in one dimension": (
        lambda m, x: F.conv1d(x.flatten(2), m.w, m.b, padding="same", dilation=2), {"w": (8, 4, 3), "b": (8,)},
    ),
    "same in three": (
        lambda m, x: F.conv3d(x.unsqueeze(-1), m.w, m.b, padding="same"), {"w": (8, 4, 3, 2, 1), "b": (8,)},
    ),
    "multiplier": (lambda m, x: F.conv2d(x, m.w, m.b, groups=4), {"w": (12, 1, 3, 3), "b": (12,)}),
    "padded before": (same_of_fixed_sizes, {"w": (8, 4, 3, 3), "b": (8,)}),
    "functional": (lambda m, x: F.conv2d(x, m.w, m.b, stride=2, padding=1), {"w": (8, 4, 3, 3), "b": (8,)}),
    "separate bias": (lambda m, x: F.conv2d(x, m.w) + m.b, {"w": (8, 4, 3, 3), "b": (8, 1, 1)}),
    "separate bias viewed": (lambda m, x: F.conv2d(x, m.w) + m.b.view(1, -1, 1, 1), {"w": (8, 4, 3, 3), "b": (8,)}),
    "scaled": (lambda m, x: F.conv2d(x, m.w * 0.25, m.b, groups=2), {"w": (8, 2, 3, 3), "b": (8,)}),
    "channels last weight": (lambda m, x: F.conv2d(x, m.w.permute(3, 2, 0, 1), m.b), {"w": (3, 2, 4, 8), "b": (8,)}),
    "in place": (lambda m, x: F.relu(F.conv2d(x, m.w, m.b), inplace=True), {"w": (8, 4, 3, 3), "b": (8,)}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name, frontend):
    function, shapes = FUNCTIONS[name]
    detection = assert_exact(Fn(function, **shapes), torch.randn(2, 4, 7, 6), frontend=frontend)
    assert detection.layers[0].params == ("w", "b")
    assert not detection.uncovered


def test_same_padding_of_computed_sizes():
    """Sizes that Python computes from those of the input are constants of an exported graph."""
    model = Fn(same_by_hand, w=(8, 4, 3, 3), b=(8,))
    assert assert_exact(model, torch.randn(2, 4, 7, 6), frontend="export").layers[0].params == ("w", "b")


def test_bias_beside_a_computed_weight_is_a_shift():
    for forward in (
        lambda m, x: F.conv2d(x, m.w * m.w, m.b),
        lambda m, x: F.conv2d(x, x.mean() * m.w.exp(), m.b),
    ):
        model = Fn(forward, w=(8, 4, 3, 3), b=(8,))
        layers = assert_exact(model, torch.randn(2, 4, 7, 6)).layers
        assert [(layer.params, layer.kind, layer.shape) for layer in layers] == [(("b",), "shift", (8, 1, 1))]


def test_aten_convolution():
    def forward(m, x):
        return torch.convolution(x, m.w, m.b, [1, 1], [1, 1], [1, 1], False, [0, 0], 2)

    model, x = Fn(forward, w=(4, 2, 3, 3), b=(4,)), torch.randn(2, 4, 7, 6)
    assert assert_exact(model, x, frontend="export").layers[0].shape == (2, 2, 19)


def test_channels_last_memory():
    x = torch.randn(2, 4, 7, 6).to(memory_format=torch.channels_last)
    assert_exact(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)).to(memory_format=torch.channels_last), x)


def test_tag_tells_geometries_apart():
    options = [
        {}, {"stride": 2}, {"padding": 1}, {"padding": 1, "padding_mode": "reflect"}, {"dilation": 2}, {"groups": 2},
        {"kernel_size": 2}, {"bias": False},
    ]  # fmt: skip

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(4, 8, **{"kernel_size": 3, **item}) for item in options)

        def forward(self, x):
            return [conv(x).sum() for conv in self.convs]

    detection = assert_exact(Net(), torch.randn(2, 4, 8, 8))
    assert len({layer.input_key for layer in detection.layers}) == len(options)
