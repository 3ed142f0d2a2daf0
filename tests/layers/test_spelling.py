"""Teaching detection: own spellings for a function, for a module class, and for a kind that exists already."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxcurv
from fxcurv.capture import kept
from fxcurv.errors import FxcurvError
from fxcurv.layers.linear import linear_form
from fxcurv.layers.spelling import SPELLINGS, Match, spelling
from tests.layers.check import Fn, assert_exact, find, reasons

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    """What a test teaches is forgotten after it."""
    monkeypatch.setattr(kept, "_KEPT", set(kept._KEPT))
    before = dict(SPELLINGS)
    yield
    SPELLINGS.clear()
    SPELLINGS.update(before)


@fx.wrap
def fast_linear(x, weight, bias):
    """A linear layer by another name, which tracing keeps whole."""
    return F.linear(x, weight, bias)


def teach_function():
    @spelling(fast_linear)
    def _fast(at, x, weight, bias):
        operand = at.weight(weight)
        size = operand.view.shape[0]
        form = linear_form(operand.view, 0, 1)
        return Match("linear", form, at.data(x), at.node, operand, at.bias(bias, size), out_axes=((-1, size),))


class Secret(nn.Module):
    """Decides by values, so that no front-end sees through it."""

    def __init__(self):
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        return F.linear(x, self.weight, self.shift if x.sum() < 1e9 else None)


def teach_module():
    @spelling(Secret)
    def _secret(at, x):
        weight = at.own("weight")
        return Match("linear", linear_form(weight.view, 0, 1), at.data(x), at.node, weight, at.own("shift"))


def test_function_as_an_existing_kind():
    model = Fn(lambda m, x: fast_linear(x, m.w, m.b), w=(4, 3), b=(4,))
    x = torch.randn(5, 2, 3)
    assert "fast_linear" in reasons(find(model, x)[1])["w"]
    teach_function()
    detection = assert_exact(model, x)
    (layer,) = detection.layers
    assert (layer.kind, layer.params, layer.shape) == ("linear", ("w", "b"), (1, 4, 4)) and not detection.uncovered


def test_module_class_is_kept_whole():
    model = nn.Sequential(Secret(), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    with pytest.raises(FxcurvError):
        find(model, x)
    teach_module()
    captured, _ = find(model, x)
    assert [node.target for node in captured.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
    detection = assert_exact(model, x)
    assert [layer.params for layer in detection.layers] == [("0.weight", "0.shift"), ("2.weight", "2.bias")]
    assert not detection.uncovered


def test_module_of_a_subclass_with_its_own_forward_is_not_kept():
    class Louder(Secret):
        def forward(self, x):
            return 2 * x @ self.weight.t()

    teach_module()
    model = nn.Sequential(Louder())
    detection = assert_exact(model, torch.randn(5, 3))
    assert [layer.params for layer in detection.layers] == [("0.weight",)]
    assert "never used" in reasons(detection)["0.shift"]


def test_taught_module_takes_a_step():
    teach_module()
    net, x, y = nn.Sequential(Secret(), nn.Tanh(), nn.Linear(4, 2)), torch.randn(6, 3), torch.randint(0, 2, (6,))
    model = fxcurv.transform(net, "kfac", example_inputs=(x,), loss="cross_entropy", fisher="empirical", ema=0.0)
    out = model(x)
    model.backward(F.cross_entropy(out, y), out)
    model.precondition_()
    rows = torch.cat([x, torch.ones(6, 1)], 1)
    torch.testing.assert_close(model.factors("0")["A"], rows.T @ rows / 6)


def test_module_whose_parameter_is_computed_is_refused():
    from torch.nn.utils import parametrizations

    teach_module()
    model = nn.Sequential(parametrizations.weight_norm(Secret()))
    _, detection = find(model, torch.randn(5, 3))
    assert "parametrisation" in reasons(detection)["0.parametrizations.weight.original0"]


def test_a_second_spelling_of_one_operation_is_an_error():
    teach_function()
    with pytest.raises(FxcurvError, match="two spellings"):
        teach_function()
