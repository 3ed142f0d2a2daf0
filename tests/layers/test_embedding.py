"""Embeddings, with padding, and tied to an output projection."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.layers.check import FRONTENDS, Fn, assert_exact, find, reasons
from tests.methods import oracle

pytestmark = pytest.mark.usefixtures("float64")


class Tied(nn.Module):
    """Embedding and output projection on one tensor."""

    def __init__(self, bias=False):
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.mid = nn.Linear(3, 3)
        self.head = nn.Linear(3, 7, bias=bias)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.mid(self.embed(x))))


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("padding", [None, 2, -1])
@pytest.mark.parametrize("shape", [(5,), (5, 4), (2, 3, 4)])
def test_embedding(shape, padding, frontend):
    model = nn.Sequential(nn.Embedding(7, 3, padding_idx=padding), nn.Tanh())
    x = torch.randint(7, shape)
    x.view(-1)[0] = 6
    (layer,) = assert_exact(model, x, frontend=frontend).layers
    form = layer.form
    assert (layer.kind, layer.shape, form.permutation) == ("embedding", (1, 3, 7), (1, 0))
    assert form.diagonal_input
    rows = form.rows_a(x)
    assert rows.shape[:2] == (shape[0], x.numel() // shape[0])
    gram = torch.einsum("bsgi,bsgj->ij", rows, rows)
    torch.testing.assert_close(torch.diag(form.input_counts(x, torch.float64)), gram)
    assert torch.equal(form.valid(x), rows.sum((2, 3)) > 0)


def test_scale_and_indices_of_any_integer_type():
    model = Fn(lambda m, x: F.embedding(x, 0.5 * m.w.t(), padding_idx=1), w=(3, 7))
    x = torch.randint(7, (5, 4)).int()
    (layer,) = assert_exact(model, x).layers
    rows = layer.form.rows_a(x)
    assert rows.max() == 0.5
    gram = torch.einsum("bsgi,bsgj->ij", rows, rows)
    torch.testing.assert_close(torch.diag(layer.form.input_counts(x, torch.float64)), gram)


def test_functional_padding_counts_from_the_end():
    x = torch.randint(7, (5, 4))
    x[0, 0] = 6
    (layer,) = assert_exact(Fn(lambda m, x: F.embedding(x, m.w, padding_idx=-1), w=(7, 3)), x).layers
    assert layer.form.padding_idx == 6


def test_large_vocabulary_needs_no_one_hot_rows(monkeypatch):
    (layer,) = find(nn.Sequential(nn.Embedding(50_000, 2)), torch.zeros(2, 3, dtype=torch.long))[1].layers
    monkeypatch.setattr(torch.nn.functional, "one_hot", None)
    x = torch.randint(50_000, (4, 8))
    assert layer.form.input_counts(x).sum() == 32
    assert layer.form.product(x, torch.ones(4, 8, 2)).sum() == 64


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("bias", [False, True])
def test_tied_with_the_output_projection(bias, frontend):
    detection = assert_exact(Tied(bias), torch.randint(7, (5, 4)), frontend=frontend)
    tied = next(layer for layer in detection.layers if layer.weight == "embed.weight")
    assert tied.kind == "linear"
    assert tied.shape == (1, 7, 3 + bias)
    assert [use.swapped for use in tied.uses] == [False, True]
    assert tied.uses[1].form.diagonal_input and not tied.uses[1].form.bias
    assert tied.bias == ("head.bias" if bias else None)
    assert "transposed" in tied.note
    assert not detection.uncovered


REMEDIES = {"sparse": "sparse=False", "scale_grad_by_freq": "turn it off", "max_norm": "clip"}


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("option", REMEDIES)
def test_options_that_change_the_gradient_are_refused(option, kind):
    model = nn.Sequential(kind(7, 3, **{option: True if option != "max_norm" else 1.0}))
    _, detection = find(model, torch.randint(7, (5, 2)))
    assert option in reasons(detection)["0.weight"] and REMEDIES[option] in reasons(detection)["0.weight"]


def one_hot(m, x):
    return F.one_hot(x, 7).to(m.w.dtype) @ m.w


LOOKUPS = {
    "item": (lambda m, x: m.w[x], (7, 3), "embedding"),
    "item of a vector": (lambda m, x: m.w[x], (7,), "embedding"),
    "item of arrays": (lambda m, x: m.w[x], (7, 2, 3), "embedding"),
    "transposed": (lambda m, x: 2 * m.w.t()[x], (3, 7), "embedding"),
    "from the end": (lambda m, x: m.w[x - 7], (7, 3), "embedding"),
    "select": (lambda m, x: torch.index_select(m.w, 0, x.flatten()), (7, 3), "embedding"),
    "one-hot": (one_hot, (7, 3), "linear"),
    "positions": (lambda m, x: F.embedding(torch.arange(4), m.w) + F.one_hot(x, 3), (7, 3), "embedding"),
}


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("name", LOOKUPS)
def test_lookup(name, frontend):
    function, shape, kind = LOOKUPS[name]
    x = torch.randint(3 if name == "positions" else 7, (5, 4))
    detection = assert_exact(Fn(function, w=shape), x, frontend=frontend, shapes=True)
    assert [layer.kind for layer in detection.layers] == [kind] and not detection.uncovered


def test_lookup_by_a_mask_is_none():
    model = Fn(lambda m, x: x + m.w[x[0] > 0].sum(), w=(3,))
    _, detection = find(model, torch.randn(5, 3), shapes=True)
    assert "graph computes" in reasons(detection)["w"]


BAGS = {
    "mean": {},
    "sum": {"mode": "sum"},
    "padding": {"padding_idx": 2},
    "padding from the end": {"padding_idx": -1, "mode": "sum"},
}


def _bag_input():
    x = torch.randint(0, 7, (5, 4))
    x[0], x[1, :2] = 2, 6
    return x


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("name", BAGS)
def test_bag(name, frontend):
    x = _bag_input()
    model = nn.Sequential(nn.EmbeddingBag(7, 3, **BAGS[name]), nn.Tanh())
    detection = assert_exact(model, x, frontend=frontend)
    (layer,) = detection.layers
    assert (layer.kind, layer.shape) == ("embedding_bag", (1, 3, 7)) and not detection.uncovered


class Bags(nn.Module):
    """Bags of unequal sizes, an empty one among them."""

    def __init__(self, **options):
        super().__init__()
        self.bag = nn.EmbeddingBag(7, 3, **options)

    def forward(self, x, offsets, *weights):
        return torch.tanh(self.bag(x, offsets, *weights))


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("padding", [None, 2])
def test_bags_with_offsets(padding, weighted, last, frontend):
    x = torch.tensor([1, 1, 2, 5, 0, 2, 6, 6, 6])
    offsets = torch.tensor([0, 3, 3, 7, 9] if last else [0, 3, 3, 7])
    model = Bags(mode="sum" if weighted else "mean", include_last_offset=last, padding_idx=padding)
    inputs = (x, offsets, torch.rand(9)) if weighted else (x, offsets)
    detection = assert_exact(model, *inputs, frontend=frontend)
    (layer,) = detection.layers
    aux = inputs[1:]
    rows = layer.form.rows_a(x, *aux)
    assert rows.shape == (4, 1, 1, 7)
    gram = torch.einsum("bsgi,bsgj->ij", rows, rows)
    torch.testing.assert_close(layer.form.input_counts(x, torch.float64, *aux), gram.diagonal())


def test_bag_functional_and_maximum():
    x = _bag_input()
    model = Fn(lambda m, x: F.embedding_bag(x, 0.5 * m.w, mode="sum"), w=(7, 3))
    assert assert_exact(model, x).layers[0].form.scale == 0.5
    why = reasons(find(nn.Sequential(nn.EmbeddingBag(7, 3, mode="max")), x)[1])
    assert "'max'" in why["0.weight"]


@pytest.mark.parametrize("method", ["kfac", "ekfac", "diag"])
@pytest.mark.parametrize("name", ["bag", "item of arrays"])
def test_statistics_of_lookups(name, method):
    """Diagonal input factor, output factor and squared gradients against explicit rows and single examples."""
    x, y = _bag_input(), torch.randint(0, 3, (5,))
    if name == "bag":
        first, table = nn.EmbeddingBag(7, 4, padding_idx=2), "0.weight"
        valid = (x != 2).to(torch.float64)
        rows = (F.one_hot(x, 7) * valid[..., None]).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)
    else:
        first, table = Fn(lambda m, x: m.w[x], w=(7, 2, 2)), "0.w"
        rows = F.one_hot(x, 7).to(torch.float64).flatten(0, 1)
    net = nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.Linear(first(x).flatten(1).shape[1], 3))
    options = {"damping_scheme": "eigenvalue"} if method == "kfac" else {}
    step = oracle.step(
        net, method, x, lambda out: F.cross_entropy(out, y), loss="cross_entropy", fisher="empirical", damping=0.1,
        proofs=True, **options,
    )  # fmt: skip
    assert step.model.uncovered == ()
    layer = step.model.layers[0]
    factors = step.factors(layer.name)
    if method == "diag":
        squares = 0
        for k in range(5):
            loss = F.cross_entropy(net(x[k : k + 1]), y[k : k + 1])
            squares = squares + torch.autograd.grad(loss, net.get_parameter(table))[0].square() / 5
        torch.testing.assert_close(factors["D"], squares.flatten(1).t())
        return
    a = torch.diag(rows.square().mean(0))
    hidden = first(x).detach().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(net[1:](hidden), y, reduction="sum"), hidden)
    g = g.reshape(-1, 4).t() @ g.reshape(-1, 4) / 5
    torch.testing.assert_close(factors["A"], a)
    torch.testing.assert_close(factors["G"], g)
    if method == "kfac":
        gradient = step.gradient[table].flatten(1).t()
        solved = torch.linalg.solve(torch.kron(g, a) + 0.1 * torch.eye(28), gradient.flatten()).view(4, 7)
        torch.testing.assert_close(step.direction[table].flatten(1).t(), solved)
