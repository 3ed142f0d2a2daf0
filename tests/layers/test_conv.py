"""Convolutions: rows against autograd in float64, over dimensions, geometries and padding modes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.layers.check import FRONTENDS, Fn, assert_exact, find, reasons

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
    options = GEOMETRY[name]
    model = nn.Sequential(CONV[nd](4, 8, **options), nn.Tanh())
    detection = assert_exact(model, torch.randn(2, 4, *(7, 6, 5)[:nd]))
    (layer,) = detection.layers
    groups, bias = options.get("groups", 1), options.get("bias", True)
    assert layer.kind == f"conv{nd}d"
    assert layer.shape == (groups, 8 // groups, 4 // groups * options["kernel_size"] ** nd + bias)
    assert not detection.uncovered


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", ["stride and pad", "groups", "same even", "same dilated", "reflect", "no bias"])
@pytest.mark.parametrize("nd", [1, 2, 3])
def test_export(name, nd):
    model = nn.Sequential(CONV[nd](4, 8, **GEOMETRY[name]), nn.Tanh())
    detection = assert_exact(model, torch.randn(2, 4, *(7, 6, 5)[:nd]), frontend="export")
    assert detection.layers[0].kind == f"conv{nd}d"
    assert not detection.uncovered


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_sizes_differ_by_axis(frontend):
    conv = nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2)
    detection = assert_exact(nn.Sequential(conv), torch.randn(2, 2, 7, 6), frontend=frontend)
    assert detection.layers[0].shape == (2, 2, 7)


@pytest.mark.parametrize("nd", [1, 2, 3])
def test_input_without_batch_axis(nd):
    detection = assert_exact(nn.Sequential(CONV[nd](4, 8, 2, groups=2)), torch.randn(4, *(7, 6, 5)[:nd]))
    assert detection.layers[0].form.rows_a(torch.randn(4, *(7, 6, 5)[:nd])).shape[0] == 1


FUNCTIONS = {
    "functional": (lambda m, x: F.conv2d(x, m.w, m.b, stride=2, padding=1), {"w": (8, 4, 3, 3), "b": (8,)}),
    "separate bias": (lambda m, x: F.conv2d(x, m.w) + m.b, {"w": (8, 4, 3, 3), "b": (8, 1, 1)}),
    "separate bias viewed": (lambda m, x: F.conv2d(x, m.w) + m.b.view(1, -1, 1, 1), {"w": (8, 4, 3, 3), "b": (8,)}),
    "scaled": (lambda m, x: F.conv2d(x, m.w * 0.25, m.b, groups=2), {"w": (8, 2, 3, 3), "b": (8,)}),
    "channels last weight": (lambda m, x: F.conv2d(x, m.w.permute(3, 2, 0, 1), m.b), {"w": (3, 2, 4, 8), "b": (8,)}),
    "in place": (lambda m, x: F.relu(F.conv2d(x, m.w, m.b), inplace=True), {"w": (8, 4, 3, 3), "b": (8,)}),
}


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name, frontend):
    function, shapes = FUNCTIONS[name]
    detection = assert_exact(Fn(function, **shapes), torch.randn(2, 4, 7, 6), frontend=frontend)
    assert detection.layers[0].params == ("w", "b")
    assert not detection.uncovered


@pytest.mark.parametrize("transposed", [False, True])
def test_aten_convolution(transposed):
    def forward(m, x):
        return torch.convolution(x, m.w, m.b, [1, 1], [1, 1], [1, 1], transposed, [0, 0], 2)

    model, x = Fn(forward, w=(4, 2, 3, 3), b=(4,)), torch.randn(2, 4, 7, 6)
    if transposed:
        _, detection = find(model, x, frontend="export")
        assert not detection.layers and "transposed" in reasons(detection)["w"]
    else:
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
