"""Running a captured graph: generated code, compile, copies, extra inputs, devices; shapes of its nodes."""

from __future__ import annotations

import copy
import traceback

import pytest
import torch
from torch import Tensor, nn

from fxcurv.capture import Call, Runner, capture, propagate, source
from tests.capture.nets import build
from tests.capture.oracle import assert_same, loss_of

COMPILED = ["mlp", "convnet", "tied", "constants", "dataclass", "modes", "quantised"]


@pytest.mark.parametrize(
    ("name", "backend", "frontend"),
    [(name, "aot_eager", "symbolic") for name in COMPILED]
    + [("constants", "eager", "symbolic"), ("modes", "eager", "export"), ("tied", "aot_eager", "export")],
)
def test_compile(name, backend, frontend):
    if name == "modes" and torch.__version__.split(".")[:2] == ["2", "6"]:
        pytest.skip("torch 2.6 cannot compile the entry of an autocast region")
    torch._dynamo.reset()
    model, args, kwargs = build(name)
    runner = Runner(capture(model, Call.of(model, args, kwargs), frontend))
    compiled = torch.compile(lambda *leaves: runner(model, *leaves), backend=backend, fullgraph=True)
    results = []
    for function in (model, compiled):
        loss = loss_of(function(*args))
        results.append((loss, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)))
    torch.testing.assert_close(results[0], results[1])


def test_extra_inputs_come_first():
    model, args, _ = build("mlp")
    captured = capture(model, Call.of(model, args))
    graph = copy.deepcopy(captured.graph)
    with graph.inserting_before(next(iter(graph.nodes))):
        slot = graph.placeholder("slot")
    output = next(iter(reversed(graph.nodes)))
    with graph.inserting_before(output):
        output.args = (graph.call_function(torch.add, (output.args[0], slot)),)
    runner = Runner(captured, graph)
    assert torch.equal(runner(model, torch.tensor(2.0), *args), model(*args) + 2.0)
    assert torch.equal(Runner(captured)(model, *args), model(*args))


def test_deepcopy():
    model, args, kwargs = build("constants")
    runner = Runner(capture(model, Call.of(model, args, kwargs)))
    twin = copy.deepcopy(runner)
    assert twin is not runner and twin.source == runner.source
    assert_same(model, twin, args, kwargs)
    copied = copy.deepcopy(runner.captured)
    assert_same(model, Runner(copied), args, kwargs)


class Imported(nn.Module):
    """Computes with a tensor of its Python module, which becomes a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * TABLE + TABLE.sum()


TABLE = torch.tensor([1.0, 2.0, 3.0])


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_constants_follow_the_device_of_the_input(frontend):
    model, x = Imported(), torch.randn(2, 3)
    captured = capture(model, Call.of(model, (x,)), frontend)
    assert captured.constants and all(not hasattr(model, name) for name in captured.constants)
    runner = Runner(captured)
    assert torch.equal(runner(model, x), model(x))
    moved = runner(copy.deepcopy(model).to("meta"), x.to("meta"))
    assert moved.device.type == "meta"
    assert torch.equal(runner(model, x), model(x))


def test_traceback_shows_generated_source():
    model, args, _ = build("mlp")
    runner = Runner(capture(model, Call.of(model, args)))
    with pytest.raises(RuntimeError) as caught:
        runner(model, torch.ones(2, 99, dtype=torch.float64))
    text = "".join(traceback.format_tb(caught.value.__traceback__))
    assert "<fxcurv symbolic" in text and 'getattr(self.layers, "0")' in text
    assert "def forward(self, x):" in runner.source


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_nodes_know_the_line_of_the_user(frontend):
    model, args, _ = build("functional")
    captured = capture(model, Call.of(model, args), frontend)
    lines = [source(node) for node in captured.graph.nodes if "linear" in str(node.target)]
    assert len(lines) == 2
    assert all(line.startswith("nets.py:") and "F.linear(F.linear(x, self.w" in line for line in lines)


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_shapes(frontend):
    model, args, _ = build("convnet")
    captured = capture(model, Call.of(model, args), frontend)
    propagate(captured, model, args)
    shapes = [node.meta["shape"] for node in captured.graph.nodes if "shape" in node.meta]
    dtypes = {node.meta["dtype"] for node in captured.graph.nodes if "dtype" in node.meta}
    assert (4, 3, 5, 5) in shapes and (4, 4, 5, 5) in shapes and shapes[-1] == (4, 2)
    assert torch.float64 in dtypes
    output = next(node for node in reversed(captured.graph.nodes) if node.meta.get("shape") == (4, 2))
    assert all(type(size) is int for size in output.meta["shape"])


class Selects(nn.Module):
    """The number of rows that it returns depends on values, so that fake tensors do not suffice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.nn.functional.dropout(self.norm(x))
        return y[x > 0].reshape(len(y[x > 0]), 1) * 2


def test_shapes_that_depend_on_values():
    model, x = Selects(), torch.tensor([[1.0, -1.0, 2.0], [3.0, -4.0, -5.0]])
    captured = capture(model, Call.of(model, (x,)), "symbolic")
    rng = torch.get_rng_state()
    propagate(captured, model, [x])
    assert [node.meta.get("shape") for node in captured.graph.nodes][-2] == (3, 1)
    assert model.norm.num_batches_tracked == 0 and torch.equal(model.norm.running_mean, torch.zeros(3))
    assert torch.equal(rng, torch.get_rng_state())


def test_source_is_the_innermost_line():
    model, args, _ = build("checkpoint")  # forward calls checkpoint, which calls block
    captured = capture(model, Call.of(model, args), "symbolic")
    (tanh,) = [node for node in captured.graph.nodes if node.target == "tanh"]
    assert "return self.b(self.a(x).tanh())" in source(tanh)
