"""The numeric proof: silent on right layers, loud on wrong ones, and without a trace on the model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxcurv.layers.layer import Detection
from fxcurv.layers.proof import prove
from tests.layers.check import FRONTENDS, Fn, find


class Net(nn.Module):
    """Every kind at once, in-place operations after layers, dropout, two outputs."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 4, padding_idx=0)
        self.conv = nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular", groups=2)
        self.batch = nn.BatchNorm1d(6)
        self.group = nn.GroupNorm(2, 6)
        self.layer = nn.LayerNorm(6)
        self.fc = nn.Linear(6, 4)
        self.mixed = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        h = self.conv(self.embed(x).transpose(1, 2))
        h = F.dropout(torch.relu_(self.group(self.batch(h))), 0.3, self.training)
        h = self.fc(self.layer(h.transpose(1, 2)))
        h = torch.tanh_(h) @ self.mixed
        return F.linear(h, self.embed.weight), {"mean": h.mean()}


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_proves_a_net_and_leaves_no_trace(frontend, training, dtype):
    model = Net().to(dtype).train(training)
    x = torch.randint(11, (3, 5))
    captured, detection = find(model, x, frontend=frontend)
    assert len(detection.layers) == 7 and not detection.uncovered
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    assert prove(captured, detection, model, [x]) == []
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training == training for module in model.modules())


def _broken(detection: Detection, **fields: object) -> Detection:
    layer = detection.layers[0]
    uses = tuple(replace(use, form=replace(use.form, **fields)) for use in layer.uses)
    return replace(detection, layers=(replace(layer, uses=uses), *detection.layers[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "model, fields",
    [
        (nn.Conv2d(4, 4, 3, padding=1), {"mode": "reflect"}),
        (nn.Conv2d(4, 4, 3, padding=2, dilation=2), {"dilation": (1, 1), "pads": ((1, 1), (1, 1))}),
        (nn.Conv2d(4, 4, 3, padding="same"), {"scale": 1.001}),
        (nn.Linear(5, 5), {"permutation": (1, 0)}),
        (nn.LayerNorm(5), {"eps": 1e-2}),
    ],
)
def test_wrong_form_is_found(model, fields, dtype):
    model = nn.Sequential(model).to(dtype)
    x = torch.randn(2, 4, 5, 5, dtype=dtype)
    captured, detection = find(model, x)
    assert prove(captured, detection, model, [x]) == []
    with torch.no_grad():  # the caller's mode does not matter
        (sentence, *_) = prove(captured, _broken(detection, **fields), model, [x])
    assert "'0'" in sentence and "'0.weight'" in sentence and sentence.endswith(".")


def test_missed_use_is_found():
    model = Fn(lambda m, x: torch.tanh(x @ m.w) @ m.w, w=(3, 3))
    x = torch.randn(5, 3)
    captured, detection = find(model, x)
    (layer,) = detection.layers
    half = replace(detection, layers=(replace(layer, uses=layer.uses[:1]),))
    assert prove(captured, detection, model, [x]) == []
    assert len(prove(captured, half, model, [x])) == 1


def test_gradient_that_cancels_is_no_error():
    # The bias before a batch norm has gradient zero up to rounding.
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    x = torch.randn(8, 3, 9, 9)
    captured, detection = find(model, x)
    assert prove(captured, detection, model, [x]) == []


def test_input_changed_in_place_after_the_layer():
    # Circular padding copies the input, so that autograd allows this.
    class Changes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular")

        def forward(self, x):
            h = x * 1.0
            y = self.conv(h)
            h.mul_(3.0)
            return y + h.mean()

    model, x = Changes(), torch.randn(4, 2, 5)
    captured, detection = find(model, x)
    assert prove(captured, detection, model, [x]) == []


def test_dataclass_output_and_unused_layer():
    @dataclass
    class Output:
        logits: torch.Tensor
        extra: list[torch.Tensor]

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            self.b(x)  # read by nobody
            return Output(self.a(x), [x])

    model, x = Wrapped(), torch.randn(4, 3)
    captured, detection = find(model, x)
    assert prove(captured, detection, model, [x]) == []
    unread, read = detection.layers
    assert (unread.name, read.name) == ("b", "a")
    for layer, count in ((unread, 0), (read, 1)):
        wrong = _broken(Detection((layer,), ()), permutation=(1, 0), weight_shape=(3, 2))
        assert len(prove(captured, wrong, model, [x])) == count


def test_not_finite_is_said():
    model = nn.Sequential(nn.Linear(3, 3))
    captured, detection = find(model, torch.randn(2, 3))
    sentences = prove(captured, detection, model, [torch.full((2, 3), float("nan"))])
    assert any("not finite" in sentence for sentence in sentences)


class Cast(nn.Module):
    """A parameter that is added in another precision than it is stored in."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        y = F.linear(x, self.fc.weight).transpose(1, 2) + self.fc.bias.float()[:, None]
        return torch.tanh(y) * 1e3


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_a_cast_parameter_is_proved_to_the_precision_of_the_cast(frontend):
    torch.manual_seed(0)
    model, x = Cast().double(), torch.randn(5, 7, 4, dtype=torch.float64)
    captured, detection = find(model, x, frontend=frontend)
    assert {name for layer in detection.layers for name in layer.params} >= {"fc.bias"}
    assert prove(captured, detection, model, (x,)) == []
    layer = detection.layers[0]
    wrong = tuple(replace(use, form=replace(use.form, scale=1.0001)) for use in layer.uses)
    faults = prove(captured, Detection((replace(layer, uses=wrong),), ()), model, (x,))
    assert len(faults) == 1 and "fc.weight" in faults[0]
