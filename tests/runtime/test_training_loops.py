"""What people write in a training loop works on a transformed model, or is refused in one sentence."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import lr_scheduler

import fxcurv
from tests.runtime.steps import batch, descend, grads, make, mlp, plain_gradient, same, step


class Reader(nn.Module):
    """Attention over a sequence of any length, one answer for each position."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.head = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2) / 2, -1)
        return self.head(scores @ self.v(x)).transpose(1, 2)


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_batch_size_and_length_change_after_the_capture(frontend: str, method: str) -> None:
    """Factors after the change are those of a model that was transformed at the new size."""
    torch.manual_seed(0)
    net = Reader().double()
    sizes = [(4, 5), (7, 5), (3, 9), (1, 2), (4, 5)]
    example = torch.randn(*sizes[0], 4).double()
    model = fxcurv.transform(
        net, method, loss="cross_entropy", example_inputs=(example,), frontend=frontend, ema=0.0, fisher="empirical"
    )
    for size in sizes:
        x, y = torch.randn(*size, 4).double(), torch.randint(0, 4, size)
        fresh = fxcurv.transform(
            copy.deepcopy(net), method, loss="cross_entropy", frontend="symbolic", ema=0.0, fisher="empirical"
        )
        expected = plain_gradient(net, x, y)
        for one in (model, fresh):
            one.zero_grad()
            out = one(x)
            one.backward(F.cross_entropy(out, y), out)
            torch.testing.assert_close(grads(one), expected)
            assert one.precondition_().terms == size[0] * size[1]
        for name in ("q", "k", "v", "head"):
            torch.testing.assert_close(model.factors(name)["A"], fresh.factors(name)["A"])
            torch.testing.assert_close(model.factors(name)["G"], fresh.factors(name)["G"])
        descend(model, 0.01)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("where", ["between steps", "before the backward"])
def test_inference_leaves_no_trace_on_training(guard: Callable[[], Any], where: str) -> None:
    """Validation and generation in evaluation or training mode, between steps or within one."""
    ends = []
    for look in (False, True):
        model = make("ekfac")
        for i in range(3):
            x, y = batch(seed=i)
            model.zero_grad()
            out = model(x) if where == "before the backward" else None
            if look:
                with guard():
                    for training in (False, True):
                        model.train(training)
                        for length in (1, 4):
                            assert not model(x[:length]).requires_grad
            out = model(x) if out is None else out
            model.backward(F.cross_entropy(out, y), out)
            assert model.precondition_().terms == 12
            descend(model)
        ends.append(model.state_dict())
    assert same(*ends)


def test_an_eval_epoch_with_gradients_asks_for_training_mode() -> None:
    model = make()
    model.eval()
    x, y = batch()
    out = model(x)
    model.backward(F.cross_entropy(out, y), out)
    with pytest.raises(fxcurv.FxcurvError, match="in training mode"):
        model.precondition_()
    model.train()
    step(model, x, y)


