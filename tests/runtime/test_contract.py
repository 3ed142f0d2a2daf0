"""The public interface, promise by promise: what other programs may rely on, whatever the method."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxcurv
from fxcurv.ir.op import OPS
from fxcurv.ir.program import Program
from fxcurv.ir.text import parse_program, print_program
from fxcurv.passes import PIPELINE
from tests.runtime.steps import batch, mlp, same, states, step

COMMON = {
    "fisher": "ggn", "fisher_samples": 2, "damping": 0.1, "ema": 0.5, "factor_every": 2, "solve_every": 4,
    "kl_clip": 0.1, "weight_decay": 0.1, "max_factor_dim": 6, "sharing": "reduce", "seed": 3,
}  # fmt: skip


def make(net: nn.Module, method: str = "kfac", **options: Any) -> Any:
    return fxcurv.transform(net, method, **{"loss": "cross_entropy", **options})


# The functions --------------------------------------------------------------------------------------------------------


def test_signature_of_transform():
    parameters = inspect.signature(fxcurv.transform).parameters
    kinds = inspect.Parameter
    fixed = {
        "method": "kfac", "example_inputs": None, "example_kwargs": None, "loss": None, "frontend": "auto",
        "backend": "auto", "layers": None, "skip": None, "strict": False,
    }  # fmt: skip
    assert list(parameters)[:10] == ["model", *fixed] and parameters["model"].default is kinds.empty
    assert {name: parameters[name].default for name in fixed} == fixed
    assert all(p.kind is kinds.KEYWORD_ONLY for p in list(parameters.values())[2:-1])
    assert parameters["hyper"].kind is kinds.VAR_KEYWORD


def test_signatures_of_the_module():
    backward = inspect.signature(fxcurv.CurvatureModule.backward).parameters
    assert list(backward) == ["self", "loss", "outputs", "targets", "mask", "backward_kwargs"]
    assert backward["outputs"].default is None and backward["targets"].kind is inspect.Parameter.KEYWORD_ONLY
    assert list(inspect.signature(fxcurv.CurvatureModule.precondition_).parameters) == ["self", "scaler"]
    due = inspect.signature(fxcurv.CurvatureModule.due).parameters
    assert list(due) == ["self", "statistics", "refresh"] and due["refresh"].default is None


def test_common_hyper_parameters_have_one_name():
    for name, published in fxcurv.methods().items():
        assert published.name == name
        odd = {n for n in published.defaults if any(word in n for word in COMMON) and n not in COMMON}
        assert odd <= {"damping_scheme", "conv_damping", "damping_target", "ema_spectrum"}, (name, odd)
    for name in ("kfac", "ekfac"):
        assert set(COMMON) <= set(fxcurv.methods()[name].defaults)
        fxcurv.transform(mlp(), name, loss="mse", **COMMON)
    assert sorted(fxcurv.papers()) == list(range(1, 84))


def test_an_unknown_hyper_parameter_lists_the_known_ones():
    for name, published in fxcurv.methods().items():
        with pytest.raises(fxcurv.FxcurvError, match="^[^\n]*'dampin'") as error:
            fxcurv.transform(mlp(), name, loss="cross_entropy", dampin=1.0)
        assert all(known in str(error.value) for known in published.defaults)


def test_a_model_alone_is_enough():
    x, y = batch()
    model = fxcurv.transform(mlp())
    assert model.report().method == "kfac" and model.report().fisher == "empirical"
    assert any("empirical" in note and "loss=" in note for note in model.report().notes)
    assert "empirical" in str(model.report())
    F.cross_entropy(model(x), y).backward()
    info = model.precondition_()
    assert isinstance(info, fxcurv.StepInfo) and info.statistics and info.terms == 12


# The module -----------------------------------------------------------------------------------------------------------


def test_attributes_of_the_module():
    x, y = batch()
    net = mlp()
    model = make(net)
    step(model, x, y, lr=None)
    layer = model.layers[0]
    assert isinstance(model.layers, tuple) and (layer.name, layer.kind) == ("0", "linear")
    assert layer.params == ("0.weight", "0.bias") and len(layer.uses) == 1 and layer.shape == (1, 7, 6)
    assert model.uncovered == ()
    assert isinstance(model.program, Program) and model.program.text() == print_program(model.program)
    assert print_program(parse_program(model.program.text())) == model.program.text()
    assert any("tap" in str(node.target) for node in model.graph.graph.nodes) and model.graph.text()
    names = [record.name for record in model.history]
    assert names == [step.name for step in PIPELINE] and names[0] == "detect" and names[-1] == "lower"
    assert all("update {" in record.text for record in model.history[1:])
    assert model.report().covered == 1.0 and {row.parameter for row in model.report().rows} == set(
        dict(net.named_parameters())
    )
    with pytest.raises(fxcurv.FxcurvError, match="no layer 'nine'; there are 0, 2, 4"):
        model.factors("nine")


def test_factors_have_the_bias_last_and_the_scale_of_the_mean_loss():
    x, y = batch()
    net = mlp()
    model = make(net, "ekfac", fisher="ggn", ema=0.0, solve_every=2)
    for _ in range(2):  # the first step renews the basis, the second measures in it
        step(model, x, y, lr=None)
    factors = model.factors("0")
    rows = torch.cat([x, torch.ones(12, 1, dtype=x.dtype)], 1)
    torch.testing.assert_close(factors["A"], rows.T @ rows / 12)
    hidden, jacobians = net[0](x), []
    for n in range(12):
        jacobian = torch.autograd.functional.jacobian(lambda h: net[1:](h), hidden[n].detach())
        p = net(x)[n].detach().softmax(0)
        jacobians.append(jacobian.T @ (p.diag() - p.outer(p)) @ jacobian)
    torch.testing.assert_close(factors["G"], torch.stack(jacobians).mean(0))
    assert set(factors) == {"A", "G", "QA", "QG", "S"} and factors["S"].shape == (7, 6)
    for basis, factor in (("QA", "A"), ("QG", "G")):
        q = factors[basis]
        torch.testing.assert_close(q.T @ q, torch.eye(len(q), dtype=q.dtype))
        rotated = q.T @ factors[factor] @ q
        torch.testing.assert_close(rotated, rotated.diagonal().diag(), atol=1e-10, rtol=0)
    exact = sum(torch.kron(h, r.outer(r)) for h, r in zip(jacobians, rows, strict=True)) / 12
    basis = torch.kron(factors["QG"], factors["QA"])
    torch.testing.assert_close(factors["S"].flatten(), (basis.T @ exact @ basis).diagonal())


@pytest.mark.parametrize("fisher", ["mc", "ggn", "ggn_signs", "empirical"])
def test_backward_starves_nothing_outside_the_model(fisher: str):
    x, y = batch()
    net, before, after = mlp(), nn.Linear(5, 5, dtype=torch.float64), nn.Linear(3, 3, dtype=torch.float64)
    outside = [*before.parameters(), *after.parameters()]
    x.requires_grad_()
    wanted = [x, *outside, *net.parameters()]
    expected = torch.autograd.grad(F.cross_entropy(after(net(before(x))), y), wanted)
    model = make(net, fisher=fisher)
    out = after(model(before(x)))
    model.backward(F.cross_entropy(out, y), out, retain_graph=True)
    assert all(torch.equal(t.grad, g) for t, g in zip(wanted, expected, strict=True))
    torch.autograd.grad(out.sum(), x)  # the graph was retained, as asked
    model.precondition_()
    assert all(torch.equal(t.grad, g) for t, g in zip([x, *outside], expected, strict=False))


@pytest.mark.parametrize(("loss", "shape", "terms"), [
    (None, (4, 3), 4), ("cross_entropy", (4, 3), 4), ("mse", (4, 3), 12), ("bce", (4, 3), 12), ("gaussian", (4, 3), 4),
])  # fmt: skip
def test_terms_of_a_plain_backward(loss: str | None, shape: tuple[int, ...], terms: int):
    x, _ = batch(4)
    model = fxcurv.transform(mlp(), "kfac", loss=loss, fisher="empirical")
    model(x).square().mean().backward()
    assert model.precondition_().terms == terms


@dataclasses.dataclass
class Answer:
    """What a model returns that computes its own loss."""

    loss: Tensor | None
    logits: Tensor
    pooled: Tensor


class Answering(nn.Module):
    """A classifier of rows with a loss, and an output that is not the loss's."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Answer:
        hidden = torch.tanh(self.body(x))
        logits = self.head(hidden)
        return Answer(None if labels is None else F.cross_entropy(logits, labels), logits, hidden.sum(1))


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize(("loss", "fisher"), [("cross_entropy", "mc"), ("cross_entropy", "empirical"), (None, "mc")])
def test_a_model_that_returns_its_own_loss(loss: str | None, fisher: str, frontend: str):
    torch.manual_seed(0)
    net = Answering().double()
    plain = copy.deepcopy(net)
    options = {"loss": loss, "fisher": fisher, "frontend": frontend, "kl_clip": None}
    model, reference = (fxcurv.transform(n, example_inputs=(batch()[0],), **options) for n in (net, plain))
    for n in (12, 7):
        x, y = batch(n)
        model.zero_grad()
        reference.zero_grad()
        answer, expected = model(x, labels=y), reference(x)
        assert type(answer) is Answer and answer.loss is not None and expected.loss is None
        if fisher == "mc" and loss:
            model.backward(answer.loss, answer.logits)
            reference.backward(F.cross_entropy(expected.logits, y), expected.logits)
        else:
            answer.loss.backward()
            F.cross_entropy(expected.logits, y).backward()
        assert model.precondition_().terms == reference.precondition_().terms == n
        for p, q in zip(net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)


