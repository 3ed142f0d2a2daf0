"""Recurrent networks as users write them, from torch alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from zoo.sample import Sample

LIBRARY = ""
WORDS, WIDTH, HIDDEN, CLASSES = 30, 12, 16, 5


class Classifier(nn.Module):
    """Words, a recurrent network of torch's, a linear layer on the last step."""

    def __init__(self, kind: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.words, self.rnn = nn.Embedding(WORDS, WIDTH), kind(WIDTH, HIDDEN, batch_first=True, **options)
        size = (options.get("proj_size") or HIDDEN) * (2 if options.get("bidirectional") else 1)
        self.out = nn.Linear(size, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.rnn(self.words(tokens))[0][:, -1])


class TimeFirst(nn.Module):
    """A tagger on (time, batch) input with an initial state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.rnn, self.out = nn.Embedding(WORDS, WIDTH), nn.GRU(WIDTH, HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        state = torch.zeros(1, tokens.shape[1], HIDDEN, dtype=self.out.weight.dtype, device=tokens.device)
        return self.out(self.rnn(self.words(tokens), state)[0])


class LanguageModel(nn.Module):
    """Stacked LSTM with dropout; the output projection is tied to the words."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, HIDDEN)
        self.rnn = nn.LSTM(HIDDEN, HIDDEN, 2, dropout=0.2, batch_first=True)
        self.out = nn.Linear(HIDDEN, WORDS)
        self.out.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.rnn(self.words(tokens))[0]).flatten(0, 1)


class Packed(nn.Module):
    """Padded sequences of known lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(WORDS, WIDTH, padding_idx=0), nn.Linear(2 * HIDDEN, CLASSES)
        self.rnn = nn.LSTM(WIDTH, HIDDEN, batch_first=True, bidirectional=True)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.words(tokens), lengths, batch_first=True, enforce_sorted=False)
        padded = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]
        return self.out(padded.amax(1))


class CellLoop(nn.Module):
    """A cell of torch's in a Python loop over a fixed number of steps."""

    def __init__(self, kind: type[nn.Module], steps: int = 6) -> None:
        super().__init__()
        self.words, self.cell, self.steps = nn.Embedding(WORDS, WIDTH), kind(WIDTH, HIDDEN), steps
        self.out = nn.Linear(HIDDEN, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x, state = self.words(tokens), None
        for i in range(self.steps):
            state = self.cell(x[:, i], state)
        return self.out(state[0] if isinstance(self.cell, nn.LSTMCell) else state)


class Seq2Seq(nn.Module):
    """An encoder, a decoder fed with the targets, additive attention over the encoder at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.encoder = nn.Embedding(WORDS, WIDTH), nn.GRU(WIDTH, HIDDEN, batch_first=True)
        self.decoder = nn.GRUCell(WIDTH + HIDDEN, HIDDEN)
        self.query, self.key = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.score, self.out = nn.Linear(HIDDEN, 1, bias=False), nn.Linear(2 * HIDDEN, WORDS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, last = self.encoder(self.words(source))
        state, keys, y, outputs = last[0], self.key(memory), self.words(target), []
        for i in range(5):
            weights = self.score(torch.tanh(self.query(state)[:, None] + keys)).softmax(1)
            context = (weights * memory).sum(1)
            state = self.decoder(torch.cat([y[:, i], context], 1), state)
            outputs.append(self.out(torch.cat([state, context], 1)))
        return torch.stack(outputs, 1).flatten(0, 1)


class HandLSTM(nn.Module):
    """An LSTM in four lines, its gates as two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.states = nn.Linear(WIDTH, 4 * HIDDEN), nn.Linear(HIDDEN, 4 * HIDDEN, bias=False)
        self.out = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], HIDDEN)
        for step in x.unbind(1):
            i, f, g, o = (self.inputs(step) + self.states(h)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.out(h)


class HandGRU(nn.Module):
    """Raw matrices, a loop over ``range(x.shape[1])``."""

    def __init__(self) -> None:
        super().__init__()

        def draw(n: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(n, HIDDEN) / math.sqrt(n))

        self.wz, self.wr, self.wh = draw(WIDTH), draw(WIDTH), draw(WIDTH)
        self.uz, self.ur, self.uh = draw(HIDDEN), draw(HIDDEN), draw(HIDDEN)
        self.bz, self.br, self.bh = (nn.Parameter(torch.zeros(HIDDEN)) for _ in range(3))
        self.out = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], HIDDEN, dtype=x.dtype, device=x.device)
        for t in range(x.shape[1]):
            z = torch.sigmoid(x[:, t] @ self.wz + h @ self.uz + self.bz)
            r = torch.sigmoid(x[:, t] @ self.wr + h @ self.ur + self.br)
            h = (1 - z) * h + z * torch.tanh(x[:, t] @ self.wh + (r * h) @ self.uh + self.bh)
        return self.out(h)


