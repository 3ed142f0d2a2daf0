"""The dynamo front-end against the plain model: one graph where the forward is one, pieces where Python cuts it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcurv.capture import Attempts, Call, Captured, Runner, StitchedRunner, capture
from fxcurv.errors import FxcurvError
from tests.capture.nets import NETS, build, x
from tests.capture.oracle import assert_same


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def runner(captured: Captured) -> Any:
    return Runner(captured) if captured.stitched is None else StitchedRunner(captured)


@pytest.mark.parametrize("name", NETS)
def test_one_graph_is_an_ordinary_capture(name):
    model, args, kwargs = build(name)
    captured = capture(model, Call.of(model, args, kwargs), "dynamo")
    assert captured.frontend == "dynamo" and captured.stitched is None and captured.graphs == (captured,)
    assert_same(model, Runner(captured), args, kwargs)


@pytest.mark.parametrize("name", ["convnet", "tied", "attention", "checkpoint", "constants"])
def test_new_batch_size(name):
    model, args, kwargs = build(name)
    captured = capture(model, Call.of(model, args, kwargs), "dynamo")
    assert_same(model, Runner(captured), tuple(torch.cat([a, a.roll(1), a[:1]]).detach() for a in args), kwargs)


def test_new_sequence_length():
    model, (tokens,), _ = build("tied")
    captured = capture(model, Call.of(model, (tokens,)), "dynamo")
    assert captured.sizes == ((None, None),)
    assert_same(model, Runner(captured), (tokens[:, :4].contiguous(),), {})


@pytest.mark.parametrize("name", ["convnet", "tied", "constants", "ema", "parametrised"])
def test_model_is_not_touched(name):
    model, args, kwargs = build(name)
    attributes = {path: dict(vars(module)) for path, module in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    rng, marks = torch.get_rng_state(), [dict(vars(a)) for a in args]
    capture(model, Call.of(model, args, kwargs), "dynamo")
    assert torch.equal(rng, torch.get_rng_state()) and marks == [vars(a) for a in args]
    for path, module in model.named_modules():
        assert vars(module).keys() == attributes[path].keys()
        assert all(value is attributes[path][key] for key, value in vars(module).items())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_tensors_assigned_after_capture_are_used():
    model, args, _ = build("convnet")
    run = Runner(capture(model, Call.of(model, args), "dynamo"))
    model.load_state_dict({key: value * 2 for key, value in model.state_dict().items()}, assign=True)
    assert_same(model, run, args, {})


def test_get_attr_targets_are_parameter_names():
    for name, targets in (("functional", {"w", "b", "v.0"}), ("twice", {f"fc.{p}" for p in ("weight", "bias")})):
        model, args, _ = build(name)
        captured = capture(model, Call.of(model, args), "dynamo")
        found = {node.target for node in captured.graph.nodes if node.op == "get_attr"}
        assert targets <= found <= {name for name, _ in model.named_parameters()} and not captured.constants


def test_a_tensor_given_twice_stays_two_inputs():
    class Pair(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a * 2 + b

    a, model = x(3, 2), Pair()
    captured = capture(model, Call.of(model, (a, a)), "dynamo")
    assert torch.equal(Runner(captured)(model, a, a + 1), a * 3 + 1)


class Threshold(nn.Module):
    """The condition on a size that is left open."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.shape[0] > 3 else self.fc(x) * 2


@pytest.mark.parametrize("frontend", ["export", "dynamo"])
def test_a_branch_on_an_open_size_is_part_of_what_a_graph_accepts(frontend):
    model = Threshold().double()
    captured = capture(model, Call.of(model, (x(5, 4),)), frontend)
    assert captured.sizes == ((None, 4),)
    assert captured.accepts([x(4, 4)]) and not captured.accepts([x(3, 4)])
    with pytest.raises(FxcurvError, match=r"assumes inputs of sizes \(\(None, 4\),\) .* got \(2, 4\)"):
        Runner(captured)(model, x(2, 4))


# A forward in pieces -------------------------------------------------------------------------------------------------


class Broken(nn.Module):
    """A branch on data, a number read from a tensor, an attribute that changes, a dictionary as output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.steps = 0

    def forward(self, x: Tensor) -> dict[str, Any]:
        self.steps += 1
        h = self.a(x).tanh()
        if h.sum() > 0:
            h = self.b(h)
        else:
            h = self.c(h)
            h = h.sigmoid()
        scale = h.detach().abs().max().item()
        return {"y": self.a(h) / scale, "scale": scale, "steps": self.steps}


def test_pieces_are_the_model():
    model = Broken().double()
    captured = capture(model, Call.of(model, (x(5, 4),)), "dynamo")
    assert model.steps == 0
    assert len(captured.pieces) >= 3 and captured.graph is captured.pieces[0].graph
    run = StitchedRunner(captured)
    for n in (5, 3, 1):
        for sign in (1, -1):
            assert_same(model, run, (sign * 3 * x(n, 4),), {})
    assert model.steps == 6


def test_breaks_are_noted_with_the_users_line():
    model = Broken().double()
    notes = capture(model, Call.of(model, (x(5, 4),)), "dynamo").notes
    start = "graph break at test_dynamo.py:"
    assert any(n.startswith(start) and "if h.sum() > 0: (a Python branch" in n for n in notes)
    assert any(".item()" in n and "\n" not in n for n in notes)


def test_an_attribute_that_the_forward_changes_needs_dynamos_own_code():
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.calls = nn.Linear(4, 4), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.fc(x)

    model = Counted().double()
    run = StitchedRunner(capture(model, Call.of(model, (x(3, 4),))))
    for n in range(20):
        assert_same(model, run, (x(3 + n, 4),), {})
    assert model.calls == 20 and len(run.captured.stitched.pieces) <= 4


def test_pieces_follow_a_copied_model():
    model = Broken().double()
    run = StitchedRunner(capture(model, Call.of(model, (x(5, 4),)), "dynamo"))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    other.load_state_dict({key: value.clone() for key, value in other.state_dict().items()}, assign=True)
    assert_same(other, run, (x(5, 4),), {})
    assert_same(model, run, (x(5, 4),), {})


class Invisible(nn.Module):
    """Nothing that Dynamo may look at."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else x