def test_a_model_that_returns_nothing_but_its_loss():
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.net(x), y)

    x, y = batch()
    model, reference = fxcurv.transform(Loss()), fxcurv.transform(mlp())
    reference.strip().load_state_dict(model.strip().net.state_dict())
    model(x, y).backward()
    F.cross_entropy(reference(x), y).backward()
    assert model.precondition_().terms == reference.precondition_().terms == 12
    torch.testing.assert_close(model.factors("net.2"), reference.factors("2"))


def test_a_summed_loss_must_be_said():
    x, y = batch()
    found = []
    for reduction in ("mean", "sum"):
        torch.manual_seed(0)
        model = make(mlp(), loss=nn.CrossEntropyLoss(reduction=reduction), fisher="empirical", kl_clip=None)
        F.cross_entropy(model(x), y, reduction=reduction).backward()
        model.precondition_()
        found.append((model.factors("2")["G"], model.strip()[2].weight.grad))
    torch.testing.assert_close(found[0], found[1])


# State ----------------------------------------------------------------------------------------------------------------

METHODS = ("kfac", "ekfac", "foof", "diag", "shampoo", "adahessian", "hessian_free", "adam", "sgd")


@pytest.mark.parametrize("method", METHODS)
def test_every_state_exists_from_transform_on(method: str):
    net = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)).double()
    model = make(net, method)
    start = states(model)
    names = set(dict(net.named_parameters())) | {layer.name for layer in model.layers}
    counters = {"curvature.step", "curvature.seed", "curvature.overdue", "curvature.terms"}
    for key, value in start.items():
        assert isinstance(value, Tensor)
        assert key in counters or any(key.startswith(f"curvature.{name}.") for name in {*names, "network"})
    opt = fxcurv.optimizer(model)
    x, y = batch()

    def closure() -> Tensor:
        opt.zero_grad()
        out = model(x)
        loss = F.cross_entropy(out, y)
        model.backward(loss, out)
        return loss

    opt.step(closure)
    end = states(model)
    assert {k: (v.shape, v.dtype) for k, v in start.items()} == {k: (v.shape, v.dtype) for k, v in end.items()}


