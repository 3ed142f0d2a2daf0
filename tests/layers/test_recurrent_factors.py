"""Statistics of recurrent networks against a loop written out here: factors, per-example squares, steps that differ."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.nn.utils.rnn import pack_padded_sequence

import fxcurv
from fxcurv.runtime.module import CurvatureModule
from tests.layers.whole import NETS

pytestmark = pytest.mark.usefixtures("float64")
KINDS = list(NETS)
LENGTHS = torch.tensor([2, 5, 1, 4, 5, 3])
FACTORS = {"ema": 0.0, "solve_every": 1, "kl_clip": None, "fisher": "empirical", "loss": "cross_entropy"}


class Classifier(nn.Module):
    """Classes from the last state."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.rnn = NETS[kind](3, 4, batch_first=True, **options)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        packed = x if lengths is None else pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        states = self.rnn(packed)[1]
        return self.head((states[0] if isinstance(self.rnn, nn.LSTM) else states)[0])


class Steps(nn.Module):
    """The same by a cell in a loop."""

    def __init__(self, net: Classifier, steps: int) -> None:
        super().__init__()
        kinds = {nn.LSTM: nn.LSTMCell, nn.GRU: nn.GRUCell, nn.RNN: nn.RNNCell}
        self.cell, self.head, self.steps = kinds[type(net.rnn)](3, 4), copy.deepcopy(net.head), steps
        self.cell.load_state_dict({name[:-3]: value for name, value in net.rnn.state_dict().items()})

    def forward(self, x: Tensor) -> Tensor:
        h = None
        for t in range(self.steps):
            h = self.cell(x[:, t], h)
        return self.head(h[0] if isinstance(self.cell, nn.LSTMCell) else h)


def steps_of(net: Classifier, x: Tensor, y: Tensor, lengths: Tensor) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """By weight and sequence: input rows with the constant (T_b, d), gradients of the sequence's loss (T_b, gates)."""
    rnn, found = net.rnn, {"weight_ih_l0": ([], []), "weight_hh_l0": ([], [])}
    for b, steps in enumerate(lengths.tolist()):
        h, c, one = torch.zeros(4), torch.zeros(4), torch.ones(1)
        inputs, products = [[], []], [[], []]
        for t in range(steps):
            zx = F.linear(x[b, t], rnn.weight_ih_l0, rnn.bias_ih_l0)
            zh = F.linear(h, rnn.weight_hh_l0, rnn.bias_hh_l0)
            for side, a, z in ((0, x[b, t], zx), (1, h, zh)):
                inputs[side].append(torch.cat([a, one]).detach())
                products[side].append(z)
            if isinstance(rnn, nn.LSTM):
                i, f, g, o = (zx + zh).chunk(4)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
            elif isinstance(rnn, nn.GRU):
                (xr, xz, xn), (hr, hz, hn) = zx.chunk(3), zh.chunk(3)
                update = torch.sigmoid(xz + hz)
                h = (1 - update) * torch.tanh(xn + torch.sigmoid(xr + hr) * hn) + update * h
            else:
                h = torch.tanh(zx + zh)
        gradients = torch.autograd.grad(F.cross_entropy(net.head(h), y[b]), products[0] + products[1])
        for name, side, part in zip(found, inputs, (gradients[:steps], gradients[steps:]), strict=True):
            found[name][0].append(torch.stack(side))
            found[name][1].append(torch.stack(part))
    return found


def expected(rows: tuple[list[Tensor], list[Tensor]], sharing: str) -> tuple[Tensor, Tensor]:
    """A and G of one weight."""
    a, g = rows
    terms = len(a)
    if sharing == "reduce":
        a, g = [part.mean(0, keepdim=True) for part in a], [part.sum(0, keepdim=True) for part in g]
    inputs, gradients = torch.cat(a), torch.cat(g)
    return inputs.T @ inputs / len(inputs), gradients.T @ gradients / terms


def data(steps: int = 5, batch: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, steps, 3), torch.randint(0, 3, (batch,))


