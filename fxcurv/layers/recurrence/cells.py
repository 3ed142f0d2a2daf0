"""Exposures of ``nn.LSTMCell``, ``nn.GRUCell``, ``nn.RNNCell`` and their ATen operations.

A cell becomes two linear products and a pointwise function of them, so that a Python loop over it shows every step as
a use of the same two weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcurv.capture.kept import keep_whole
from fxcurv.layers.expose import Exposure, exposes
from fxcurv.layers.view import Refused

aten = torch.ops.aten


def lstm_cell(zx: Tensor, zh: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """(h, c) from the two products (..., 4H), gates i, f, g, o."""
    i, f, g, o = (zx + zh).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_cell(zx: Tensor, zh: Tensor, h: Tensor) -> Tensor:
    """h from the two products (..., 3H), gates r, z, n; r stands outside the hidden product."""
    (xr, xz, xn), (hr, hz, hn) = zx.chunk(3, -1), zh.chunk(3, -1)
    n = (xn + (xr + hr).sigmoid() * hn).tanh()
    return n + (xz + hz).sigmoid() * (h - n)


def tanh_cell(zx: Tensor, zh: Tensor) -> Tensor:
    """h from the two products (..., H)."""
    return (zx + zh).tanh()


def relu_cell(zx: Tensor, zh: Tensor) -> Tensor:
    """h from the two products (..., H)."""
    return (zx + zh).relu()


def zero_state(x: Tensor, size: int) -> Tensor:
    """The state that a cell starts from when it is given none."""
    return x.new_zeros(*x.shape[:-1], size)


_READS = {lstm_cell: slice(1, 2), gru_cell: slice(0, 1), tanh_cell: slice(0), relu_cell: slice(0)}
"""Which of the states (h, c) a pointwise function takes beside the products."""


def _cell(at: Exposure, function: Any, x: Any, states: tuple[Any, ...], *weights: Any) -> fx.Node:
    """weights: of the input and of the hidden product, then their biases or ``None``."""
    w_ih, w_hh, b_ih, b_hh = weights
    zx, zh = at.call(F.linear, x, w_ih, b_ih), at.call(F.linear, states[0], w_hh, b_hh)
    return at.call(function, zx, zh, *states[_READS[function]])


_CLASSES: dict[Any, Any] = {nn.LSTMCell: lstm_cell, nn.GRUCell: gru_cell, nn.RNNCell: tanh_cell}
for _class in _CLASSES:
    keep_whole(_class)  # a class derived from one, too, unless it has a forward of its own


@exposes(*_CLASSES)
def _module(at: Exposure, input: Any, hx: Any = None) -> fx.Node:
    module = at.module
    function = next(_CLASSES[cls] for cls in type(module).__mro__ if cls in _CLASSES)
    if function is tanh_cell and module.nonlinearity == "relu":
        function = relu_cell
    if hx is None:
        states: tuple[Any, ...] = (at.call(zero_state, input, module.hidden_size),) * 2
    elif isinstance(hx, (tuple, list)) or function is not lstm_cell:
        states = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
    else:
        states = tuple(at.items(hx, 2))
    weights = [at.own(name) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    if weights[0] is None or weights[1] is None:
        raise Refused(f"belongs to a {type(module).__name__} without its weights")
    return _cell(at, function, input, states, *weights)


def _register(function: Any, *operations: Any) -> None:
    @exposes(*operations)
    def _operation(at: Exposure, input: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
        states = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        return _cell(at, function, input, states, w_ih, w_hh, b_ih, b_hh)


_register(lstm_cell, torch.lstm_cell, aten.lstm_cell.default)
_register(gru_cell, torch.gru_cell, aten.gru_cell.default)
_register(tanh_cell, torch.rnn_tanh_cell, aten.rnn_tanh_cell.default)
_register(relu_cell, torch.rnn_relu_cell, aten.rnn_relu_cell.default)
