"""CurvatureModule stays the user's model: names, tensors, modes, copies, nesting."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcurv
from tests.runtime.steps import batch, descend, mlp, same, states, step


class Clashing(nn.Module):
    """Sub-modules with the names of CurvatureModule's own attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 4), nn.Linear(4, 4)])
        self.graph = nn.Linear(4, 4)
        self.program = nn.Linear(4, 3)
        self.hyper = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.program(torch.relu_(self.graph(self.hyper(x))))


def test_user_modules_with_our_names():
    net = Clashing().double()
    model = fxcurv.transform(net, "ekfac", loss="cross_entropy")
    assert isinstance(model.layers, tuple) and len(model.layers) == 5
    assert model.strip().layers is net.layers
    assert dict(model.named_parameters()).keys() == dict(net.named_parameters()).keys()
    x, y = batch()
    before = [p.clone() for p in net.parameters()]
    step(model, x, y)
    assert all(not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_same_tensors_and_names():
    net = mlp()
    model = fxcurv.transform(net, "kfac", loss="cross_entropy")
    for (name, p), (other, q) in zip(model.named_parameters(), net.named_parameters(), strict=True):
        assert name == other and p is q
    assert set(net.state_dict()) <= set(model.state_dict())
    assert all(key.startswith("curvature.") for key in set(model.state_dict()) - set(net.state_dict()))
    assert all(isinstance(value, Tensor) for value in model.state_dict().values())
    assert model.strip() is net
    pickle.loads(pickle.dumps(net))


def test_unknown_attributes_fall_through():
    net = mlp()
    net.tokenizer = "words"
    model = fxcurv.transform(net, "kfac", loss="cross_entropy")
    assert model.tokenizer == "words"
    with pytest.raises(AttributeError):
        _ = model.missing


class Parent(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 5, dtype=torch.float64)
        self.body = body
        self.head = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(torch.tanh(self.stem(x)))))


