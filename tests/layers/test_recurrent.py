"""Recurrent networks: the exposed graph against torch's own modules in float64, over their options."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence

import fxcurv
from fxcurv.capture import Runner
from fxcurv.layers.detect import detect
from tests.layers.check import FRONTENDS, assert_exact, find, reasons
from tests.layers.whole import NETS, Net, assert_same

pytestmark = pytest.mark.usefixtures("float64")


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "two layers, two directions": {"num_layers": 2, "bidirectional": True},
    "dropout": {"num_layers": 3, "dropout": 0.5, "batch_first": True, "bidirectional": True},
    "states given": {"given": True, "num_layers": 2, "bidirectional": True},
    "unbatched": {"unbatched": True, "bidirectional": True},
    "unbatched, states given": {"unbatched": True, "given": True, "batch_first": True},
    "one step": {"steps": 1, "given": True},
}
SPECIAL: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {"proj_size": 2}),
    ("LSTM", {"proj_size": 2, "given": True, "num_layers": 2, "bidirectional": True, "bias": False}),
    ("LSTM", {"proj_size": 3, "unbatched": True, "given": True}),
    ("RNN", {"nonlinearity": "relu", "given": True, "bidirectional": True}),
]
CASES = [(kind, options) for options in OPTIONS.values() for kind in NETS] + SPECIAL


def example(kind: str, options: dict[str, Any]) -> tuple[nn.Module, tuple[Any, ...]]:
    """A net and the arguments of a call."""
    rest = {k: v for k, v in options.items() if k not in ("given", "unbatched", "steps")}
    net, steps, batch = Net(kind, **rest), options.get("steps", 5), 2
    count = net.rnn.num_layers * (1 + net.rnn.bidirectional)
    flat = options.get("unbatched", False)
    shape = (steps, 3) if flat else (batch, steps, 3) if net.rnn.batch_first else (steps, batch, 3)
    if not options.get("given"):
        return net, (torch.randn(shape),)
    axes = (count,) if flat else (count, batch)
    h = torch.randn(*axes, net.rnn.proj_size or 4)
    return net, (torch.randn(shape), (h, torch.randn(*axes, 4)) if kind == "LSTM" else h)


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_values_and_gradients(kind: str, options: dict[str, Any]) -> None:
    net, args = example(kind, options)
    detection = assert_same(net, args)
    layers = net.rnn.num_layers * (1 + net.rnn.bidirectional)
    assert len(detection.layers) == layers * (3 if net.rnn.proj_size else 2)
    assert {layer.kind for layer in detection.layers} == {"recurrent"}


@pytest.mark.parametrize(("kind", "options"), [CASES[k] for k in (0, 4, 8, 12, 15, 19, 26)] + SPECIAL[1:], ids=str)
def test_export(kind: str, options: dict[str, Any]) -> None:
    assert_same(*example(kind, options), frontend="export")


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("kind", NETS)
def test_rows(kind: str, frontend: str) -> None:
    projected = {"proj_size": 2} if kind == "LSTM" else {}
    assert_exact(Net(kind, num_layers=2, bidirectional=True, **projected), torch.randn(5, 2, 3), frontend=frontend)


@pytest.mark.parametrize("first", [False, True])
def test_rows_are_in_the_order_of_processing(first: bool) -> None:
    """The sequence is the example and time the position, so that neighbouring rows are neighbouring steps."""
    x = torch.randn(2, 5, 3)
    net = Net("GRU", bidirectional=True, batch_first=first)
    captured, detection = find(net, x if first else x.transpose(0, 1))
    values: dict[Any, Any] = {}

    class Keep(torch.fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    out, _ = Keep(net, graph=captured.graph, garbage_collect_values=False).run(x if first else x.transpose(0, 1))
    out = out if first else out.transpose(0, 1)
    rows = {layer.name: layer.form.rows_a(values[layer.uses[0].x]).squeeze(2) for layer in detection.layers}
    torch.testing.assert_close(rows["rnn.weight_ih_l0"][..., :3], x)
    torch.testing.assert_close(rows["rnn.weight_ih_l0_reverse"][..., :3], x.flip(1))
    start = torch.zeros(2, 1, 4)
    torch.testing.assert_close(rows["rnn.weight_hh_l0"][..., :4], torch.cat([start, out[:, :-1, :4]], 1))
    torch.testing.assert_close(rows["rnn.weight_hh_l0_reverse"][..., :4], torch.cat([start, out[:, 1:, 4:].flip(1)], 1))
    assert all(torch.equal(part[..., -1], torch.ones(2, 5)) for part in rows.values())


def test_states_go_from_one_network_to_another() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.LSTM(3, 4), nn.LSTM(3, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            _, states = self.encoder(x)
            return self.decoder(y, states)[0]

    assert_same(Pair(), (torch.randn(5, 2, 3), torch.randn(4, 2, 3)))


@pytest.mark.parametrize("kind", NETS)
def test_an_in_place_operation_on_the_output(kind: str) -> None:
    class Change(Net):
        def forward(self, x: Tensor, hx: Any = None) -> Tensor:
            y, _ = self.rnn(x)
            return y.mul_(2.0)

    assert_same(Change(kind), (torch.randn(5, 2, 3),))


class Derived(nn.LSTM):
    """The same under another name."""


class Doubling(nn.GRU):
    """Something else."""

    def forward(self, x: Tensor, hx: Any = None) -> Any:
        return super().forward(2.0 * x, hx)


@pytest.mark.parametrize(("cls", "frontend"), [(Derived, "symbolic"), (Derived, "export"), (Doubling, "export")])
def test_classes_of_one_s_own(cls: type[nn.Module], frontend: str) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = cls(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    assert_same(Own(), (torch.randn(5, 2, 3),), frontend)


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_the_model_itself(frontend: str) -> None:
    net, x = nn.GRU(3, 4, bidirectional=True), torch.randn(5, 2, 3)
    if frontend == "export":
        assert_same(net, (x,), frontend)
    else:
        with pytest.raises(fxcurv.FxcurvError, match="so that the other front-ends can try"):
            find(net, x, frontend=frontend)


class Flat(nn.Module):
    """torch.lstm on parameters of one's own, padded or packed; an unused one is none of its business."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.packed = packed
        shapes = [(16, 3), (16, 2), (16,), (16,), (2, 4)]
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(shape) / 4) for _ in range(2) for shape in shapes])

    def forward(self, x: Tensor, sizes: Tensor, h: Tensor, c: Tensor) -> Any:
        weights = list(self.weights)
        if self.packed:
            return torch.lstm(x, sizes, (h, c), weights, True, 1, 0.0, True, True)
        return torch.lstm(x, (h, c), weights, True, 1, 0.0, True, True, True)


