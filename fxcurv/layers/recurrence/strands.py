"""One layer in one direction as nodes: input product, loop, hidden product, adjoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxcurv.layers.expose import Exposure
from fxcurv.layers.recurrence import sequence
from fxcurv.layers.recurrence.gru import gru_adjoint, gru_loop
from fxcurv.layers.recurrence.lstm import lstm_adjoint, lstm_loop
from fxcurv.layers.recurrence.products import known_linear, sequence_linear
from fxcurv.layers.recurrence.simple import rnn_adjoint, rnn_loop

Node = fx.Node


@dataclass(frozen=True)
class Weights:
    """Nodes of the parameters of one layer and direction; ``None`` where the network has none."""

    ih: Node
    hh: Node
    b_ih: Node | None = None
    b_hh: Node | None = None
    hr: Node | None = None


@dataclass(frozen=True)
class Strand:
    """What one layer and direction starts from.

    x: the sequence (T, B, d) in the order of processing. states: initial ones, (B, R) for h and (B, H) for c.
    sizes, mask: number of running sequences by step and which steps exist, where sequences differ in length.
    """

    at: Exposure
    x: Node
    states: tuple[Node, ...]
    weights: Weights
    sizes: Node | None
    mask: Node | None

    @property
    def masks(self) -> tuple[Node, ...]:
        """The auxiliary operand of the products."""
        return () if self.mask is None else (self.mask,)

    def input_product(self) -> Node:
        """The product of the inputs of all steps."""
        return self.at.call(sequence_linear, self.x, self.weights.ih, self.weights.b_ih, *self.masks)

    def hidden_product(self, hs: Node, value: Node) -> Node:
        """The product of the states that all steps start from."""
        return self.known(self.at.call(sequence.before, hs), self.weights.hh, self.weights.b_hh, value)

    def known(self, x: Node, weight: Node, bias: Node | None, value: Node) -> Node:
        """A product whose value the loop has found."""
        return self.at.call(known_linear, x, weight, bias, value, *self.masks)

    def plain(self, weight: Node | None) -> Node | None:
        """A parameter as the loop reads it, without gradient."""
        return None if weight is None else self.at.call(torch.detach, weight)


@dataclass(frozen=True)
class Kind:
    """A kind of recurrent network: what makes its nodes, and its number of states. gates: per hidden feature."""

    nodes: Callable[[Strand], Node]
    gates: int
    states: int = 1


def _lstm(s: Strand) -> Node:
    w_hh, w_hr = s.plain(s.weights.hh), s.plain(s.weights.hr)
    zx = s.input_product()
    loop = s.at.call(lstm_loop, zx, *s.states, w_hh, s.plain(s.weights.b_hh), w_hr, s.sizes)
    value, hs, cs, gates, tanh_c, m = s.at.items(loop, 6)
    zh = s.hidden_product(hs, value)
    zr = None if s.weights.hr is None else s.known(m, s.weights.hr, None, s.at.call(sequence.after, hs))
    return s.at.call(lstm_adjoint, zx, zh, zr, *s.states, w_hh, w_hr, hs, cs, gates, tanh_c, s.sizes)


def _gru(s: Strand) -> Node:
    w_hh, zx = s.plain(s.weights.hh), s.input_product()
    loop = s.at.call(gru_loop, zx, *s.states, w_hh, s.plain(s.weights.b_hh), s.sizes)
    value, hs, gates = s.at.items(loop, 3)
    zh = s.hidden_product(hs, value)
    return s.at.call(gru_adjoint, zx, zh, *s.states, w_hh, hs, gates, value, s.sizes)


def _rnn(relu: bool) -> Callable[[Strand], Any]:
    def nodes(s: Strand) -> Node:
        w_hh, zx = s.plain(s.weights.hh), s.input_product()
        loop = s.at.call(rnn_loop, zx, *s.states, w_hh, s.plain(s.weights.b_hh), relu, s.sizes)
        value, hs = s.at.items(loop, 2)
        return s.at.call(rnn_adjoint, zx, s.hidden_product(hs, value), *s.states, w_hh, hs, relu, s.sizes)

    return nodes


KINDS = {
    "LSTM": Kind(_lstm, 4, states=2),
    "GRU": Kind(_gru, 3),
    "RNN_TANH": Kind(_rnn(False), 1),
    "RNN_RELU": Kind(_rnn(True), 1),
}
"""By the ``mode`` of torch's modules."""