def test_nested_in_a_parent():
    x, y = batch()
    plain = Parent(mlp())
    twin = copy.deepcopy(plain)
    parent = Parent(fxcurv.transform(plain.body, "kfac", loss="cross_entropy", seed=3))
    parent.stem, parent.head = plain.stem, plain.head
    out = parent(x)
    parent.body.backward(F.cross_entropy(out, y), out)
    F.cross_entropy(twin(x), y).backward()
    for p, q in zip(plain.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    parent.body.precondition_()
    assert torch.equal(plain.stem.weight.grad, twin.stem.weight.grad)
    assert not torch.equal(plain.body[0].weight.grad, twin.body[0].weight.grad)
    saved = copy.deepcopy(parent.state_dict())
    assert "body.curvature.0.A" in saved and "stem.weight" in saved
    fresh = Parent(fxcurv.transform(mlp(), "kfac", loss="cross_entropy", seed=3))
    fresh.load_state_dict(saved)
    assert same(states(parent), states(fresh)) and same(parent.state_dict(), fresh.state_dict())


def test_load_with_assign():
    x, y = batch()
    model, other = (fxcurv.transform(mlp(), "kfac", loss="cross_entropy") for _ in range(2))
    step(model, x, y)
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    for m in (model, other):
        step(m, x, y)
    assert same(model.state_dict(), other.state_dict())
    assert all(p is q for p, q in zip(other.parameters(), other.strip().parameters(), strict=True))


def test_deepcopy_is_independent_and_equal():
    x, y = batch()
    model = fxcurv.transform(mlp(), "ekfac", loss="cross_entropy", solve_every=2)
    step(model, x, y)
    other = copy.deepcopy(model)
    frozen = copy.deepcopy(other.state_dict())
    for i in range(3):
        step(model, *batch(seed=i))
    assert same(other.state_dict(), frozen)
    for i in range(3):
        step(other, *batch(seed=i))
    assert same(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("method", ["kfac", "ekfac", "foof", "diag", "shampoo", "adam", "adahessian"])
@pytest.mark.parametrize("at", [1, 3])
def test_resume_bit_for_bit(method: str, at: int):
    def make() -> Any:
        torch.manual_seed(0)
        options = {} if method == "adam" else {"solve_every": 2}
        return fxcurv.transform(mlp(torch.float32), method, loss="cross_entropy", **options)

    data = [batch(dtype=torch.float32, seed=i) for i in range(6)]
    straight = make()
    for i in range(at):
        step(straight, *data[i])
    saved = copy.deepcopy(straight.state_dict())
    resumed = make()
    for i in range(2):
        step(resumed, *data[5 - i])  # a used one: every entry must be overwritten
    resumed.load_state_dict(saved)
    for i in range(at, 6):
        step(straight, *data[i])
        step(resumed, *data[i])
    assert same(straight.state_dict(), resumed.state_dict())


def test_resume_of_the_optimizer():
    data = [batch(seed=i) for i in range(6)]

    def run(model: Any, opt: Any, chunk: list[tuple[Tensor, Tensor]]) -> None:
        for x, y in chunk:
            opt.zero_grad()
            out = model(x)
            model.backward(F.cross_entropy(out, y), out)
            opt.step()

    torch.manual_seed(0)
    net = mlp()
    model = fxcurv.transform(copy.deepcopy(net), "kfac", loss="cross_entropy", solve_every=4)
    opt = fxcurv.optimizer(model, lr=0.05, weight_decay=0.01)
    run(model, opt, data[:3])
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    other = fxcurv.transform(copy.deepcopy(net), "kfac", loss="cross_entropy", solve_every=4)
    again = fxcurv.optimizer(other, lr=0.05, weight_decay=0.01)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    run(model, opt, data[3:])
    run(other, again, data[3:])
    assert same(model.state_dict(), other.state_dict())


def test_state_dict_errors_are_one_sentence():
    x, y = batch()
    model = fxcurv.transform(mlp(), "kfac", loss="cross_entropy")
    step(model, x, y)
    before = copy.deepcopy(model.state_dict())
    missing = {k: v for k, v in before.items() if k != "curvature.0.A"}
    with pytest.raises(fxcurv.FxcurvError, match=r"no 'curvature\.0\.A'"):
        model.load_state_dict(missing)
    with pytest.raises(fxcurv.FxcurvError, match=r"foreign 'curvature\.0\.Z'"):
        model.load_state_dict({**before, "curvature.0.Z": torch.zeros(1)})
    with pytest.raises(fxcurv.FxcurvError, match="no curvature state"):
        model.load_state_dict(model.strip().state_dict())
    with pytest.raises(fxcurv.FxcurvError, match=r"shape \(2, 2\)"):
        model.load_state_dict({**before, "curvature.0.A": torch.zeros(2, 2)})
    assert same(model.state_dict(), before)
    model.load_state_dict(missing, strict=False)


def test_train_and_eval_run_the_users_module():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.bn, self.drop = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
            self.out = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.drop(torch.relu(self.bn(self.body(x)))))

    torch.manual_seed(0)
    net = Counting().double()
    plain = copy.deepcopy(net)
    model = fxcurv.transform(net, "kfac", loss="cross_entropy", factor_every=2)
    x, y = batch()
    for i in range(4):
        torch.manual_seed(i)
        out = model(x)
        torch.manual_seed(i)
        assert torch.equal(out, plain(x))
        model.backward(F.cross_entropy(out, y), out)
        model.precondition_()
        assert torch.equal(net.bn.running_mean, plain.bn.running_mean)
        assert int(net.bn.num_batches_tracked) == i + 1
    model.eval()
    plain.eval()
    assert not net.training and torch.equal(model(x), plain(x))
    model.train()
    net.bn.eval()
    plain.train()
    plain.bn.eval()
    step_before = net.bn.running_mean.clone()
    torch.manual_seed(9)
    out = model(x)
    torch.manual_seed(9)
    assert torch.equal(out, plain(x)) and torch.equal(net.bn.running_mean, step_before)


def test_optional_and_keyword_arguments():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor, extra: Tensor | None = None, *, scale: float = 1.0) -> dict[str, Any]:
            out = scale * self.a(x)
            if extra is not None:
                out = out + self.b(extra)
            return {"logits": out, "info": (scale, None)}

    net = Gated().double()
    plain = copy.deepcopy(net)
    model = fxcurv.transform(net, "kfac", loss="cross_entropy")
    x, y = batch()
    for args, kwargs in [((x,), {}), ((x, x), {}), ((x,), {"extra": x.cos(), "scale": 2.0}), ((x,), {})]:
        out, expected = model(*args, **kwargs), plain(*args, **kwargs)
        assert torch.equal(out["logits"], expected["logits"]) and out["info"] == expected["info"]
        model.zero_grad()
        model.backward(F.cross_entropy(out["logits"], y), out["logits"])
        info = model.precondition_()
        assert info.statistics and (net.b.weight.grad is None) == (len(args) == 1 and "extra" not in kwargs)


