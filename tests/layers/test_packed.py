"""Packed sequences: traced as they are, and steps that do not exist leave no trace in rows and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.utils.rnn as rnn_utils
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fxcurv
from tests.layers.check import assert_exact, find
from tests.layers.whole import NETS, assert_same

pytestmark = pytest.mark.usefixtures("float64")
LENGTHS = {"sorted": torch.tensor([5, 3, 3, 1]), "unsorted": torch.tensor([3, 1, 5, 3])}


class Packed(nn.Module):
    """Packing and padding inside the forward."""

    def __init__(self, kind: str, ordered: bool, **options: Any) -> None:
        super().__init__()
        self.rnn, self.ordered = NETS[kind](3, 4, **options), ordered

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        first = self.rnn.batch_first
        packed = pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=self.ordered)
        y, states = self.rnn(packed)
        padded, _ = rnn_utils.pad_packed_sequence(y, batch_first=first, total_length=7)
        return padded, y.data, states[0], states[1] if isinstance(self.rnn, nn.LSTM) else states


class Tagger(nn.Module):
    """A packed sequence as argument and as result, put together anew on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(9, 3), nn.LSTM(3, 4, bidirectional=True)
        self.head = nn.Linear(8, 2)

    def forward(self, tokens: PackedSequence, hx: Any = None) -> Any:
        x = PackedSequence(self.embedding(tokens.data), tokens.batch_sizes, tokens.sorted_indices)
        y, _ = self.rnn(x, hx)
        return PackedSequence(self.head(y.data), y.batch_sizes, y.sorted_indices, y.unsorted_indices)


PACKED = [
    ("LSTM", {"num_layers": 2, "bidirectional": True, "dropout": 0.3}),
    ("LSTM", {"proj_size": 2, "batch_first": True, "bidirectional": True}),
    ("GRU", {"num_layers": 2, "bidirectional": True, "dropout": 0.3, "batch_first": True}),
    ("RNN", {"num_layers": 2, "bidirectional": True, "bias": False}),
    ("RNN", {"nonlinearity": "relu", "batch_first": True}),
]


@pytest.mark.parametrize("order", LENGTHS)
@pytest.mark.parametrize(("kind", "options"), PACKED, ids=str)
def test_packed_inside_the_forward(kind: str, options: dict[str, Any], order: str) -> None:
    net = Packed(kind, order == "sorted", **options)
    x = torch.randn(4, 6, 3) if net.rnn.batch_first else torch.randn(6, 4, 3)
    assert_same(net, (x, LENGTHS[order]))


@pytest.mark.parametrize("given", [False, True])
def test_packed_as_argument_and_result(given: bool) -> None:
    tokens = pack_padded_sequence(torch.randint(0, 9, (5, 4)), LENGTHS["unsorted"], enforce_sorted=False)
    hx = (torch.randn(2, 4, 4), torch.randn(2, 4, 4)) if given else None
    assert_same(Tagger(), (tokens, hx))


def test_a_packed_result_goes_into_the_next_network() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.GRU(3, 4, bidirectional=True), nn.LSTM(8, 2)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            y, _ = self.first(pack_padded_sequence(x, lengths, enforce_sorted=False))
            return pad_packed_sequence(self.second(y)[0])[0]

    assert_same(Stack(), (torch.randn(5, 4, 3), LENGTHS["unsorted"]))


def test_packed_is_refused_by_export_in_one_sentence() -> None:
    with pytest.raises(fxcurv.FxcurvError, match="packed sequence.*use frontend='symbolic'"):
        find(Packed("LSTM", True), torch.randn(6, 4, 3), LENGTHS["sorted"], frontend="export")


@pytest.mark.parametrize("kind", NETS)
def test_steps_that_do_not_exist_have_no_rows(kind: str) -> None:
    """Whatever lies there, rows and their constant are zero, and so are the gradients."""
    net = Packed(kind, True, batch_first=True, bidirectional=True)
    detection = assert_exact(net, torch.randn(4, 6, 3), LENGTHS["sorted"])
    assert {len(use.aux) for layer in detection.layers for use in layer.uses} == {1}
    x, mask = torch.full((5, 4, 3), float("inf")), torch.arange(5).unsqueeze(1) < LENGTHS["sorted"]
    x[mask] = 1.0
    form = detection.layers[0].form
    assert torch.equal(form.rows_a(torch.where(mask[..., None], x, 7.0), mask).sum((1, 2, 3)), 4.0 * LENGTHS["sorted"])


def test_pad_packed_sequence_outside_a_trace_is_torch_s_own() -> None:
    """Nothing of a trace stays behind."""
    find(Packed("GRU", True), torch.randn(6, 4, 3), LENGTHS["sorted"])
    packed = pack_padded_sequence(torch.randn(6, 4, 3), LENGTHS["sorted"])
    assert isinstance(packed, PackedSequence) and isinstance(PackedSequence(*packed), PackedSequence)
    assert pad_packed_sequence(packed)[0].shape == (5, 4, 3)
