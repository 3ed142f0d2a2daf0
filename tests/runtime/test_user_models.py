"""What a user does with models that nobody had in mind: they train, resume, copy, change batch size and dtype."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxcurv
from tests.runtime.steps import batch, descend, mlp, same, step
from tests.runtime.user_nets import CASES, Case, Output


def transformed(case: Case, method: str = "kfac", **options: Any) -> Any:
    torch.manual_seed(0)
    return fxcurv.transform(case.build().double(), method, loss=case.loss, **options)


def tensors(output: Any) -> list[Tensor]:
    return [output.logits, output.hidden] if isinstance(output, Output) else pytree.tree_leaves(output)


def train(case: Case, model: Any, opt: Any, x: Any, y: Tensor, steps: range) -> list[float]:
    losses = []
    for i in steps:
        torch.manual_seed(i)
        opt.zero_grad()
        loss, logits = case.value(model(*x), y)
        model.backward(loss, logits)
        opt.step()
        assert not (opt.info.fallback or opt.info.repaired or opt.info.kept)
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("method", ["kfac", "ekfac", "foof", "diag"])
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_users_model_and_it_trains(name: str, method: str):
    case = CASES[name]
    torch.manual_seed(1)
    x, y = case.batch(10)
    model = transformed(case, method, example_inputs=x)
    assert model.uncovered == ()
    plain = copy.deepcopy(model.strip())
    torch.manual_seed(2)
    output = model(*x)
    torch.manual_seed(2)
    expected = plain(*x)
    rounding = 1e-12 if name == "recurrent" else 0.0  # the exposed time loop adds in another order
    for mine, theirs in zip(tensors(output), tensors(expected), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rounding, atol=rounding)
    loss, logits = case.value(output, y)
    model.backward(loss, logits)
    case.value(expected, y)[0].backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad)
    losses = train(case, model, fxcurv.optimizer(model, lr=0.02), x, y, range(10))
    assert losses[-1] < losses[0]
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    model.eval()
    with torch.no_grad():
        assert tensors(model(*case.batch(3)[0]))[0].shape[0] == 3


@pytest.mark.parametrize("name", CASES)
def test_resumed_and_copied_runs_go_on_bit_for_bit(name: str):
    case = CASES[name]
    torch.manual_seed(1)
    x, y = case.batch(6)
    model = transformed(case, "ekfac", solve_every=3)
    opt = fxcurv.optimizer(model, lr=0.02)
    train(case, model, opt, x, y, range(2))
    runs = [(copy.deepcopy(model), copy.deepcopy(opt.state_dict()))]
    other = transformed(case, "ekfac", solve_every=3)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    runs.append((other, copy.deepcopy(opt.state_dict())))
    train(case, model, opt, x, y, range(2, 5))
    for run, state in runs:
        again = fxcurv.optimizer(run, lr=0.02)
        again.load_state_dict(state)
        train(case, run, again, x, y, range(2, 5))
        assert same(model.state_dict(), run.state_dict())
    train(case, model, opt, *case.batch(3), range(5, 6))


@pytest.mark.parametrize("name", ["table", "gpt", "attention", "raw", "vae"])
def test_export_trains_as_symbolic_does(name: str):
    case = CASES[name]
    torch.manual_seed(1)
    x, y = case.batch(6)
    runs = {}
    for frontend in ("symbolic", "export"):
        model = transformed(case, "kfac", example_inputs=x, frontend=frontend)
        assert model.report().frontend == frontend
        runs[frontend] = train(case, model, fxcurv.optimizer(model, lr=0.02), x, y, range(4))
        train(case, model, fxcurv.optimizer(model, lr=0.02), *case.batch(3), range(1))
    if name == "attention":  # export sees into nn.MultiheadAttention
        assert not model.uncovered and runs["export"][-1] < runs["export"][0]
    else:
        assert runs["export"] == pytest.approx(runs["symbolic"], rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", ["kfac", "ekfac", "diag"])
@pytest.mark.parametrize("name", ["table", "gpt", "separable", "raw"])
def test_the_dtype_may_change_between_steps(name: str, method: str, dtype: torch.dtype):
    case = CASES[name]
    torch.manual_seed(1)
    x, y = case.batch(8)

    def cast(to: torch.dtype) -> Any:
        return pytree.tree_map(lambda t: t.to(to) if t.is_floating_point() else t, x)

    model = transformed(case, method).float()
    opt = fxcurv.optimizer(model, lr=0.02)
    first = train(case, model, opt, cast(torch.float32), y, range(2))
    model.to(dtype)
    last = train(case, model, opt, cast(dtype), y, range(2, 8))
    assert last[-1] < first[0]


def test_a_compiled_model_may_run_backwards_twice():
    """torch has compiled graphs donate their saved buffers, and then refuses the pass for statistics."""
    torch._dynamo.reset()
    x, y = batch()
    model = fxcurv.transform(mlp(), "kfac", loss="cross_entropy")
    with torch._functorch.config.patch(donated_buffer=True):
        out = torch.compile(model, backend="eager")(x)
        assert not torch._functorch.config.donated_buffer
        model.backward(F.cross_entropy(out, y), out)
    assert not model.precondition_().fallback


def test_two_halves_of_one_network_have_their_own_steps():
    x, y = batch()
    front = fxcurv.transform(nn.Sequential(nn.Linear(5, 6), nn.Tanh()).double(), "kfac", loss="cross_entropy")
    back = fxcurv.transform(nn.Linear(6, 3).double(), "ekfac", loss="cross_entropy")
    plain = copy.deepcopy(nn.Sequential(front.strip(), back.strip()))
    out = back(front(x))
    loss = F.cross_entropy(out, y)
    front.backward(loss, out, retain_graph=True)
    back.backward(0 * loss, out)  # its statistics; the gradients are there already
    F.cross_entropy(plain(x), y).backward()
    grads = [p.grad for model in (front, back) for p in model.parameters()]
    torch.testing.assert_close(grads, [p.grad for p in plain.parameters()])
    assert front.precondition_().terms == back.precondition_().terms == 12


@pytest.mark.parametrize("method", ["kfac", "shampoo", "adahessian"])
def test_layers_frozen_after_the_transform_stay(method: str):
    x, y = batch()
    model = fxcurv.transform(mlp(), method, loss="cross_entropy")
    step(model, x, y, lr=0.01)
    first = model.strip()[0]
    first.requires_grad_(False)
    before, other = first.weight.clone(), model.strip()[2].weight.clone()
    for _ in range(2):
        model.zero_grad()
        step(model, x, y, lr=0.01)
    assert torch.equal(first.weight, before) and not torch.equal(model.strip()[2].weight, other)


def test_hessian_free_moves_no_frozen_layer():
    x, y = batch()
    model = fxcurv.transform(mlp(), "hessian_free", loss="cross_entropy")
    opt = fxcurv.optimizer(model)

    def closure() -> Tensor:
        opt.zero_grad()
        out = model(x)
        loss = F.cross_entropy(out, y)
        model.backward(loss, out)
        return loss

    start = float(opt.step(closure).detach())
    first = model.strip()[0]
    first.requires_grad_(False)
    before = first.weight.clone()
    assert [float(opt.step(closure).detach()) for _ in range(3)][-1] < start
    assert torch.equal(first.weight, before)
    with pytest.raises(fxcurv.FxcurvError, match="must return the loss"):
        opt.step(lambda: None)  # type: ignore[arg-type, return-value]


def test_a_layer_unfrozen_after_the_transform_is_reported():
    net = mlp()
    net[0].requires_grad_(False)
    model = fxcurv.transform(net, "kfac", loss="cross_entropy")
    assert not model.uncovered
    net[0].requires_grad_(True)
    assert {name for name, reason in model.uncovered if "frozen" in reason} == {"0.weight", "0.bias"}


@pytest.mark.parametrize("method", ["kfac", "shampoo", "adam"])
def test_a_direction_is_not_preconditioned_again(method: str):
    x, y = batch()
    options = {} if method == "adam" else {"factor_every": 2}
    model = fxcurv.transform(mlp(), method, loss="cross_entropy", **options)
    step(model, x, y)
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(fxcurv.FxcurvError, match="already"):
        model.precondition_()
    assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), before, strict=True))
    for set_to_none in (False, True):  # the same tensors and new ones, both filled anew
        for _ in range(2):
            model.zero_grad(set_to_none)
            out = model(x)
            model.backward(F.cross_entropy(out, y), out)
            model.precondition_()
            descend(model)


def test_a_failing_export_prints_nothing(capfd: pytest.CaptureFixture[str]):
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.mean() > 0 else self.a(-x)

    with pytest.raises(fxcurv.FxcurvError, match="Python branch"):
        fxcurv.transform(Branch().double(), example_inputs=(batch()[0],), frontend="export")
    assert fxcurv.transform(Branch().double(), example_inputs=(batch()[0],)).report().frontend == "dynamo"
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


X = torch.randn(4, 5, dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"example_inputs": X}, "pass a tuple"),
        ({"example_inputs": (X[:, :3],)}, r"Sequential itself fails on the example inputs \(RuntimeError: mat1"),
        ({"method": 3}, "pass a name or a Method"),
        ({"damping": "big"}, "must be a number"),
        ({"damping": float("nan")}, "must not be negative"),
        ({"factor_every": 1.5}, "whole number"),
        ({"ema": 1.5}, "at most 1"),
    ],
)
def test_mistakes_at_the_transform(options: dict[str, Any], sentence: str):
    with pytest.raises(fxcurv.FxcurvError, match=sentence):
        fxcurv.transform(mlp(), **{"method": "kfac", "loss": "cross_entropy", **options})


@pytest.mark.parametrize("options", [{}, {"fisher": "ggn"}, {"fisher": "empirical"}, {"method": "adahessian"}])
def test_outputs_of_another_model_are_refused_in_every_step(options: dict[str, Any]):
    x, y = batch()
    model = fxcurv.transform(mlp(), **{"method": "kfac", "loss": "cross_entropy", **options})
    for _ in range(2):
        out = mlp()(x)
        with pytest.raises(fxcurv.FxcurvError, match="do not come from a recorded|does not depend on"):
            model.backward(F.cross_entropy(out, y), out)
        step(model, x, y)


def test_mistakes_at_the_step():
    x, y = batch()
    model = fxcurv.transform(mlp(), "kfac", loss="cross_entropy")
    out = model(x)
    loss = F.cross_entropy(out, y)
    for arguments, sentence in [
        ((loss.item(), out), "got a float"),
        ((loss, (out,)), "are a tuple"),
        ((loss, {"logits": out}), "are a dict"),
        ((loss, mlp()(x)), "do not come from a recorded forward"),
    ]:
        with pytest.raises(fxcurv.FxcurvError, match=sentence):
            model.backward(*arguments)
    model.backward(loss, out)
    assert not model.precondition_().fallback
    with pytest.raises(fxcurv.FxcurvError, match="sub-module '1' is transformed already"):
        fxcurv.transform(nn.Sequential(nn.Linear(5, 5).double(), model))


def test_trials_of_hessian_free_leave_no_trace():
    """One move of BatchNorm's averages a step, one draw of the dropout mask, and gradients that are still there."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)).double()
    model = fxcurv.transform(net, "hessian_free", loss="cross_entropy")
    opt, (x, y) = fxcurv.optimizer(model), batch()
    masks = []
    net[3].register_forward_hook(lambda module, inputs, output: masks.append(output.detach() == 0))

    def closure() -> Tensor:
        opt.zero_grad()
        out = model(x)
        loss = F.cross_entropy(out, y)
        model.backward(loss, out)
        return loss

    firsts = []
    for i in range(3):
        masks.clear()
        opt.step(closure)
        assert int(net[1].num_batches_tracked) == i + 1
        assert len(masks) > 2 and all(torch.equal(mask, masks[0]) for mask in masks)
        assert all(p.grad is not None for p in net.parameters())
        firsts.append(masks[0])
    assert not torch.equal(firsts[0], firsts[1])