@pytest.mark.parametrize("method", ["kfac", "ekfac", "shampoo", "adam"])
def test_moving_a_model_moves_its_state_and_keeps_its_dtype(method: str):
    model = make(mlp(), method, max_factor_dim=6)
    step(model, *batch())
    before = states(model)
    model.to(torch.float32)
    assert model.strip()[0].weight.dtype == torch.float32 and same(before, states(model))
    step(model, *batch(dtype=torch.float32))
    model.to(torch.float64).to("meta")
    where = {k: v for k, v in model.state_dict().items() if k.startswith("curvature.")}
    counters = {"curvature.step", "curvature.seed", "curvature.overdue", "curvature.terms"}
    assert all(v.device.type == "meta" for k, v in where.items() if k not in counters)
    assert {k: (v.shape, v.dtype) for k, v in before.items()} == {k: (v.shape, v.dtype) for k, v in where.items()}


class Block(nn.Module):
    """One attention block with separate projections."""

    def __init__(self, d: int = 6, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(d)
        self.q, self.k, self.v, self.out = (nn.Linear(d, d) for _ in range(4))
        self.head = nn.Linear(d, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x + self.out(mixed)).transpose(1, 2)


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize(
    ("method", "options", "op", "on_a"),
    [
        ("kfac", {"damping_scheme": "pi"}, "inverse", 3),
        ("kfac", {"damping_scheme": "sqrt"}, "inverse", 1),
        ("kfac", {"damping_scheme": "eigenvalue"}, "eigh", 1),
        ("ekfac", {}, "eigh", 1),
        ("foof", {}, "inverse", 1),
    ],
)
def test_queries_keys_and_values_share_their_input_side(
    frontend: str, method: str, options: dict[str, Any], op: str, on_a: int
):
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    model = make(Block().double(), method, example_inputs=(x,), frontend=frontend, **options)
    projections = {"q", "k", "v"}
    grams = [slot.key for slot in model.graph.slots if slot.key in {f"gram({name}.a)" for name in projections}]
    assert len(grams) == 1
    inputs = [role for role in model.program.inputs("state") if {f"{n}.A" for n in projections} & set(role.keys)]
    assert len(inputs) == 1 and set(inputs[0].keys) >= {"q.A", "k.A", "v.A"}
    state = model.program.inputs("state")[inputs[0]]
    averages = [node for node in state.users if node.target is OPS["ema_mean"]]
    assert len(averages) == 1
    # what inverts or decomposes the input side reads the one average, or that plus damping
    reached: set[fx.Node] = set()
    frontier = [averages[0]]
    while frontier:
        new = set(frontier.pop().users) - reached
        reached |= new
        frontier += [node for node in new if node.target is not OPS[op] and node.meta.get("type") == state.meta["type"]]
    assert sum(node.target is OPS[op] for node in reached) == on_a
    y = torch.randint(0, 3, (4, 5))
    out = model(x)
    model.backward(F.cross_entropy(out, y), out)
    model.precondition_()
    saved = model.state_dict()
    assert torch.equal(saved["curvature.q.A"], saved["curvature.k.A"])
    foreign = {**saved, "curvature.k.A": saved["curvature.k.A"] + 1.0}
    with pytest.raises(fxcurv.FxcurvError, match=r"curvature\.q\.A and curvature\.k\.A are one shared state"):
        model.load_state_dict(foreign)
    apart = make(Block().double(), method, example_inputs=(x,), frontend=frontend, disable=("share",), **options)
    apart.load_state_dict(saved)
    assert all((f"{n}.A",) in {role.keys for role in apart.program.inputs("state")} for n in projections)


@pytest.mark.parametrize("method", ["kfac", "adahessian"])
def test_random_draws_go_on_after_loading(method: str):
    """The state holds all that draws depend on, the seed too."""
    one, other = make(mlp(), method, seed=3), make(mlp(), method, seed=4)
    step(one, *batch())
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for model in (one, other):
        step(model, *batch(seed=1))
    assert same(one.state_dict(), other.state_dict())
    clone = copy.deepcopy(other)
    for model in (one, clone):
        step(model, *batch(seed=2))
    assert same(one.state_dict(), clone.state_dict())


# The schedule and the choice of layers --------------------------------------------------------------------------------


def test_due_by_schedule_is_what_the_steps_do():
    model = make(mlp(), factor_every=2, solve_every=3)
    for i in range(7):
        due = model.due()
        assert due == {"statistics": i % 2 == 0, "refresh": i % 3 == 0}
        info = step(model, *batch(seed=i))
        assert (info.step, info.statistics, info.refresh) == (i, due["statistics"], due["refresh"])


def test_what_due_asks_for_holds_for_one_step():
    model = make(mlp(), factor_every=5, solve_every=5)
    step(model, *batch())
    assert model.due(statistics=True) == {"statistics": True, "refresh": False}
    assert [step(model, *batch()).statistics for _ in range(2)] == [True, False]
    assert model.due() == {"statistics": False, "refresh": False}


def test_patterns_on_names_and_kinds():
    def net() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3))

    x = torch.randn(4, 1, 5, 5)
    for options, names in (
        ({"layers": "conv*"}, ["0"]),
        ({"layers": ["linear", "0"]}, ["0", "4"]),
        ({"skip": "batch_norm"}, ["0", "4"]),
        ({"layers": ["conv*", "linear"], "skip": ["4"]}, ["0"]),
    ):
        model = make(net(), example_inputs=(x,), **options)
        assert [layer.name for layer in model.layers] == names
        kept = {name for name, reason in model.uncovered if "skipped" in reason}
        assert kept == {p for p, _ in net().named_parameters() if p.split(".")[0] not in names}


