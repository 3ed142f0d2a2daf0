"""What people do with a model around its training: copies, moves, other tensors and other layers in its places."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, parametrize, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fxcurv
from tests.runtime.steps import batch, make, mlp, plain_gradient, same, step


def test_the_plain_model_is_pickled_and_saved() -> None:
    x, y = batch()
    model = make()
    step(model, x, y)
    stored = io.BytesIO()
    torch.save(model.strip(), stored)
    stored.seek(0)
    for net in (pickle.loads(pickle.dumps(model.strip())), torch.load(stored, weights_only=False)):
        assert type(net) is nn.Sequential and torch.equal(net(x), model(x))
        step(fxcurv.transform(net, "kfac", loss="cross_entropy"), x, y)


def test_moving_to_a_device() -> None:
    x, y = batch()
    model = make()
    assert model.to("cpu") is model and model.cpu() is model
    step(model, x, y)
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    step(model, x, y)
    model.to("meta")
    for method in ("kfac", "shampoo"):
        with pytest.raises(fxcurv.FxcurvError, match="'0.weight' is on the meta device"):
            step(model if method == "kfac" else make(method).to("meta"), x.to("meta"), y.to("meta"))
    model.to_empty(device="cpu").load_state_dict(saved)
    other = make()
    other.load_state_dict(saved)
    for one in (model, other):
        step(one, x, y)
    assert same(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("method", ["kfac", "ekfac", "diag", "shampoo"])
def test_half_precision(method: str) -> None:
    x, y = batch()
    model = make(method).half()
    for _ in range(3):
        info = step(model, x.half(), y, lr=0.01)
        assert not info.fallback
    assert all(p.dtype == torch.float16 and bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", ["mean", "ema"])
def test_averaged_copies(whole: bool, kind: str) -> None:
    """Stochastic weight averaging of the transformed model, and of the plain one in it."""
    model = make()
    source = model if whole else model.strip()
    average = get_ema_multi_avg_fn(0.75) if kind == "ema" else None
    averaged = AveragedModel(source, multi_avg_fn=average)
    expected: list[Tensor] = []
    for i in range(3):
        step(model, *batch(seed=i))
        averaged.update_parameters(source)
        now = [p.detach().clone() for p in model.parameters()]
        weight = 0.25 if kind == "ema" else 1 / (i + 1)
        expected = [e + weight * (p - e) for e, p in zip(expected, now, strict=True)] if expected else now
    torch.testing.assert_close([p.detach() for p in averaged.module.parameters()], expected)
    x, _ = batch()
    assert not torch.equal(averaged.eval()(x), model(x))
    again = AveragedModel(source)
    again.load_state_dict(averaged.state_dict())
    assert torch.equal(again.eval()(x), averaged(x))


def test_parameters_as_one_vector() -> None:
    """Views of one vector as parameters: their tensors change, their place does not."""
    model, other = make(), make()
    x, y = batch()
    for one in (model, other):
        step(one, x, y)
    vector = parameters_to_vector(model.parameters()).detach()
    vector_to_parameters(0.5 * vector, model.parameters())
    with torch.no_grad():
        for p in other.parameters():
            p *= 0.5
    for one in (model, other):
        step(one, x, y)
    assert same(model.state_dict(), other.state_dict())


def test_functional_calls_and_transforms() -> None:
    """functional_call runs on other tensors, torch.func transforms run the plain model; both leave the step alone."""
    x, y = batch()
    model, other = make(), make()
    net = model.strip()
    values = {name: 0.5 * p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], one: Any, x: Tensor = x, y: Tensor = y) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(one, values, (x,)), y)

    assert torch.equal(loss(values, model), loss(values, net))
    for mine, theirs in zip(*(torch.func.grad(loss)(values, one).values() for one in (model, net)), strict=True):
        assert torch.equal(mine, theirs)
    single = torch.func.vmap(torch.func.grad(loss), (None, None, 0, 0))(values, model, x[:, None], y[:, None])
    torch.testing.assert_close(single["0.weight"].mean(0), torch.func.grad(loss)(values, net)["0.weight"])
    assert torch.func.jvp(lambda v: loss(v, model), (values,), (values,))[1].isfinite()
    stacked, buffers = torch.func.stack_module_state([model, make()])
    outputs = torch.func.vmap(lambda p, b: torch.func.functional_call(model, (p, b), (x,)))(stacked, buffers)
    torch.testing.assert_close(outputs[0], net(x))
    for one in (model, other):
        step(one, x, y)
    assert same(model.state_dict(), other.state_dict())


def test_data_parallel_is_refused() -> None:
    with pytest.raises(fxcurv.FxcurvError, match="transform the model before wrapping it"):
        fxcurv.transform(nn.DataParallel(mlp()), "kfac")
    with pytest.raises(fxcurv.FxcurvError, match="DistributedDataParallel"):
        make()._replicate_for_data_parallel()


def test_a_parameter_that_is_added_keeps_its_gradient_and_is_reported() -> None:
    x, y = batch()
    model = make()
    step(model, x, y)
    model.shift = nn.Parameter(torch.ones(3, dtype=torch.float64))
    assert dict(model.named_parameters())["shift"] is model.shift
    for _ in range(2):
        model.zero_grad()
        out = model(x) + model.shift
        model.backward(F.cross_entropy(out, y), out)
        expected = torch.autograd.grad(F.cross_entropy(model.strip()(x) + model.shift, y), model.shift)[0]
        assert not model.precondition_().fallback
        torch.testing.assert_close(model.shift.grad, expected)
    assert [name for name, _ in model.uncovered] == ["shift"]


@pytest.mark.parametrize("method", ["kfac", "shampoo"])
@pytest.mark.parametrize("how", ["other size", "same size", "removed", "parametrised"])
def test_a_replaced_layer_is_an_error(method: str, how: str) -> None:
    x, y = batch()
    model = make(method)
    step(model, x, y)
    net = model.strip()
    if how == "parametrised":
        parametrize.register_parametrization(net[4], "weight", nn.Identity())
    elif how == "removed":
        del net[4], net[3], net[2]
    else:
        net[4] = nn.Linear(6, 4 if how == "other size" else 3).double()
    with pytest.raises(fxcurv.FxcurvError, match="not in its place any more"):
        step(model, x, y)
    step(fxcurv.transform(net, method, loss="cross_entropy"), x, y)


def test_a_new_tensor_in_its_place_is_followed() -> None:
    x, y = batch()
    model = make(kl_clip=None)
    step(model, x, y)
    model.strip()[4].weight = nn.Parameter(torch.randn(3, 6, dtype=torch.float64))
    plain = plain_gradient(model.strip(), x, y)
    step(model, x, y, lr=None)
    assert not torch.equal(model.strip()[4].weight.grad, plain[4]) and not model.uncovered


def test_groups_by_name() -> None:
    """Names are those of the plain model, so that recipes that split parameters by name apply."""
    x, y = batch()
    model, net = make(), mlp()
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in net.named_parameters()]
    decayed = [p for name, p in model.named_parameters() if name.endswith("weight")]
    rest = [p for name, p in model.named_parameters() if not name.endswith("weight")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    opt = torch.optim.AdamW(groups, lr=0.01)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt.zero_grad()
    out = model(x)
    model.backward(F.cross_entropy(out, y), out)
    model.precondition_()
    opt.step()
    for name, p in model.named_parameters():  # Adam's first step is the sign of the direction
        decay = 0.1 if name.endswith("weight") else 0.0
        expected = start[name] * (1 - 0.01 * decay) - 0.01 * p.grad / (p.grad.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), expected)
