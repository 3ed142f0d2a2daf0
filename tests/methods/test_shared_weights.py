"""One weight in several places: twice-used layers, a table that is also the head, a large vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcurv
from tests.methods.oracle import example_gradients, ggn, step, transform

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore:fisher='ggn' runs")]


class Twice(nn.Module):
    """The same layer two times in a row."""

    def __init__(self, nonlinear: bool = True) -> None:
        super().__init__()
        self.cell, self.head, self.nonlinear = nn.Linear(3, 3), nn.Linear(3, 2), nonlinear

    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x)
        return self.head(self.cell(torch.tanh(h) if self.nonlinear else h))


def intermediate_gradients(net: Twice, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs and output gradients (of single examples) of both uses."""
    first = net.cell(x)
    second_in = torch.tanh(first)
    second = net.cell(second_in)
    g1, g2 = torch.autograd.grad(F.cross_entropy(net.head(second), y, reduction="sum"), [first, second])
    return x, second_in.detach(), g1, g2


def test_a_layer_used_twice_has_the_rows_of_both_uses() -> None:
    """A is the mean over the rows of all uses, G the sum over uses of the mean over examples."""
    net, x, y = Twice(), torch.randn(6, 3), torch.randint(0, 2, (6,))
    taken = step(net, "kfac", x, lambda f: F.cross_entropy(f, y), loss="cross_entropy", fisher="empirical")
    a1, a2, g1, g2 = intermediate_gradients(net, x, y)
    rows = torch.cat([torch.cat([a1, a2]), torch.ones(12, 1)], 1)
    torch.testing.assert_close(taken.factors("cell")["A"], rows.T @ rows / 12)
    torch.testing.assert_close(taken.factors("cell")["G"], (g1.T @ g1 + g2.T @ g2) / 6)
    assert [len(layer.uses) for layer in taken.model.layers] == [2, 1]


def table_net(padding: int | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Embedding(7, 3, padding_idx=padding), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))


def frequencies(x: Tensor, size: int) -> Tensor:
    return torch.bincount(x.flatten(), minlength=size).to(torch.float64) / x.numel()


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_input_factor_of_an_embedding_is_the_token_frequencies(method: str) -> None:
    net, x, y = table_net(), torch.randint(0, 7, (6, 4)), torch.randint(0, 3, (6,))
    taken = step(
        net, method, x, lambda f: F.cross_entropy(f, y), loss="cross_entropy", fisher="empirical",
        **({"damping_scheme": "eigenvalue"} if method == "kfac" else {}), damping=0.01,
    )  # fmt: skip
    a, g = taken.factors("0")["A"], taken.factors("0")["G"]
    torch.testing.assert_close(a, torch.diag(frequencies(x, 7)))
    assert taken.model.state_dict()["curvature.0.A"].shape == (7,)
    middle = net[0](x).detach().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(net[1:](middle), y, reduction="sum"), middle)
    torch.testing.assert_close(g, torch.einsum("bsi,bsj->ij", grad, grad) / 6)
    gradient, direction = taken.gradient["0.weight"].T, taken.direction["0.weight"].T  # (features, tokens)
    matrix = torch.kron(g, a) + 0.01 * torch.eye(21)
    torch.testing.assert_close(direction.flatten(), torch.linalg.solve(matrix, gradient.flatten()))


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("fisher", ["empirical", "ggn"])
def test_diagonal_fisher_of_an_embedding(fisher: str, padding: int | None) -> None:
    """Repeated tokens of one example are summed before the square; a padding token has none."""
    net, x, y = table_net(padding), torch.randint(0, 7, (6, 4)), torch.randint(0, 3, (6,))

    def user(f: Tensor) -> Tensor:
        return F.cross_entropy(f, y)

    taken = step(net, "diag", x, user, loss="cross_entropy", fisher=fisher)
    if fisher == "ggn":
        dense = ggn(net, "0", x, user).diagonal()
    else:
        rows = example_gradients(net, "0", x, lambda f, n: F.cross_entropy(f, y[n : n + 1]))
        dense = rows.square().mean(0)
    dense = dense.reshape(7, 3).T
    torch.testing.assert_close(taken.factors("0")["D"].reshape(3, 7), dense)
    if padding is not None:
        assert not dense[:, padding].any()


def test_second_moment_of_an_embedding_in_its_eigenbasis() -> None:
    net, x, y = table_net(), torch.randint(0, 7, (6, 4)), torch.randint(0, 3, (6,))
    model = transform(net, "ekfac", x, loss="cross_entropy", fisher="empirical")
    for refresh in (True, False):
        model.due(refresh=refresh)
        model.zero_grad()
        outputs = model(x)
        model.backward(F.cross_entropy(outputs, y), outputs)
        model.precondition_()
    rows = example_gradients(net, "0", x, lambda f, n: F.cross_entropy(f, y[n : n + 1])).reshape(6, 7, 3)
    factors = model.factors("0")
    qa = factors["QA"] if factors["QA"].ndim == 2 else torch.diag(factors["QA"])
    torch.testing.assert_close(qa.abs(), torch.eye(7))
    turned = torch.einsum("nti,io->not", rows, factors["QG"])
    torch.testing.assert_close(factors["S"], turned.square().mean(0))


class Tied(nn.Module):
    """A language model whose head is its table, with or without a bias of its own."""

    def __init__(self, vocabulary: int = 6, features: int = 3, bias: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, features)
        self.core = nn.Linear(features, features)
        self.head = nn.Linear(features, vocabulary, bias=bias)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.core(self.table(x)))).transpose(1, 2)