# The optimizer --------------------------------------------------------------------------------------------------------


def run(model: Any, opt: Any, x: Tensor, y: Tensor, closure: bool) -> Tensor | None:
    def once() -> Tensor:
        opt.zero_grad()
        out = model(x)
        loss = F.cross_entropy(out, y)
        model.backward(loss, out)
        return loss

    if closure:
        return opt.step(once)
    once()
    return opt.step()


@pytest.mark.parametrize("method", [m for m in METHODS if m != "hessian_free"])
def test_steps_with_and_without_a_closure_are_the_same(method: str):
    ends = []
    for closure in (False, True):
        torch.manual_seed(0)
        model = make(mlp(), method)
        opt = fxcurv.optimizer(model, lr=0.05)
        for i in range(3):
            loss = run(model, opt, *batch(seed=i), closure)
            assert (loss is not None) == closure
        ends.append(model.state_dict())
    assert same(*ends)


def test_groups_and_schedules_of_the_optimizer():
    x, y = batch()
    net = mlp()
    model = make(net, "kfac", kl_clip=None)
    opt = fxcurv.optimizer(model, lr=0.1, momentum=0.0, weight_decay=0.0)
    assert isinstance(opt, torch.optim.Optimizer)
    first, rest = list(net[0].parameters()), [*net[2].parameters(), *net[4].parameters()]
    opt.param_groups[0]["params"] = rest
    opt.add_param_group({"params": first, "lr": 0.01, "weight_decay": 0.5})
    extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
    opt.add_param_group({"params": [extra], "lr": 1.0})
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    before = [p.detach().clone() for p in [*first, *rest]]
    for factor in (1.0, 0.5):
        opt.zero_grad()
        out = model(x)
        model.backward(F.cross_entropy(out, y), out)
        extra.grad = torch.ones_like(extra)
        start = [p.detach().clone() for p in [*first, *rest, extra]]
        opt.step()
        for p, old in zip([*first, *rest, extra], start, strict=True):
            rate, decay = (0.01, 0.5) if any(p is q for q in first) else (1.0 if p is extra else 0.1, 0.0)
            torch.testing.assert_close(p.detach(), old - factor * rate * (p.grad + decay * old))
        schedule.step()
    assert all(not torch.equal(p, q) for p, q in zip([*first, *rest], before, strict=True))
    again = fxcurv.optimizer(model)
    again.param_groups[0]["params"] = rest
    again.add_param_group({"params": first})
    again.add_param_group({"params": [extra]})
    again.load_state_dict(opt.state_dict())
    assert [g["lr"] for g in again.param_groups] == [0.025, 0.0025, 0.25]