@pytest.mark.parametrize("fisher", ["mc", "empirical", "ggn"])
def test_training_under_autocast(fisher: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))
    model = fxcurv.transform(net, "kfac", loss="cross_entropy", fisher=fisher)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(32, 1, 5, 5), torch.randint(0, 3, (32,))
    losses = []
    for _ in range(10):
        opt.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x)
            assert out.dtype == torch.bfloat16
            loss = F.cross_entropy(out, y)
        model.backward(loss, out)
        assert not model.precondition_().fallback
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_clipping_before_and_after() -> None:
    """Before, it scales the gradient that is preconditioned; after, the direction, whose norm it then bounds."""
    x, y = batch()
    whole, before, after = (make(kl_clip=None) for _ in range(3))
    for model in (whole, before, after):
        model.zero_grad()
        out = model(x)
        model.backward(F.cross_entropy(out, y), out)
        norm = clip_grad_norm_(model.parameters(), 0.1) if model is before else torch.ones(())
        model.precondition_()
        if model is before:
            torch.testing.assert_close(grads(before), [g * (0.1 / (norm + 1e-6)) for g in grads(whole)])
        if model is after:
            norm = clip_grad_norm_(model.parameters(), 0.1)
            torch.testing.assert_close(grads(after), [g * (0.1 / (norm + 1e-6)) for g in grads(whole)])
            total = torch.stack([g.norm() for g in grads(after)]).norm()
            torch.testing.assert_close(total, torch.tensor(0.1).double(), rtol=1e-4, atol=0)


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "one cycle": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.2, total_steps=8),
    "plateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=0),
    "cosine": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, T_0=3),
    "chain": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.1, total_iters=3), lr_scheduler.StepLR(opt, 2)], [3]
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_drive_our_optimizer_as_they_drive_torch(schedule: str) -> None:
    """The same rates, and the same parameters after them: SGD with momentum on the direction is what ours does."""
    ends = []
    for own in (False, True):
        model = make()
        make_optimizer = fxcurv.optimizer if own else lambda m, **o: torch.optim.SGD(m.parameters(), **o)
        opt = make_optimizer(model, lr=0.05, momentum=0.9)
        schedule_ = SCHEDULES[schedule](opt)
        rates = []
        for i in range(6):
            x, y = batch(seed=i)
            opt.zero_grad()
            out = model(x)
            loss = F.cross_entropy(out, y)
            model.backward(loss, out)
            # the learning rate enters the KL clip of our optimizer, and not that of precondition_
            model.hyper["kl_clip"] = 1e9
            if not own:
                model.precondition_()
            opt.step()
            schedule_.step(*([float(i)] if schedule == "plateau" else []))
            rates.append((opt.param_groups[0]["lr"], opt.param_groups[0]["momentum"]))
        ends.append((rates, [p.detach().clone() for p in model.parameters()]))
    assert ends[0][0] == ends[1][0] and len({rate for rate, _ in ends[0][0]}) > 2
    torch.testing.assert_close(ends[0][1], ends[1][1])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_foreach_and_fused_optimizers_do_the_same(kind: Any) -> None:
    ends = []
    for options in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        model = make()
        opt = kind(model.parameters(), lr=0.01, **options)
        for i in range(3):
            opt.zero_grad()
            x, y = batch(seed=i)
            out = model(x)
            model.backward(F.cross_entropy(out, y), out)
            model.precondition_()
            opt.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(ends[0], ends[1])
    torch.testing.assert_close(ends[0], ends[2])


def test_torchs_lbfgs_sees_the_plain_gradient() -> None:
    """An optimizer that evaluates the loss several times a step, with a closure that preconditions nothing."""
    x, y = batch()
    ends = []
    for transformed in (False, True):
        model = make() if transformed else mlp()
        torch.manual_seed(0)
        if not transformed:
            model.load_state_dict(make().strip().state_dict())
        opt = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4, line_search_fn="strong_wolfe")

        def closure(model: Any = model, opt: Any = opt, transformed: bool = transformed) -> Tensor:
            opt.zero_grad()
            out = model(x)
            loss = F.cross_entropy(out, y)
            if transformed:
                model.backward(loss, out)
            else:
                loss.backward()
            return loss

        for _ in range(3):
            opt.step(closure)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


@pytest.mark.parametrize("layout", ["classes last", "classes second"])
def test_terms_of_a_plain_backward_pass_in_either_layout(layout: str) -> None:
    """The gradient at the model's output tells which axis the classes are on."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.read(x)
            return y if layout == "classes last" else y.transpose(1, 2)

    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(3, 7, 4, generator=draw), torch.randint(5, (3, 7), generator=draw)
    torch.manual_seed(0)
    model = fxcurv.transform(
        Tokens(), "kfac", example_inputs=(x,), loss="cross_entropy", fisher="empirical", ema=0.0, kl_clip=None
    )
    out = model(x)
    flat = out if layout == "classes last" else out.transpose(1, 2)
    g = torch.softmax(flat.detach(), -1) - nn.functional.one_hot(y, 5)
    nn.functional.cross_entropy(flat.reshape(-1, 5), y.flatten()).backward()
    info = model.precondition_()
    assert info.terms == 21
    torch.testing.assert_close(model.factors("read")["G"], torch.einsum("bsi,bsj->ij", g, g) / 21)


@pytest.mark.parametrize("nesterov", [False, True])
def test_our_momentum_is_that_of_torch(nesterov: bool) -> None:
    def run(ours: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        model = fxcurv.transform(net, "kfac", loss="cross_entropy", lr=0.1, nesterov=nesterov)
        if ours:
            opt: torch.optim.Optimizer = fxcurv.optimizer(model, momentum=0.8)
        else:
            opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8, nesterov=nesterov)
        x, y = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 0, 1])
        for _ in range(4):
            opt.zero_grad()
            out = model(x)
            loss = F.cross_entropy(out, y)
            model.backward(loss, out)
            if not ours:
                model.precondition_()
            opt.step()
        return list(model.parameters())

    for mine, theirs in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(mine, theirs)
