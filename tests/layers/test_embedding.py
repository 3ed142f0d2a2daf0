"""Embeddings, with padding, and tied to an output projection."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.layers.check import FRONTENDS, Fn, assert_exact, find, reasons

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


@pytest.mark.parametrize("option", ["sparse", "scale_grad_by_freq", "max_norm"])
def test_options_that_change_the_gradient_are_refused(option):
    model = nn.Sequential(nn.Embedding(7, 3, **{option: True if option != "max_norm" else 1.0}))
    _, detection = find(model, torch.randint(7, (5,)))
    assert option in reasons(detection)["0.weight"]