def test_momentum_and_decoupled_decay():
    x, y = batch()
    net = mlp()
    model = make(net, "kfac", kl_clip=None)
    opt = fxcurv.optimizer(model, lr=0.1, momentum=0.9, weight_decay=0.01)
    velocity = [torch.zeros_like(p) for p in net.parameters()]
    for i in range(3):
        start = [p.detach().clone() for p in net.parameters()]
        run(model, opt, x, y, closure=i == 2)
        for p, old, v in zip(net.parameters(), start, velocity, strict=True):
            v.mul_(0.9).add_(p.grad)
            torch.testing.assert_close(p.detach(), old - 0.1 * (v + 0.01 * old))


def test_backward_under_no_grad_does_nothing():
    x, y = batch()
    for method in METHODS:
        model = make(mlp(), method)
        before = states(model)
        with torch.no_grad():
            out = model(x)
            model.backward(F.cross_entropy(out, y), out)
        assert same(before, states(model)) and all(p.grad is None for p in model.parameters())


# Warnings and notes ---------------------------------------------------------------------------------------------------


def test_more_than_64_backwards_warn_with_their_number():
    x = torch.randn(2, 5)
    for classes, expected in ((64, 0), (65, 1)):
        model = make(nn.Linear(5, classes), fisher="ggn")
        out = model(x)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.backward(F.cross_entropy(out, torch.tensor([0, 1])), out)
        found = [w for w in caught if issubclass(w.category, fxcurv.FxcurvWarning)]
        assert len(found) == expected and all("runs 65 backward passes" in str(w.message) for w in found)