def test_auto_tries_all_and_keeps_every_reason_short():
    model = Invisible().double()
    pattern = (
        r"^no front-end can capture a Python branch .* at test_dynamo.py:\d+.*; write it .*"
        r"\(export: a Python branch .*; dynamo: the dynamo front-end finds no graph in the forward of Invisible.*\)\.$"
    )
    with pytest.raises(FxcurvError, match=pattern) as caught:
        capture(model, Call.of(model, (x(2, 4),)))
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)
    with pytest.raises(FxcurvError, match="needs example inputs"):
        capture(model, Call.default(model), "dynamo")


def test_auto_takes_the_front_ends_in_order():
    model, args, kwargs = build("mlp")
    attempts = Attempts(model, Call.of(model, args, kwargs))
    assert [captured.frontend for captured in attempts] == ["symbolic", "export", "dynamo"]
    assert [captured.frontend for captured in Attempts(model, Call.default(model))] == ["symbolic"]
    broken = Broken().double()
    assert capture(broken, Call.of(broken, (x(5, 4),))).frontend == "dynamo"


class Cache:
    """What transformer libraries return beside the logits: an object with lists of objects of tensors."""

    class Layer:
        def __init__(self, keys: Tensor) -> None:
            self.keys, self.kind = keys, type(self)

    def __init__(self, keys: list[Tensor]) -> None:
        self.layers, self.full = [Cache.Layer(k) for k in keys], False


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Cache]:
        k = self.a(x)
        return self.b(k).tanh(), Cache([k, k * 2])


@pytest.mark.parametrize("frontend", ["symbolic", "export", "dynamo"])
def test_objects_among_the_outputs_are_rebuilt(frontend):
    model = Cached().double()
    run = runner(capture(model, Call.of(model, (x(3, 4),)), frontend))
    data = x(5, 4)
    (y, cache), (expected, theirs) = run(model, data), model(data)
    assert torch.equal(y, expected) and type(cache) is Cache and cache.full is False
    for mine, other in zip(cache.layers, theirs.layers, strict=True):
        assert type(mine) is mine.kind is Cache.Layer and torch.equal(mine.keys, other.keys)


def test_a_buffer_that_gets_another_shape_is_bound_by_dynamos_own_code():
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("last", torch.zeros(1), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.last = x.detach() * 2
            return self.fc(x)

    model = Last().double()
    captured = capture(model, Call.of(model, (x(3, 4),)), "dynamo")
    assert captured.stitched is not None and model.last.shape == (1,)
    assert_same(model, StitchedRunner(captured), (x(5, 4),), {})
    assert model.last.shape == (5, 4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).tanh()


class Dropped(nn.Module):
    """Drops a block by chance, as speech models do while they train."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.out = nn.ModuleList(Block() for _ in range(3)), Block()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if torch.rand(()) > 0.5:
                x = layer(x)
        return self.out(x)


def test_branches_that_depend_on_chance_are_captured_as_far_as_they_come_up():
    torch.manual_seed(0)
    model = Dropped().double()
    data = x(3, 4)
    state = torch.get_rng_state()
    captured = capture(model, Call.of(model, (data,)), "dynamo")
    read = {n.target for part in captured.pieces for n in part.graph.nodes if n.op == "get_attr"}
    assert read == {name for name, _ in model.named_parameters()} and torch.equal(torch.get_rng_state(), state)


class Stack(nn.Module):
    """Blocks of one class between breaks: Dynamo runs one graph with the tensors of each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.out = nn.ModuleList(Block() for _ in range(3)), Block()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if x.sum() < 1e9 else x
        return self.out(x)


def test_modules_of_one_class_have_a_piece_each():
    model = Stack().double()
    captured = capture(model, Call.of(model, (x(3, 4),)), "dynamo")
    read = [{n.target for n in part.graph.nodes if n.op == "get_attr"} for part in captured.pieces]
    for name in ("layers.0", "layers.1", "layers.2", "out"):
        assert sum(f"{name}.fc.weight" in targets for targets in read) == 1
    run = StitchedRunner(captured)
    for n in (3, 5):
        assert_same(model, run, (x(n, 4),), {})
