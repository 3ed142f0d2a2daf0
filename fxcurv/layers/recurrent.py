"""Exposures of recurrent networks: ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and their ATen operations.

Each layer and direction becomes its products over all time steps, between a loop without gradient and the adjoint of
that loop (see :mod:`fxcurv.layers.recurrence`). The cells of a Python loop are exposed in
:mod:`fxcurv.layers.recurrence.cells`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxcurv.capture.kept import keep_whole
from fxcurv.layers.expose import Exposure, exposes
from fxcurv.layers.recurrence import cells, sequence  # noqa: F401  (cells registers its exposures)
from fxcurv.layers.recurrence.network import Network
from fxcurv.layers.recurrence.packing import is_packed, mark_packed
from fxcurv.layers.recurrence.strands import KINDS, Kind, Node, Weights
from fxcurv.layers.view import Refused

aten = torch.ops.aten


for _class in (nn.LSTM, nn.GRU, nn.RNN):
    keep_whole(_class)  # a class derived from one, too, unless it has a forward of its own


@exposes(nn.LSTM, nn.GRU, nn.RNN)
def _module(at: Exposure, input: Any, hx: Any = None) -> Node:
    module, packed = at.module, input if is_packed(input) else None
    kind = KINDS[module.mode]
    states = (None,) * kind.states if hx is None else _states(at, hx, kind)
    layers = _owned(at)
    hidden = module.hidden_size
    if packed is None:
        x, lengths = at.call(sequence.enter, input, module.batch_first), None
    else:
        x, lengths = at.call(sequence.enter_packed, packed), at.call(sequence.sizes_of, packed)
    dropout = module.dropout if module.training else 0.0
    network = Network(
        at, kind, x, states, (module.proj_size or hidden, hidden)[: kind.states], dropout, packed, lengths
    )
    out, last = network.nodes(layers)
    if packed is None:
        out = at.call(sequence.leave, out, input, module.batch_first)
    else:
        out = at.call(sequence.leave_packed, out, packed)
    ends = [at.call(sequence.final, values, input) for values in last]
    result = at.call(_with_states, out, *ends)
    if packed is not None:
        mark_packed(result)
    return result


def _with_states(out: Any, *states: Any) -> Any:
    """What torch's modules return."""
    return out, states[0] if len(states) == 1 else states


def _states(at: Exposure, hx: Any, kind: Kind) -> tuple[Any, ...]:
    """The user's initial states, one a state of the network."""
    if kind.states == 1:
        return (hx,)
    return tuple(hx) if isinstance(hx, (tuple, list)) else tuple(at.items(hx, 2))


def _owned(at: Exposure) -> list[list[Weights]]:
    """The called module's parameters by layer and direction."""
    module = at.module

    def weights(suffix: str) -> Weights:
        ih, hh = at.own(f"weight_ih_{suffix}"), at.own(f"weight_hh_{suffix}")
        if ih is None or hh is None:
            raise Refused(f"belongs to a {type(module).__name__} without its weights")
        b_ih, b_hh = (at.own(f"bias_{side}_{suffix}") if module.bias else None for side in ("ih", "hh"))
        return Weights(ih, hh, b_ih, b_hh, at.own(f"weight_hr_{suffix}") if module.proj_size else None)

    ends = ("", "_reverse") if module.bidirectional else ("",)
    return [[weights(f"l{depth}{end}") for end in ends] for depth in range(module.num_layers)]


def _register(mode: str, function: Any, operation: Any) -> None:
    """The flat operations: parameters in one list, initial states always given, results in one flat tuple.

    The overload ``data`` has packed data, and its batch sizes in the second place.
    """
    kind = KINDS[mode]

    @exposes(function, operation.input, operation.data)
    def _operation(at: Exposure, x: Any, *rest: Any) -> Node:
        batch_sizes, rest = (None, rest) if isinstance(rest[2], bool) else (rest[0], rest[1:])
        hx, params, biases, layers, dropout, train, bidirectional, *first = rest
        directions = 1 + bidirectional
        count = len(params) // (layers * directions)
        each = [_listed(params[k * count : (k + 1) * count], biases) for k in range(layers * directions)]
        hx = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        enter = (sequence.enter, x, first[0]) if batch_sizes is None else (sequence.pad, x, batch_sizes)
        inner = at.call(*enter)
        sizes = tuple(at.call(sequence.features, state) for state in hx)
        network = Network(at, kind, inner, hx, sizes, dropout if train else 0.0, None, batch_sizes)
        out, last = network.nodes([each[k : k + directions] for k in range(0, len(each), directions)])
        leave = (sequence.leave, out, x, first[0]) if batch_sizes is None else (sequence.pack, out, batch_sizes)
        return at.call(_flat, at.call(*leave), *(at.call(sequence.final, values, inner) for values in last))


def _flat(*values: Any) -> Any:
    """What the flat operations return."""
    return values


def _listed(params: Any, biases: bool) -> Weights:
    """The parameters of one layer and direction in torch's order."""
    ih, hh, *rest = params
    b_ih, b_hh = rest[:2] if biases else (None, None)
    return Weights(ih, hh, b_ih, b_hh, *rest[2 if biases else 0 :])


_register("LSTM", torch.lstm, aten.lstm)
_register("GRU", torch.gru, aten.gru)
_register("RNN_TANH", torch.rnn_tanh, aten.rnn_tanh)
_register("RNN_RELU", torch.rnn_relu, aten.rnn_relu)
