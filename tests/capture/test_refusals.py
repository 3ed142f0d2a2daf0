"""What cannot be captured faithfully is refused in one sentence that names the construct and the line."""

from __future__ import annotations

import importlib
import random
import sys
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxcurv.capture import Call, Runner, capture
from fxcurv.capture.patches import dynamo_kept_out
from fxcurv.errors import FxcurvError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.plain = torch.ones(4)
        self.count = 0
        self.kept: Any = None
        self.log: list[Any] = []


class Branch(Net):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.fc(x)
        return x


class Loop(Net):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[0]):
            x = self.fc(x)
        return x


class Item(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * float(x.max())


class RandomOfPlain(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * torch.bernoulli(self.plain)


class PythonRandom(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * random.random()


class Listed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + sum(p.square().sum() for p in self.parameters())


class Assigns(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.fc(x)
        return self.kept


class Counts(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.fc(x)


class Logs(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        self.log.append(y)
        return y


class Foreign(Net):
    free = torch.ones(4, requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * (Foreign.free + 1)


class Opaque(Net):
    class Box:
        def __init__(self, value: Tensor) -> None:
            self.value = value

    class Sealed(dict):  # a dict with more to it than its items
        pass

    def forward(self, x: Tensor) -> Any:
        return Opaque.Sealed(y=self.fc(x))


CASES = [
    (Branch, r"a Python branch on a value that depends on the input at test_refusals.py:\d+: if x.sum\(\) > 0:"),
    (Loop, r"a size of the input used as a plain Python integer .* at test_refusals.py:\d+: for _ in range"),
    (Item, r"a conversion of a traced value to a Python number .* at test_refusals.py:\d+: return self.fc"),
    (RandomOfPlain, r"aten::bernoulli draws random numbers without depending on the input"),
    (PythonRandom, r"draws from Python's random module"),
    (Listed, r"the forward reads 'fc.weight' through aten::\S+ on a list of parameters"),
    (Assigns, r"assigns a value computed from its input to self.kept"),
    (Counts, r"the forward changes the attribute 'count'"),
    (Logs, r"the forward changes the attribute 'log'"),
    (Foreign, r"a trainable tensor of shape \(4,\) that is no parameter of the model"),
    (Opaque, r"returns a Sealed, which cannot be taken apart"),
]


@pytest.mark.parametrize(("net", "message"), CASES)
def test_symbolic_refuses(net, message):
    model = net()
    x = torch.ones(2, 4)
    before, state = dict(vars(model)), random.getstate()
    with pytest.raises(FxcurvError, match=message) as caught:
        capture(model, Call.of(model, (x,)), "symbolic")
    assert str(caught.value).count("\n") == 0
    assert all(vars(model)[key] is value for key, value in before.items()) and model.log == []
    assert random.getstate() == state


def test_one_error_when_nothing_captures(monkeypatch):
    model = Branch()
    monkeypatch.setattr(Branch, "forward", torch.compiler.disable(Branch.forward))  # out of sight for dynamo
    with pytest.raises(FxcurvError, match=r"^no front-end can .* at test_refusals.py:\d+.*torch.where") as caught:
        capture(model, Call.of(model, (torch.ones(2, 4),)))
    assert "example_inputs" not in str(caught.value)


def test_export_captures_a_loop_over_a_size_that_stays_fixed():
    model = Loop()
    x = torch.ones(2, 4)
    captured = capture(model, Call.of(model, (x,)))
    assert captured.frontend == "export" and captured.sizes == ((2, 4),)
    assert not captured.accepts([torch.ones(3, 4)])


@pytest.mark.parametrize("net", [Assigns, Counts, Logs, Opaque])
def test_export_refuses_side_effects_too(net):
    model = net()
    with pytest.raises(FxcurvError, match="changes the attribute|cannot be taken apart"):
        capture(model, Call.of(model, (torch.ones(2, 4),)), "export")
    assert model.kept is None and model.count == 0 and model.log == []


def test_export_needs_inputs():
    with pytest.raises(FxcurvError, match="needs example inputs"):
        capture(Branch(), Call.default(Branch()), "export")


def test_unknown_frontend():
    model = nn.Linear(2, 2)
    with pytest.raises(FxcurvError, match="no front-end 'trace'; choose one of: auto, symbolic, export, dynamo"):
        capture(model, Call.default(model), "trace")


class Anything(nn.Module):
    def forward(self, x: Any, *rest: Any, flag: bool = True, **named: Any) -> Any:
        return x


def test_call_key():
    model, x = Anything(), torch.ones(2)
    key = lambda *args, **kwargs: Call.of(model, args, kwargs).key  # noqa: E731
    assert key(x) == key(torch.zeros(5, 3)) == key(x, flag=True) == key(x=x)
    different = [key(x), key(x, x), key(x, None), key(x, flag=False), key(x, flag=1), key(x, n=2), key(x, n=2.0)]
    different += [key(1), key(x, n=float("nan")), key(x, n={1, 2}), key(x, n={1}), key([x]), key((x,)), key(x, a=x)]
    different += [key({"a": x}), key({"b": x})]
    assert len(set(different)) == len(different)
    assert key(x, n=float("nan")) == key(x, n=float("nan"))
    assert key(x, n={1}) == key(x, n={1})
    model.eval()
    assert key(x) not in different


def test_call_leaves_and_names():
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    call = Call.of(Anything(), ([a, 3], b), {"k": {"lambda": c}})
    assert [leaf is value for leaf, value in zip(call.leaves, (a, b, c), strict=True)] == [True] * 3
    assert call.names == ("x_0", "rest", "k_lambda")
    args, kwargs = call.rebuild(["A", "B", "C"])
    assert args == (["A", 3], "B") and kwargs == {"flag": True, "k": {"lambda": "C"}}


def test_call_default():
    class Two(nn.Module):
        def forward(self, x: Tensor, self_: Tensor, *rest: Any, k: Tensor, n: int = 3, **more: Any) -> Any:
            return x

    call = Call.default(Two())
    assert not call.real and len(call.leaves) == 3
    args, kwargs = call.rebuild(list("abc"))
    assert args == ("a", "b") and kwargs == {"k": "c", "n": 3}
    x = torch.ones(1)
    assert call.key == Call.of(Two(), (x, x), {"k": x}).key


@pytest.mark.parametrize("argument", [np.ones(2), Opaque.Box(torch.ones(2))])
def test_hidden_tensors_are_refused(argument):
    with pytest.raises(FxcurvError, match="argument 'x' is a .* whose data would be baked"):
        Call.of(Anything(), (argument,))


def test_arguments_that_do_not_fit():
    with pytest.raises(FxcurvError, match=r"do not fit Linear.forward\(input.*: missing a required argument: 'input'"):
        Call.of(nn.Linear(2, 2), ())


def test_dynamo_is_not_imported_while_torch_is_patched(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    with dynamo_kept_out(), pytest.raises(ModuleNotFoundError):
        importlib.import_module("torch._dynamo")
    assert "torch._dynamo" not in sys.modules


def test_arguments_named_like_what_generated_code_uses():
    class Named(nn.Module):
        def forward(self, torch: Tensor, input: Tensor, getattr: Tensor) -> Tensor:
            return nn.functional.linear(input, torch.cos()) + getattr.exp() * input.shape[0]

    model, inputs = Named(), [globals()["torch"].rand(3, 3) for _ in range(3)]
    runner = Runner(capture(model, Call.of(model, inputs)))
    assert runner(model, *inputs).equal(model(*inputs))


def test_ordered_dict_argument_keeps_its_class():
    x = torch.ones(1)
    args, _ = Call.of(Anything(), (OrderedDict(a=x),)).rebuild([x])
    assert type(args[0]) is OrderedDict
