"""Which nodes of a graph are packed sequences."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx
from torch.nn.utils import rnn

_MARK = "fxcurv_packed"  # node.meta key: what a recurrent network that was given a packed sequence returns
_PACKING = {rnn.pack_padded_sequence, rnn.pack_sequence, rnn.PackedSequence}


def is_packed(argument: Any) -> bool:
    """Whether a node is a packed sequence: packed by torch's functions, or the outputs for one."""
    if not isinstance(argument, fx.Node):
        return False
    if argument.target is operator.getitem and argument.args[1] == 0 and isinstance(argument.args[0], fx.Node):
        return _MARK in argument.args[0].meta
    return argument.target in _PACKING


def mark_packed(result: fx.Node) -> None:
    """Note that the first element of a recurrent network's result is a packed sequence."""
    result.meta[_MARK] = True
