"""Weights that a module computes from other parameters: they train with their gradient, a reason says what to do."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrizations, parametrize, prune

import fxcurv
from tests.layers.check import FRONTENDS, assert_exact, find, reasons

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
]


class Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).mT


def symmetric() -> nn.Module:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


class Standardised(nn.Conv1d):
    """A convolution with a standardised weight."""

    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv1d(x, weight, self.bias)


# name: (module, shape of the input, words of the reason, the call that undoes it)
CASES = {
    "weight norm": (
        lambda: parametrizations.weight_norm(nn.Linear(4, 4)), (5, 4), "remove_parametrizations(model.0, 'weight')",
        lambda m: parametrize.remove_parametrizations(m, "weight"),
    ),
    "weight norm of a convolution": (
        lambda: parametrizations.weight_norm(nn.Conv1d(4, 4, 2)), (5, 4, 3), "remove_parametrizations(model.0",
        lambda m: parametrize.remove_parametrizations(m, "weight"),
    ),
    "weight norm of a transposed convolution": (
        lambda: parametrizations.weight_norm(nn.ConvTranspose1d(4, 4, 2)), (5, 4, 3), "remove_parametrizations(model.0",
        lambda m: parametrize.remove_parametrizations(m, "weight"),
    ),
    "old weight norm": (
        lambda: utils.weight_norm(nn.Linear(4, 4)), (5, 4), "utils.remove_weight_norm(model.0, 'weight')",
        utils.remove_weight_norm,
    ),
    "spectral norm": (
        lambda: parametrizations.spectral_norm(nn.Linear(4, 4)), (5, 4), "remove_parametrizations(model.0, 'weight')",
        lambda m: parametrize.remove_parametrizations(m, "weight"),
    ),
    "old spectral norm": (
        lambda: utils.spectral_norm(nn.Linear(4, 4)), (5, 4), "utils.remove_spectral_norm(model.0, 'weight')",
        utils.remove_spectral_norm,
    ),
    "orthogonal": (
        lambda: parametrizations.orthogonal(nn.Linear(4, 4)), (5, 4), "remove_parametrizations(model.0, 'weight')",
        lambda m: parametrize.remove_parametrizations(m, "weight"),
    ),
    "own": (
        symmetric, (5, 4), "remove_parametrizations(model.0, 'weight')",
        lambda m: parametrize.remove_parametrizations(m, "weight"),
    ),
    "pruned": (
        lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5), (5, 4), "utils.prune.remove(model.0, 'weight')",
        lambda m: prune.remove(m, "weight"),
    ),
    "standardised": (lambda: Standardised(4, 4, 2), (5, 4, 3), "standardise the stored weight", None),
}  # fmt: skip


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    make, shape, _, _ = CASES[name]
    x = torch.randn(shape)
    first = make()
    with torch.no_grad():
        width = first(x).flatten(1).shape[1]
    return nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.Linear(width, 3)), x


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("name", CASES)
def test_reason_and_covered_bias(name, frontend):
    model, x = build(name)
    detection = assert_exact(model.eval(), x, frontend=frontend)
    assert [(layer.name, layer.kind) for layer in detection.layers] == [("0.bias", "shift"), ("3", "linear")]
    missing = reasons(detection)
    assert set(missing) == {n for n, _ in model.named_parameters()} - {"0.bias", "3.weight", "3.bias"}
    assert all(CASES[name][2] in why and "plain gradient" in why for why in missing.values())


@pytest.mark.parametrize("name", CASES)
def test_trains_with_the_plain_gradient(name):
    model, x = build(name)
    y = torch.randint(0, 3, (5,))
    curved = fxcurv.transform(model, "kfac", example_inputs=(x,), loss="cross_entropy")
    names = [item[0] if isinstance(item, tuple) else item.parameter for item in curved.uncovered]
    assert names
    out = curved(x)
    curved.backward(F.cross_entropy(out, y), out)
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    curved.precondition_()
    for parameter in names:
        torch.testing.assert_close(model.get_parameter(parameter).grad, before[parameter], rtol=0, atol=0)
    assert not torch.equal(model[3].weight.grad, before["3.weight"])
    opt = fxcurv.optimizer(curved, lr=0.05)
    losses = []
    for _ in range(4):
        opt.zero_grad()
        out = curved(x)
        loss = F.cross_entropy(out, y)
        losses.append(loss.item())
        curved.backward(loss, out)
        opt.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[3] is not None])
def test_the_remedy_makes_a_layer(name):
    model, x = build(name)
    CASES[name][3](model[0])
    detection = assert_exact(model, x)
    assert not detection.uncovered and [layer.name for layer in detection.layers] == ["0", "3"]


def test_pruned_bias():
    model = nn.Sequential(prune.random_unstructured(nn.Linear(4, 4), "bias", 0.5))
    why = reasons(find(model, torch.randn(5, 4))[1])
    assert "prune.remove(model.0, 'bias')" in why["0.bias_orig"] and "bias" in why["0.weight"]


def test_root_module():
    why = reasons(find(nn.Sequential(symmetric())[0], torch.randn(5, 4))[1])
    assert any("remove_parametrizations(model, 'weight')" in text for text in why.values())


def test_quantised_layers_have_no_parameters():
    """A frozen, quantised body under a head that trains."""
    if "none" in torch.backends.quantized.supported_engines[-1:]:
        pytest.skip("torch was built without quantised kernels")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        body = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4).float()), {nn.Linear}, torch.qint8)
    model = nn.Sequential(body, nn.Linear(4, 3).float())
    x = torch.randn(5, 4, dtype=torch.float32)
    curved = fxcurv.transform(model, "kfac", example_inputs=(x,), loss="cross_entropy")
    assert [layer.name for layer in curved.layers] == ["1"] and curved.uncovered == ()
    out = curved(x)
    curved.backward(F.cross_entropy(out, torch.tensor([0, 1, 2, 0, 1])), out)
    curved.precondition_()


def test_quantisation_aware_layer_is_refused():
    from torch.ao.nn.qat import Linear
    from torch.ao.quantization import get_default_qat_qconfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = Linear(4, 4, qconfig=get_default_qat_qconfig("fbgemm"))
    why = reasons(find(nn.Sequential(layer), torch.randn(5, 4))[1])
    assert "no layer kind" in why["0.weight"] and "qat" in why["0.weight"]