class ConvLSTM(nn.Module):
    """Gates by one convolution, over frames."""

    def __init__(self) -> None:
        super().__init__()
        self.gates, self.out = nn.Conv2d(3 + 4, 16, 3, padding=1), nn.Linear(4, CLASSES)

    def forward(self, frames: Tensor) -> Tensor:
        h = c = torch.zeros_like(frames[:, 0, :1]).expand(-1, 4, -1, -1)
        for frame in frames.unbind(1):
            i, f, g, o = self.gates(torch.cat([frame, h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.out(h.mean((2, 3)))


class Highway(nn.Module):
    """A simple recurrent network with residual gates and layer norm on the state, as ``F.linear`` calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(HIDDEN, WIDTH + HIDDEN) / 5),
            nn.Parameter(torch.zeros(HIDDEN)),
        )
        self.norm, self.out = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.size(0), HIDDEN)
        for i in range(x.size(1)):
            h = h + torch.tanh(self.norm(F.linear(torch.cat([x[:, i], h], -1), self.weight, self.bias)))
        return self.out(h)


def _tokens(*shape: int) -> Tensor:
    return torch.randint(1, WORDS, shape)


_LIST: dict[str, Callable[[], Sample]] = {
    "rnn_tanh": lambda: Sample(Classifier(nn.RNN), (_tokens(3, 6),)),
    "rnn_relu": lambda: Sample(Classifier(nn.RNN, nonlinearity="relu"), (_tokens(3, 6),)),
    "lstm": lambda: Sample(Classifier(nn.LSTM), (_tokens(3, 6),)),
    "gru": lambda: Sample(Classifier(nn.GRU), (_tokens(3, 6),)),
    "lstm_two_layers_dropout": lambda: Sample(Classifier(nn.LSTM, num_layers=2, dropout=0.3), (_tokens(3, 6),)),
    "lstm_bidirectional": lambda: Sample(Classifier(nn.LSTM, bidirectional=True), (_tokens(3, 6),)),
    "gru_bidirectional_two_layers": lambda: Sample(
        Classifier(nn.GRU, bidirectional=True, num_layers=2), (_tokens(3, 6),)
    ),
    "lstm_projected": lambda: Sample(Classifier(nn.LSTM, proj_size=7), (_tokens(3, 6),)),
    "gru_without_bias": lambda: Sample(Classifier(nn.GRU, bias=False), (_tokens(3, 6),)),
    "gru_time_first_with_state": lambda: Sample(TimeFirst(), (_tokens(6, 3),)),
    "lstm_language_model_tied": lambda: Sample(LanguageModel(), (_tokens(3, 6),)),
    "lstm_packed": lambda: Sample(Packed(), (_tokens(3, 6), torch.tensor([6, 4, 2]))),
    "rnn_cell_loop": lambda: Sample(CellLoop(nn.RNNCell), (_tokens(3, 6),)),
    "gru_cell_loop": lambda: Sample(CellLoop(nn.GRUCell), (_tokens(3, 6),)),
    "lstm_cell_loop": lambda: Sample(CellLoop(nn.LSTMCell), (_tokens(3, 6),)),
    "seq2seq_attention": lambda: Sample(Seq2Seq(), (_tokens(3, 6), _tokens(3, 5))),
    "hand_written_lstm": lambda: Sample(HandLSTM(), (torch.randn(3, 6, WIDTH),)),
    "hand_written_gru": lambda: Sample(HandGRU(), (torch.randn(3, 6, WIDTH),)),
    "conv_lstm": lambda: Sample(ConvLSTM(), (torch.randn(3, 4, 3, 6, 6),)),
    "residual_rnn": lambda: Sample(Highway(), (torch.randn(3, 6, WIDTH),)),
}


def names() -> tuple[str, ...]:
    """The list."""
    return tuple(_LIST)


def sample(name: str) -> Sample:
    """A listed model."""
    return _LIST[name]()
