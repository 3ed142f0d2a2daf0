"""Nothing becomes NaN because of curvature, no state is lost, and a wrong call is one clear sentence."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcurv
from tests.runtime.steps import batch, descend, mlp, same, states, step

LAYERWISE = ["kfac", "ekfac", "foof", "diag"]


def make(net: nn.Module, method: str = "kfac", **options: Any) -> Any:
    return fxcurv.transform(net, method, loss="cross_entropy", **options)


def grads_finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


# Wrong calls ----------------------------------------------------------------------------------------------------------


def test_plain_backward_of_a_sampled_fisher_says_what_to_call():
    x, y = batch()
    model = make(mlp())
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(fxcurv.FxcurvError, match=r"model\.backward\(loss, outputs\)"):
        model.precondition_()


def test_mixed_sources_raise():
    x, y = batch()
    model = make(mlp())
    out = model(x)
    model.backward(F.cross_entropy(out, y), out)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(fxcurv.FxcurvError, match="loss.backward"):
        model.precondition_()
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    out = model(x)
    with pytest.raises(fxcurv.FxcurvError, match="already filled"):
        model.backward(F.cross_entropy(out, y), out)


def test_no_statistics_raise():
    model = make(mlp())
    with pytest.raises(fxcurv.FxcurvError, match="no statistics have arrived"):
        model.precondition_()


def test_missing_outputs_loss_and_targets_raise():
    x, y = batch()
    model = make(mlp())
    out = model(x)
    with pytest.raises(fxcurv.FxcurvError, match="given to the loss function"):
        model.backward(F.cross_entropy(out, y))
    weighted = fxcurv.transform(mlp(), "kfac", loss=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]).double()))
    out = weighted(x)
    with pytest.raises(fxcurv.FxcurvError, match="targets"):
        weighted.backward(F.cross_entropy(out, y), out)


def test_whole_optimizers_refuse_precondition():
    model = fxcurv.transform(mlp(), "hessian_free", loss="cross_entropy")
    with pytest.raises(fxcurv.FxcurvError, match=r"fxcurv\.optimizer"):
        model.precondition_()
    with pytest.raises(fxcurv.FxcurvError, match="closure"):
        fxcurv.optimizer(model).step()


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"method": "kfca"}, "did you mean .*kfac"),
        ({"dampin": 1.0}, "no hyper-parameter 'dampin'.*damping"),
        ({"frontend": "magic"}, "front-end 'magic'"),
        ({"backend": "magic"}, "no backend .magic."),
        ({"loss": "crossentropy"}, "cross_entropy"),
        ({"fisher": "exact"}, "fisher='exact'.*ggn"),
        ({"damping": -1.0}, "damping=-1.0 must not be negative"),
        ({"solve_every": 0}, "solve_every=0"),
        ({"sharing": "both"}, "sharing='both'"),
        ({"proofs": ["magic"]}, "no proof 'magic'"),
        ({"disable": ["magic"]}, "no pass 'magic'"),
        ({"on_nonfinite": "magic"}, "on_nonfinite='magic'"),
    ],
)
def test_unknown_settings(kwargs: dict[str, Any], text: str):
    with pytest.raises(fxcurv.FxcurvError, match=text):
        fxcurv.transform(mlp(), **kwargs)


def test_wrong_models():
    with pytest.raises(fxcurv.FxcurvError, match="nn.Module"):
        fxcurv.transform(nn.Linear)
    with pytest.raises(fxcurv.FxcurvError, match="transformed already"):
        fxcurv.transform(fxcurv.transform(mlp()))
    frozen = mlp()
    frozen.requires_grad_(False)
    with pytest.raises(fxcurv.FxcurvError, match="no trainable parameter"):
        fxcurv.transform(frozen)


# Abandoned steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("how", ["zero_grad", "discard", "optimizer", "zeroed"])
def test_abandoned_step_leaves_no_statistics(fisher: str, how: str):
    x, y = batch()
    reference, model = (make(mlp(), fisher=fisher) for _ in range(2))
    model.load_state_dict(reference.state_dict())
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    other, other_y = batch(seed=5)
    out = model(other)
    model.backward(F.cross_entropy(out, other_y), out)
    model(other)  # a forward whose graph is dropped
    if how == "zero_grad":
        model.zero_grad()
    elif how == "discard":
        model.discard()
        for p in model.parameters():
            p.grad = None
    else:
        opt.zero_grad(set_to_none=how == "optimizer")
    for m in (reference, model):
        out = m(x)
        m.backward(F.cross_entropy(out, y), out)
        m.precondition_()
    assert same(states(reference), states(model))


def test_gradients_are_the_plain_ones_after_backward():
    x, y = batch()
    net = mlp()
    F.cross_entropy(net(x), y).backward()
    plain = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    for fisher in ("mc", "ggn", "ggn_signs", "empirical"):
        model = make(net, fisher=fisher)
        model.zero_grad()
        out = model(x)
        model.backward(F.cross_entropy(out, y), out)
        assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), plain, strict=True))


# Bad numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", LAYERWISE)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_batch_changes_no_state(method: str, bad: float):
    torch.manual_seed(0)
    model = make(mlp(), method, solve_every=1)
    for i in range(2):
        step(model, *batch(seed=i))
    before = states(model)
    x, y = batch(seed=7)
    x[3, 2] = bad
    with pytest.warns(fxcurv.FxcurvWarning, match="plain gradient"):
        info = step(model, x, y, lr=None)
    assert "0" in info.fallback and (bad != bad) == (set(info.fallback) == {"0", "2", "4"})
    after = states(model)
    untouched = [k for k in before if k.split(".")[1] in info.fallback]
    assert untouched and all(torch.equal(before[k], after[k]) for k in untouched)
    model.zero_grad()
    for i in range(2):
        info = step(model, *batch(seed=i))
        assert not info.fallback and grads_finite(model)


def test_a_bad_batch_in_the_first_step():
    model = make(mlp())
    x, y = batch()
    x[0, 0] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step(model, x, y, lr=None)
    assert bool(model.state_dict()["curvature.overdue"])
    for i in range(3):
        info = step(model, *batch(seed=i))
        assert info.refresh == (i == 0) and not info.fallback and grads_finite(model)
        assert all(p.grad.any() for p in model.parameters())


def test_bad_batch_can_raise():
    model = make(mlp(), on_nonfinite="raise")
    x, y = batch()
    x[0, 0] = float("nan")
    before = states(model)
    with pytest.raises(fxcurv.FxcurvError, match="not finite in"):
        step(model, x, y)
    assert same(before, states(model))


def test_only_the_bad_layer_falls_back():
    x, y = batch()
    net = mlp()
    model = make(net)
    out = model(x)
    model.backward(F.cross_entropy(out, y), out)
    net[2].weight.grad[0, 0] = float("inf")
    kept = net[2].bias.grad.clone()
    with pytest.warns(fxcurv.FxcurvWarning):
        info = model.precondition_()
    assert info.fallback == ("2",) and torch.equal(net[2].bias.grad, kept)
    assert torch.isfinite(net[0].weight.grad).all() and torch.isfinite(net[4].weight.grad).all()
    assert 0 < info.kl_scale <= 1


def test_optimizer_skips_a_step_with_bad_gradients():
    net = mlp()
    model = make(net)
    opt = fxcurv.optimizer(model, lr=0.1)
    x, y = batch()
    x[0, 0] = float("nan")
    before = [p.clone() for p in net.parameters()]
    out = model(x)
    model.backward(F.cross_entropy(out, y), out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("method", [*LAYERWISE, "shampoo", "adam", "sgd"])
def test_hard_batches_stay_finite(method: str):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 3))
    with torch.no_grad():
        net[0].bias[:3] = -1e3  # dead units
    model = make(net, method, solve_every=1)
    one = batch(1, torch.float32)
    zero = torch.zeros(4, 5), torch.zeros(4, dtype=torch.long)
    equal = torch.ones(6, 5), torch.zeros(6, dtype=torch.long)  # rank one
    for x, y in (one, zero, equal, one, batch(dtype=torch.float32)):
        info = step(model, x, y, lr=0.01)
        assert grads_finite(model) and not info.fallback


def test_all_zero_gradients():
    net = mlp()
    model = make(net, fisher="empirical", kl_clip=1e-3)
    x, _ = batch()
    out = model(x)
    model.backward((out * 0.0).sum(), out)
    info = model.precondition_()
    assert info.kl_scale == 1.0 and all(not p.grad.any() for p in net.parameters())


def test_empty_batch():
    net = mlp()
    model = make(net)
    step(model, *batch())
    before = states(model)
    x, y = batch(0)
    out = model(x)
    model.backward(out.sum() * 0.0, out)
    model.precondition_()
    after = states(model)
    assert all(torch.equal(before[k], after[k]) for k in before if k.endswith((".A", ".G", ".updates")))


def test_frozen_layer_and_frozen_bias():
    x, y = batch()
    net = mlp()
    net[2].requires_grad_(False)
    net[0].bias.requires_grad_(False)
    model = make(net)
    step(model, x, y)
    assert net[2].weight.grad is None and net[0].bias.grad is None
    assert model.factors("0")["A"].shape == (5, 5) and [layer.name for layer in model.layers] == ["0", "4"]


def test_a_parameter_unused_in_one_step():
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor, deep: bool = True) -> Tensor:
            x = torch.tanh(self.a(x))
            return self.c(torch.tanh(self.b(x)) if deep else x)

    x, y = batch()
    net = Skips().double()
    model = make(net)
    step(model, x, y)
    before = states(model)
    model.zero_grad()
    out = model(x, deep=False)
    model.backward(F.cross_entropy(out, y), out)
    info = model.precondition_()
    after = states(model)
    assert net.b.weight.grad is None and not info.fallback
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("curvature.b."))
    assert not torch.equal(before["curvature.a.G"], after["curvature.a.G"])


# Failing factorisations -----------------------------------------------------------------------------------------------


def test_failed_cholesky_is_repaired(tmp_path: Path):
    net = mlp(torch.float32)
    model = make(net, solve_every=1, damping=1e-12, damping_scheme="sqrt", dump_failures=tmp_path / "failed")
    x, y = batch(dtype=torch.float32)
    step(model, x, y)
    indefinite = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, -1e-7]))
    role = model._engine.states.by_key["0.A"]
    model._engine.states.values[role] = indefinite * 1e3
    model.hyper["ema"] = 1.0
    role = model._engine.states.by_key["0.updates"]
    model._engine.states.values[role] = torch.tensor(1e9)
    info = step(model, x, y, lr=0.0)
    assert info.repaired == ("0",) and not info.kept and not info.fallback
    assert grads_finite(model) and torch.isfinite(states(model)["curvature.0.A.inverse"]).all()
    (path,) = (tmp_path / "failed").iterdir()
    failing = torch.load(path, weights_only=True)
    assert path.name == "failed-1.pt" and {key.partition(".")[0] for key in failing} == {"0"}
    torch.testing.assert_close(failing["0.A"], indefinite * 1e3)
    assert torch.isnan(failing["0.A.inverse"]).any()


def test_hopeless_factor_keeps_the_previous_inverse():
    net = mlp(torch.float32)
    model = make(net, solve_every=1, damping=1e-3, damping_scheme="sqrt")
    x, y = batch(dtype=torch.float32)
    step(model, x, y)
    before = states(model)["curvature.0.A.inverse"]
    role = model._engine.states.by_key["0.A"]
    model._engine.states.values[role] = -1e9 * torch.eye(6)
    with pytest.warns(fxcurv.FxcurvWarning, match="previous factorisation"):
        info = step(model, x, y, lr=0.0)
    assert info.kept == ("0",) and grads_finite(model)
    assert torch.equal(states(model)["curvature.0.A.inverse"], before)


# Number formats -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", LAYERWISE)
def test_bfloat16_model(method: str):
    net = mlp(torch.bfloat16)
    model = make(net, method)
    x, y = batch(dtype=torch.bfloat16)
    for _ in range(3):
        step(model, x, y)
    assert grads_finite(model) and net[0].weight.dtype == torch.bfloat16
    assert all(v.dtype == torch.float32 for k, v in states(model).items() if k.split(".")[1].isdigit())


def test_autocast():
    net = mlp(torch.float32)
    model = make(net)
    x, y = batch(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
        loss = F.cross_entropy(out.float(), y)
    model.backward(loss, out)
    assert not model.precondition_().fallback and grads_finite(model)
    assert states(model)["curvature.0.G"].dtype == torch.float32


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_gives_the_unscaled_step(fisher: str, unscale: bool):
    x, y = batch()
    net = mlp()
    start = {k: v.clone() for k, v in net.state_dict().items()}
    ends = []
    for scale in (None, 1024.0):
        net.load_state_dict(start)
        model = make(net, fisher=fisher, kl_clip=1e-3)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        model.zero_grad()
        out = model(x)
        model.backward(scaler.scale(F.cross_entropy(out, y)), out)
        if unscale and scale:
            scaler.unscale_(opt)
        info = model.precondition_(scaler)
        scaler.step(opt)
        scaler.update()
        ends.append((info.kl_scale, {k: v.clone() for k, v in net.state_dict().items()}))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-12)
    assert all(torch.allclose(ends[0][1][k], ends[1][1][k], rtol=1e-12, atol=1e-14) for k in start)


@pytest.mark.parametrize("unscale", [False, True])
def test_overflow_under_a_grad_scaler_changes_nothing(unscale: bool):
    net = mlp(torch.float16)
    model = make(net, fisher="empirical")
    x, y = batch(dtype=torch.float16)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    out = model(x)
    model.backward(scaler.scale(F.cross_entropy(out.float(), y)) * 1e6, out)
    assert not grads_finite(model)
    if unscale:
        net_before = [p.clone() for p in net.parameters()]
        with pytest.raises(ValueError, match="FP16"):
            scaler.unscale_(opt)  # torch refuses fp16 gradients here; autocast keeps fp32 ones
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), net_before, strict=True))
    before, grads = states(model), [p.grad.clone() for p in net.parameters()]
    info = model.precondition_(scaler)
    assert info.skipped and same(before, states(model))
    assert all(torch.equal(p.grad.nan_to_num(), g.nan_to_num()) for p, g in zip(net.parameters(), grads, strict=True))
    step(model, x, y, lr=0.0)


def test_channels_last_and_non_contiguous():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).double()
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 1, 0])
    model = make(net, fisher="ggn")
    step(model, x, y, lr=0.0)
    reference = states(model), [p.grad.clone() for p in net.parameters()]
    net = net.to(memory_format=torch.channels_last)
    model = make(net, fisher="ggn")
    for data in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        fresh = make(net, fisher="ggn")
        step(fresh, data, y, lr=0.0)
        for key, value in states(fresh).items():
            assert torch.allclose(value, reference[0][key], rtol=1e-9, atol=1e-12), key
        for p, g in zip(net.parameters(), reference[1], strict=True):
            assert torch.allclose(p.grad, g, rtol=1e-9, atol=1e-12)


def test_large_vocabulary_never_allocates_its_square():
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50_000, 8)
            self.head = nn.Linear(8, 50_000, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, t: Tensor) -> Tensor:
            return self.head(torch.tanh(self.embed(t)))

    model = make(Words())
    t = torch.randint(0, 50_000, (6,))
    out = model(t)
    model.backward(F.cross_entropy(out, t), out)
    info = model.precondition_()
    assert not info.fallback and max(v.numel() for v in states(model).values()) <= 50_000
    assert model.layers[0].note and "diagonal" in model.report().rows[0].reason


def test_in_place_operations_right_after_a_layer():
    x, y = batch()

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu_(self.a(x))
            h = self.b(h)
            h += 1.0
            h[:, 0].mul_(2.0)
            return self.c(h)

    net = InPlace().double()
    F.cross_entropy(net(x), y).backward()
    plain = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    model = make(net, fisher="ggn")
    out = model(x)
    model.backward(F.cross_entropy(out, y), out)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), plain, strict=True))
    assert not model.precondition_().fallback


def test_gradient_penalty_through_the_model():
    x, y = batch()
    model = make(mlp(), fisher="empirical")
    x.requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(x), y), x, create_graph=True)
    assert grad.requires_grad
    descend(model)


def test_summed_loss_gives_the_mean_losses_step_between_statistics_too():
    x, y = batch()
    net = mlp()
    start = {k: v.clone() for k, v in net.state_dict().items()}
    directions = []
    for reduction in ("mean", "sum"):
        net.load_state_dict(start)
        model = fxcurv.transform(
            net, "kfac", loss=nn.CrossEntropyLoss(reduction=reduction), factor_every=2, kl_clip=None
        )
        for _ in range(2):
            model.zero_grad()
            out = model(x)
            model.backward(F.cross_entropy(out, y, reduction=reduction), out)
            model.precondition_()
        directions.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(*directions, strict=True))
    with pytest.raises(fxcurv.FxcurvError, match="mean loss"):
        fxcurv.transform(net, "hessian_free", loss=nn.CrossEntropyLoss(reduction="sum"))


def test_mixed_precision_of_parameters():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x.float()).double())

    x, y = batch()
    for method in ("kfac", "shampoo", "adam", "adahessian"):
        model = make(Mixed(), method)
        step(model, x, y)
        assert grads_finite(model)


@dataclass
class Output:
    """What a model library returns."""

    logits: Tensor
    note: str = ""


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Output:
        return Output(self.inner(x))


def test_terms_are_counted_in_outputs_of_any_class():
    x, y = batch()
    model = fxcurv.transform(Wrapped(), "kfac")
    out = model(x)
    assert isinstance(out, Output) and out.note == ""
    F.cross_entropy(out.logits, y).backward()
    info = model.precondition_()
    assert info.terms == len(x) and model.factors("inner.4")["G"].any()


def test_a_loss_past_the_outputs_is_an_error():
    x, _ = batch()
    model = fxcurv.transform(mlp(), "kfac")
    seen = []
    model.strip()[2].register_forward_hook(lambda module, args, output: seen.append(output))
    model(x)
    seen[-1].square().mean().backward()
    with pytest.raises(fxcurv.FxcurvError, match=r"none of its outputs|no statistics"):
        model.precondition_()