def stepped(model: CurvatureModule, *batches: tuple[Any, ...]) -> CurvatureModule:
    """One step from micro-batches (x, ..., y) of the mean loss."""
    model.zero_grad()
    total = sum(len(y) for *_, y in batches)
    for *inputs, y in batches:
        out = model(*inputs)
        model.backward(F.cross_entropy(out, y, reduction="sum") / total, out)
    model.precondition_()
    return model


def assert_factors(
    model: CurvatureModule, net: Classifier, x: Tensor, y: Tensor, lengths: Tensor, sharing: str
) -> None:
    for name, rows in steps_of(net, x, y, lengths).items():
        a, g = expected(rows, sharing)
        factors = model.factors(f"rnn.{name}")
        torch.testing.assert_close(factors["A"], a, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(factors["G"], g, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", KINDS)
def test_factors(kind: str, sharing: str) -> None:
    net, (x, y) = Classifier(kind), data()
    model = fxcurv.transform(net, "kfac", example_inputs=(x,), sharing=sharing, **FACTORS)
    assert_factors(stepped(model, (x, y)), net, x, y, torch.full((6,), 5), sharing)
    x, y = data(7, 3)  # other sizes, the same graph
    assert_factors(stepped(model, (x, y)), net, x, y, torch.full((3,), 7), sharing)
    assert len(model._forwards.known) == 1


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", KINDS)
def test_factors_of_packed_sequences(kind: str, sharing: str) -> None:
    """Steps that do not exist count neither in the Grams nor among the rows."""
    net, (x, y) = Classifier(kind), data()
    model = fxcurv.transform(net, "kfac", example_inputs=(x, LENGTHS), sharing=sharing, **FACTORS)
    assert_factors(stepped(model, (x, LENGTHS, y)), net, x, y, LENGTHS, sharing)


def test_gates_as_blocks() -> None:
    """Gates can be layers of their own: the same inputs, a diagonal block of G each."""
    net, (x, y) = Classifier("LSTM"), data()
    fused = {"rnn.weight_hh_l0": 4}
    model = fxcurv.transform(net, "kfac", example_inputs=(x, LENGTHS), fused=fused, **FACTORS)
    stepped(model, (x, LENGTHS, y))
    a, g = expected(steps_of(net, x, y, LENGTHS)["weight_hh_l0"], "expand")
    gates = [layer.name for layer in model.layers if layer.name.startswith("rnn.weight_hh")]
    assert len(gates) == 4
    for k, name in enumerate(gates):
        torch.testing.assert_close(model.factors(name)["A"], a, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(model.factors(name)["G"], g[4 * k :, 4 * k :][:4, :4], rtol=1e-10, atol=1e-12)


def test_micro_batches_of_different_lengths_add_up() -> None:
    net, (x, y) = Classifier("GRU"), data()
    model = fxcurv.transform(net, "kfac", example_inputs=(x, LENGTHS), **FACTORS)
    stepped(model, (x[:2], LENGTHS[:2], y[:2]), (x[2:], LENGTHS[2:], y[2:]))
    assert_factors(model, net, x, y, LENGTHS, "expand")


@pytest.mark.parametrize("kind", KINDS)
def test_diagonal_sums_over_time_before_the_square(kind: str) -> None:
    net, (x, y) = Classifier(kind), data()
    model = fxcurv.transform(
        net, "diag", example_inputs=(x,), **{k: v for k, v in FACTORS.items() if k != "solve_every"}
    )
    stepped(model, (x, y))
    for name, (a, g) in steps_of(net, x, y, torch.full((6,), 5)).items():
        squares = torch.stack([(gb.T @ ab).square() for ab, gb in zip(a, g, strict=True)]).mean(0)
        (found,) = model.factors(f"rnn.{name}").values()
        torch.testing.assert_close(found.reshape(squares.shape), squares, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_is_plain_kfac(kind: str) -> None:
    """With T = 1 the network is the cell called once: the same factors and the same direction."""
    net, (x, y) = Classifier(kind), data(1)
    options = {"example_inputs": (x,), **FACTORS}
    once = stepped(fxcurv.transform(net, "kfac", **options), (x, y))
    cell = stepped(fxcurv.transform(Steps(net, 1), "kfac", **options), (x, y))
    for side in ("ih", "hh"):
        for key, value in cell.factors(f"cell.weight_{side}").items():
            torch.testing.assert_close(once.factors(f"rnn.weight_{side}_l0")[key], value)
    for name, parameter in net.rnn.named_parameters():
        torch.testing.assert_close(parameter.grad, cell.get_parameter(f"cell.{name[:-3]}").grad)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_over_the_cell_gives_the_network_s_factors(kind: str) -> None:
    """Uses of one weight are rows of their own, as time steps are."""
    net, (x, y) = Classifier(kind), data()
    model = stepped(fxcurv.transform(Steps(net, 5), "kfac", example_inputs=(x,), **FACTORS), (x, y))
    for side in ("ih", "hh"):
        a, g = expected(steps_of(net, x, y, torch.full((6,), 5))[f"weight_{side}_l0"], "expand")
        torch.testing.assert_close(model.factors(f"cell.weight_{side}")["A"], a)
        torch.testing.assert_close(model.factors(f"cell.weight_{side}")["G"], g)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind: str) -> None:
    """The loops are operators: a compiled forward and backward deliver the same statistics."""
    net, (x, y) = Classifier(kind), data()
    model = fxcurv.transform(net, "kfac", example_inputs=(x,), **FACTORS)
    stepped(model, (x, y))
    wanted = {name: model.factors(name) for name in ("rnn.weight_ih_l0", "rnn.weight_hh_l0")}
    seen: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(str(graph.graph))
        return lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    model.zero_grad()
    with torch._dynamo.config.patch(allow_rnn=True):  # or torch.compile leaves out whatever reads such a module
        F.cross_entropy(torch.compile(model, backend=backend)(x), y).backward()
    model.precondition_()
    assert any("_loop" in graph for graph in seen)
    for name, factors in wanted.items():
        for key, value in factors.items():
            torch.testing.assert_close(model.factors(name)[key], value)


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss(kind: str) -> None:
    """The parity of a sign: what a linear model of the input cannot tell; a copy trains apart, eval mode agrees."""
    net = Classifier(kind, num_layers=2, dropout=0.1)
    x = torch.randn(64, 4, 3)
    y = (x[:, 0, 0] * x[:, 2, 0] > 0).long()
    model = fxcurv.transform(net, "kfac", example_inputs=(x,), loss="cross_entropy", solve_every=1)
    optimizer = fxcurv.optimizer(model, lr=0.3, momentum=0.5)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        out = model(x)
        loss = F.cross_entropy(out, y)
        model.backward(loss, out)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.75 * losses[0]
    other = copy.deepcopy(model)
    before = net.rnn.weight_hh_l0.clone()
    stepped(other, (x, y))
    assert torch.equal(net.rnn.weight_hh_l0, before)
    model.eval()
    torch.testing.assert_close(model(x), net(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "measured"), [("LSTM", 1), ("RNN", 1), ("GRU", 2)])
def test_one_gradient_of_two_products_is_measured_once(kind: str, measured: int) -> None:
    """Both products are added up, in a GRU only after the reset gate has met one of them."""
    x, y = torch.randn(6, 5, 3), torch.randint(3, (6,))
    for options, count in (({}, measured), ({"layers": "*hh*"}, 1)):
        net = Classifier(kind)
        model = fxcurv.transform(net, example_inputs=(x,), **FACTORS, **options)
        keys = [slot.key for slot in model.graph.slots]
        assert len([key for key in keys if key.startswith("gram(rnn.weight") and key.endswith(".g)")]) == count
        F.cross_entropy(model(x), y).backward()
        model.precondition_()
        gates = model.factors("rnn.weight_hh_l0")["G"]
        alone = fxcurv.transform(copy.deepcopy(net), example_inputs=(x,), layers="*hh*", **FACTORS)
        F.cross_entropy(alone(x), y).backward()
        alone.precondition_()
        assert torch.allclose(gates, alone.factors("rnn.weight_hh_l0")["G"], rtol=1e-12, atol=1e-15)
        assert gates.abs().max() > 0
