"""Every style of the public libraries is covered whole, equals the plain model in both modes, and trains."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fxcurv
from tests.runtime.library_nets import LIBRARY_CASES, ModelOutput
from tests.runtime.user_nets import Case


def transformed(case: Case, x: tuple[Any, ...], method: str) -> Any:
    torch.manual_seed(0)
    return fxcurv.transform(case.build().double(), method, loss=case.loss, example_inputs=x)


def run(case: Case, model: Any, x: tuple[Any, ...], y: Tensor) -> tuple[Tensor, Tensor, Any]:
    """Loss, the tensor that went into it and the output, with the draws of the forward fixed."""
    torch.manual_seed(2)
    output = model(*x)
    return (*case.value(output, y), output)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LIBRARY_CASES)
def test_it_is_covered_whole_and_equals_the_plain_model(name: str, training: bool):
    case = LIBRARY_CASES[name]
    torch.manual_seed(1)
    x, y = case.batch(6)
    model = transformed(case, x, "kfac").train(training)
    assert model.uncovered == () and model.report().covered == 1.0
    plain = copy.deepcopy(model.strip())
    model.due(statistics=True)
    loss, logits, output = run(case, model, x, y)
    expected, theirs, plain_output = run(case, plain, x, y)
    assert type(output) is type(plain_output)
    if isinstance(output, ModelOutput):
        assert output.loss is None and len(output.hidden) == 1
    torch.testing.assert_close(logits, theirs, rtol=1e-12, atol=1e-12)
    model.backward(loss, logits)
    expected.backward()
    grads = {key: p.grad for key, p in plain.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    torch.testing.assert_close({key: p.grad for key, p in model.named_parameters()}, grads)
    torch.testing.assert_close(dict(model.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", LIBRARY_CASES)
def test_it_trains(name: str, method: str):
    case = LIBRARY_CASES[name]
    torch.manual_seed(1)
    x, y = case.batch(6)
    model = transformed(case, x, method)
    opt = fxcurv.optimizer(model, lr=0.005)
    losses = []
    for _ in range(10):
        opt.zero_grad()
        loss, logits, _ = run(case, model, x, y)
        model.backward(loss, logits)
        opt.step()
        assert not (opt.info.fallback or opt.info.repaired or opt.info.kept)
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    other, labels = case.batch(3)  # another batch size
    opt.zero_grad()
    loss, logits, _ = run(case, model, other, labels)
    model.backward(loss, logits)
    opt.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