@pytest.mark.parametrize("packed", [False, True])
def test_functions(packed: bool) -> None:
    x = torch.randn(7, 3) if packed else torch.randn(4, 5, 3)
    states = torch.randn(2, 4, 2), torch.randn(2, 4, 4)
    detection = assert_same(Flat(packed), (x, torch.tensor([4, 2, 1]), *states))
    assert [layer.params[0] for layer in detection.layers] == [f"weights.{k}" for k in (0, 1, 4, 5, 6, 9)]


def test_what_stays_whole() -> None:
    hooked = Net("GRU")
    hooked.rnn.register_forward_hook(lambda *arguments: None)
    assert "hooks" in reasons(find(hooked, torch.randn(5, 2, 3))[1])["rnn.weight_hh_l0"]
    normed = Net("LSTM")
    parametrizations.weight_norm(normed.rnn, "weight_hh_l0")
    captured, detection = find(normed, torch.randn(5, 2, 3))
    assert "parametrisation" in reasons(detection)["rnn.weight_ih_l0"]
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(Runner(captured)(normed, x)[0], normed(x)[0])


def test_the_exposed_graph_compiles_as_a_whole() -> None:
    """Its loops are operators, one node each."""
    net, x = Net("RNN"), torch.randn(3, 2, 3)
    captured, _ = find(net, x)
    runner = Runner(captured)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):  # or torch.compile leaves out whatever reads such a module
        compiled = torch.compile(lambda x: runner(net, x)[0], backend="aot_eager", fullgraph=True)
        found = torch.autograd.grad(compiled(x).square().sum(), list(net.parameters()))
    torch.testing.assert_close(found, torch.autograd.grad(net(x)[0].square().sum(), list(net.parameters())))


def test_frozen_parameters() -> None:
    net = Net("LSTM", batch_first=True)
    net.rnn.weight_ih_l0.requires_grad_(False)
    net.rnn.bias_hh_l0.requires_grad_(False)
    _, detection = find(net, torch.randn(2, 5, 3))
    assert [layer.params for layer in detection.layers] == [("rnn.weight_hh_l0",)]


def test_errors_are_one_sentence() -> None:
    net = Net("GRU")
    captured, _ = find(net, torch.randn(5, 2, 3), torch.randn(1, 2, 4))
    with pytest.raises(fxcurv.FxcurvError, match=r"initial state .* \(1, 1, 4\)"):
        Runner(captured)(net, torch.randn(5, 2, 3), torch.randn(1, 1, 4))
    with pytest.raises(fxcurv.FxcurvError, match="packed sequence where the captured graph shows a tensor"):
        Runner(captured)(net, pack_padded_sequence(torch.randn(5, 2, 3), [5, 2]), torch.randn(1, 2, 4))
    out, _ = Runner(captured)(net, torch.randn(5, 2, 3), torch.randn(1, 2, 4))
    (gradient,) = torch.autograd.grad(out.square().sum(), [net.rnn.weight_hh_l0], create_graph=True)
    with pytest.raises(fxcurv.FxcurvError, match="differentiated once more"):
        torch.autograd.grad(gradient.sum(), [net.rnn.weight_hh_l0])


def test_expose_changes_nothing_the_second_time_and_copies() -> None:
    net, x = Net("LSTM", num_layers=2), torch.randn(5, 2, 3)
    captured, _ = find(net, x)
    before = str(captured.graph)
    detect(captured, net)
    assert str(captured.graph) == before
    again = copy.deepcopy(net)
    torch.testing.assert_close(Runner(captured)(again, x)[0], again(x)[0])