def test_batch_norm_in_training_is_noted_for_exact_columns_only():
    def notes(fisher: str, train: bool) -> tuple[str, ...]:
        net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).train(train)
        return make(net, fisher=fisher).report().notes

    assert any("BatchNorm" in note for note in notes("ggn", True))
    for fisher, train in (("mc", True), ("ggn_signs", True), ("ggn", False)):
        assert not any("BatchNorm" in note for note in notes(fisher, train))


def test_uncovered_parameters_name_reason_and_line():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.gain, self.spare = nn.Linear(5, 3), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) * self.gain.exp()

    model = make(Scaled(), example_inputs=(torch.randn(2, 5),))
    assert {name for name, _ in model.uncovered} == {"gain", "spare"} and all(reason for _, reason in model.uncovered)
    row = next(row for row in model.report().rows if row.parameter == "gain")
    assert "test_contract.py" in row.source and "self.gain.exp()" in row.source and row.chain
    with pytest.raises(fxcurv.FxcurvError, match="strict=True and 'gain'"):
        make(Scaled(), strict=True)


# Safety across methods ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", ["one", "empty", "frozen", "non-finite", "rank one", "transposed"])
def test_hard_cases_of_every_method(method: str, case: str):
    torch.manual_seed(0)
    net = mlp(torch.float32)
    if case == "frozen":
        net[2].requires_grad_(False)
    model = make(net, method)
    opt = fxcurv.optimizer(model, lr=0.01)
    x, y = batch({"one": 1, "empty": 0}.get(case, 12), torch.float32)
    good = batch(dtype=torch.float32, seed=1)
    if case == "non-finite":
        x[0, 0] = float("nan")
    if case == "rank one":
        x = x[:1].expand(12, 5)
    if case == "transposed":
        x = x.T.contiguous().T
    run(model, opt, *good, closure=True)
    before = copy.deepcopy(net.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(model, opt, x, y, closure=True)
    assert all(bool(torch.isfinite(v).all()) for v in model.state_dict().values())
    if case == "non-finite":
        assert same(before, net.state_dict())
    if case == "frozen":
        assert net[2].weight.grad is None and torch.equal(before["2.weight"], net[2].weight)
    run(model, opt, *good, closure=True)
    assert all(bool(torch.isfinite(v).all()) for v in model.state_dict().values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_method_steps_in_every_dtype(method: str, dtype: torch.dtype):
    torch.manual_seed(0)
    net = mlp(dtype)
    model = make(net, method)
    opt = fxcurv.optimizer(model)
    start = copy.deepcopy(net.state_dict())
    for i in range(2):
        run(model, opt, *batch(dtype=dtype, seed=i), closure=True)
    end = net.state_dict()
    assert all(v.dtype == dtype and bool(torch.isfinite(v).all()) for v in end.values()) and not same(start, end)
