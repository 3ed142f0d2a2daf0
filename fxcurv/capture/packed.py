"""Packed sequences in a symbolic trace.

Torch's functions that pack and pad look at the values of their arguments, so a trace records each as one node. A packed
sequence among the arguments of the model is a pytree of its tensors, which become placeholders like any others; where
the trace hands it on, one node puts it together again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx
from torch.nn.utils import rnn
from torch.utils import _pytree as pytree

from fxcurv.capture.proxies import has_proxy
from fxcurv.errors import FxcurvError

PackedSequence: Any = rnn.PackedSequence
_FUNCTIONS = ("pack_padded_sequence", "pad_packed_sequence", "pack_sequence", "unpack_sequence")


def recorded(tracer: fx.Tracer) -> dict[str, Callable[..., Any]]:
    """The functions of ``torch.nn.utils.rnn``, by name, that become one node when given a value of the trace."""

    def record(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if has_proxy(args, kwargs):
                return tracer.create_proxy("call_function", original, args, kwargs)
            return original(*args, **kwargs)

        return wrapper

    return {name: record(getattr(rnn, name)) for name in _FUNCTIONS}


def constructor(tracer: fx.Tracer) -> Callable[..., Any]:
    """``PackedSequence.__new__`` that records a call with values of the trace."""
    original = PackedSequence.__new__

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        if has_proxy(args, kwargs):
            return tracer.create_proxy("call_function", PackedSequence, args, kwargs)
        return original(cls, *args, **kwargs)

    return new


class _Refusing(type):
    def __instancecheck__(cls, value: Any) -> bool:
        if isinstance(value, PackedSequence):
            raise FxcurvError(
                "the export front-end cannot capture a recurrent layer on a packed sequence, whose batch sizes are "
                "values and not shapes; use frontend='symbolic', or leave the sequences padded and mask the loss."
            )
        return False


class Refused(metaclass=_Refusing):
    """Takes the place of ``PackedSequence`` in torch's recurrent modules during an export: to ask for it fails."""


def _of(values: Iterable[Any], context: Any = None) -> Any:
    return tuple.__new__(PackedSequence, values)  # the constructor would look at devices, which a traced value hides


def _with_keys(packed: Any) -> tuple[list[tuple[Any, Any]], None]:
    names = ("data", "batch_sizes", "sorted_indices", "unsorted_indices")
    return [(pytree.GetAttrKey(name), value) for name, value in zip(names, packed, strict=True)], None


if PackedSequence not in pytree.SUPPORTED_NODES:
    pytree.register_pytree_node(
        PackedSequence,
        lambda packed: (list(packed), None),
        _of,
        serialized_type_name="torch.nn.utils.rnn.PackedSequence",
        flatten_with_keys_fn=_with_keys,
    )