def test_layers_that_shared_an_input_may_not_part() -> None:
    """Their input factor is measured once: with inputs of their own that would be wrong for one of them."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
            return self.a(x) + self.b(x if other is None else other)

    x, _ = batch()
    model = fxcurv.transform(Pair().double(), "kfac", example_inputs=(x,), loss="cross_entropy")
    with pytest.raises(fxcurv.FxcurvError, match="'a' and 'b' read the same input at transform and different ones"):
        model(x, x.cos())
    apart = fxcurv.transform(Pair().double(), "kfac", example_inputs=(x, x.cos()), loss="cross_entropy")
    assert apart(x, x.cos()).shape == apart(x).shape == (12, 3)


def test_due_by_hand_and_statistics_in_eval_mode():
    x, y = batch()
    model = fxcurv.transform(mlp(), "kfac", loss="cross_entropy", factor_every=3, solve_every=3)
    assert model.due() == {"statistics": True, "refresh": True}
    step(model, x, y)
    assert model.due() == {"statistics": False, "refresh": False}
    model.eval()
    assert model.due(statistics=True, refresh=True) == {"statistics": True, "refresh": True}
    before = states(model)
    info = step(model, x, y)
    assert info.statistics and info.refresh
    assert not torch.equal(before["curvature.0.A"], states(model)["curvature.0.A"]) or info.terms == 12
    model.train()
    assert model.due(statistics=False, refresh=True)["statistics"] is False
    info = step(model, *batch(seed=4))
    assert info.refresh and not info.statistics
    with pytest.raises(fxcurv.FxcurvError, match="first step"):
        fxcurv.transform(mlp(), "kfac", loss="cross_entropy").due(refresh=False)


def test_layers_and_skip_patterns():
    net = mlp()
    model = fxcurv.transform(net, "kfac", loss="cross_entropy", skip=["2"])
    assert [layer.name for layer in model.layers] == ["0", "4"]
    assert {name for name, _ in model.uncovered} == {"2.weight", "2.bias"}
    x, y = batch()
    F.cross_entropy(net(x), y).backward()
    plain = net[2].weight.grad.clone()
    net.zero_grad()
    out = model(x)
    model.backward(F.cross_entropy(out, y), out)
    model.precondition_()
    assert torch.equal(net[2].weight.grad, plain)
    with pytest.raises(fxcurv.FxcurvError, match="matches no layer"):
        fxcurv.transform(mlp(), "kfac", skip=["conv*"])
    with pytest.raises(fxcurv.FxcurvError, match="strict=True"):
        fxcurv.transform(mlp(), "kfac", skip=["2"], strict=True)


def test_other_optimizers_and_schedulers():
    x, y = batch()
    model = fxcurv.transform(mlp(), "kfac", loss="cross_entropy")
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 2)
    own = fxcurv.optimizer(model, lr=0.1)
    torch.optim.lr_scheduler.StepLR(own, 2)
    first = None
    for _ in range(5):
        opt.zero_grad()
        out = model(x)
        loss = F.cross_entropy(out, y)
        first = first or float(loss)
        model.backward(loss, out)
        model.precondition_()
        opt.step()
        schedule.step()
    assert float(F.cross_entropy(model(x), y)) < first
    assert isinstance(own, torch.optim.Optimizer)
    descend(model)


def test_tied_head_with_a_bias_and_a_frozen_scale():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.head = nn.Embedding(11, 6, padding_idx=0), nn.LayerNorm(6), nn.Linear(6, 11)
            self.head.weight = self.embed.weight
            self.norm.weight.requires_grad_(False)
            self.mix = nn.Parameter(torch.randn(3, 6, 2))

        def forward(self, t: Tensor) -> Tensor:
            x = self.norm(self.embed(t))
            return self.head(x).transpose(1, 2) + torch.bmm(x.transpose(0, 1), self.mix).mean()

    t = torch.randint(0, 11, (5, 3))
    model = fxcurv.transform(Tied().double(), "kfac", loss="cross_entropy", example_inputs=(t,))
    assert model.uncovered == () and model.factors("norm.bias")["F"].shape == (6, 1, 1)  # a shift without its scale
    out = model(t)
    model.backward(F.cross_entropy(out, t), out)
    assert not model.precondition_().fallback
    (tied,) = [layer for layer in model.layers if len(layer.uses) == 2]
    factors = model.factors(tied.name)
    assert factors["A"].shape == (7, 7) and float(factors["A"][-1, -1]) == pytest.approx(1.0)
    assert model.factors("mix")["A"].shape == (3, 6, 6)  # a product of its own for every group