@pytest.mark.parametrize("bias", [False, True])
def test_a_tied_table_has_the_heads_term_and_a_scaled_term_of_the_embedding(bias: bool) -> None:
    """kron(G, A + (tr H / tr G) C): H the token frequencies, C the Gram of the embedding's output gradients."""
    net, x, y = Tied(bias=bias), torch.randint(0, 6, (5, 4)), torch.randint(0, 6, (5, 4))

    def user(f: Tensor) -> Tensor:
        return F.cross_entropy(f, y)

    taken = step(
        net, "kfac", x, user, loss="cross_entropy", fisher="empirical", damping=0.01, damping_scheme="eigenvalue"
    )
    (layer,) = [layer for layer in taken.model.layers if len(layer.uses) == 2]
    factors = taken.factors(layer.name)
    embedded = net.table(x).detach().requires_grad_()
    hidden = torch.tanh(net.core(embedded))
    logits = net.head(hidden)
    ge, gl = torch.autograd.grad(F.cross_entropy(logits.transpose(1, 2), y, reduction="sum"), [embedded, logits])
    rows = torch.cat([hidden, torch.ones(5, 4, 1)], 2) if bias else hidden
    a, g = (torch.einsum("bsi,bsj->ij", r, r).detach() / 20 for r in (rows, gl))
    c = torch.zeros_like(a)
    c[:3, :3] = torch.einsum("bsi,bsj->ij", ge, ge) / 20
    h = frequencies(x, 6)
    torch.testing.assert_close(factors["G"], g)
    torch.testing.assert_close(factors["A"], a + h.sum() / g.trace() * c)
    names = [n for n in (layer.weight, layer.bias) if n]
    assert len(names) == 1 + bias
    parts = [torch.cat([source[n].reshape(6, -1) for n in names], 1) for source in (taken.gradient, taken.direction)]
    matrix = torch.kron(factors["G"], factors["A"]) + 0.01 * torch.eye(parts[0].numel())
    torch.testing.assert_close(parts[1].flatten(), torch.linalg.solve(matrix, parts[0].flatten()))
    assert any(row.status == "approximated" for row in taken.model.report().rows if row.parameter in names)


@pytest.mark.parametrize("method", ["kfac", "ekfac", "diag", "foof"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_large_vocabulary_never_makes_a_square_of_it(method: str, tied: bool) -> None:
    """No tensor of 50,000 x 50,000, nor of rows x 50,000, beyond the logits: the largest new one is counted."""
    torch.set_default_dtype(torch.float32)
    words, size = 50_000, 4
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(value, Tensor) and value.device.type != "meta":
                    largest = max(largest, value.untyped_storage().nbytes() // value.element_size())
            return out

    x = torch.randint(0, words, (3, 5))
    if tied:
        net: nn.Module = Tied(words, size)
        y = torch.randint(0, words, (3, 5))
    else:
        net = nn.Sequential(nn.Embedding(words, size), nn.Flatten(), nn.Linear(5 * size, 3))
        y = torch.randint(0, 3, (3,))
    options = {} if method == "foof" else {"loss": "cross_entropy", "fisher": "mc"}
    with Watch():
        model = fxcurv.transform(net, method, example_inputs=(x,), proofs=False, **options)
        for _ in range(2):
            model.zero_grad()
            outputs = model(x)
            model.backward(F.cross_entropy(outputs, y), outputs)
            model.precondition_()
    logits = 15 * words if tied else 0
    assert largest <= max(logits, (size + 1) * words) * 1.5
    for p in net.parameters():
        assert torch.isfinite(p.grad).all()


class TwoHeads(nn.Module):
    """Two classifiers on one trunk, each with an output of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.one, self.other = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.trunk(x))
        return self.one(h), self.other(h)


@pytest.mark.parametrize("method", ["kfac", "ekfac", "tkfac", "kpsvd"])
def test_heads_that_are_trained_in_turn_keep_curvature_of_their_own(method: str) -> None:
    """A head that a step does not reach stays as it was, and the other one's factors are those of its own batches."""
    torch.manual_seed(0)
    net, x = TwoHeads(), torch.randn(6, 3)
    settings = {"fisher": "empirical", "ema": 0.0, "kl_clip": None, "factor_every": 1, "solve_every": 1}
    model = fxcurv.transform(net, method, example_inputs=(x,), loss="cross_entropy", **settings)
    for k, (name, classes) in enumerate([("other", 3), ("one", 2), ("other", 3)]):
        rest = {"one", "other"} - {name}
        before = {n: {p: f.clone() for p, f in model.factors(n).items()} for n in rest}
        y, rows = torch.randint(0, classes, (6,)), x + k
        model.zero_grad()
        out = model(rows)[name == "other"]
        loss = F.cross_entropy(out, y)
        model.backward(loss, out)
        model.precondition_()
        h = torch.cat([torch.tanh(net.trunk(rows)), torch.ones(6, 1)], 1).detach()
        g = (out.softmax(1) - F.one_hot(y, classes)).detach()
        found = model.factors(name)
        if method == "kfac":
            torch.testing.assert_close(found["A"], h.T @ h / 6)
            torch.testing.assert_close(found["G"], g.T @ g / 6)
        assert found["A"].trace() > 0 and found["G"].trace() > 0
        for other, factors in before.items():
            assert all(torch.equal(model.factors(other)[part], value) for part, value in factors.items())
