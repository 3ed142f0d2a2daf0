"""Built-in functions as code under trace sees them: ``len``, ``min``, ``max`` and ``isinstance`` of traced values."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxcurv.capture.proxies import has_proxy

_NUMBERS = {"size", "dim", "numel", "stride", "item", "tolist", len, min, max}  # what does not give a tensor
_TENSOR = torch.empty(0)


def traced_builtins(tracer: fx.Tracer) -> dict[str, Callable[..., Any]]:
    """Replacements by name: sizes are computed by the graph, and a traced tensor is an instance of ``torch.Tensor``."""
    return {
        "len": _length(tracer),
        "min": _choice(tracer, min),
        "max": _choice(tracer, max),
        "isinstance": _is_instance,
    }


def _length(tracer: fx.Tracer) -> Callable[[Any], Any]:
    def length(value: Any) -> Any:
        if isinstance(value, fx.Proxy) and "__len__" not in vars(type(value)):
            return tracer.create_proxy("call_function", len, (value,), {})
        return len(value)

    return length


def _choice(tracer: fx.Tracer, original: Callable[..., Any]) -> Callable[..., Any]:
    def choose(*values: Any, **kwargs: Any) -> Any:
        if len(values) > 1 and has_proxy(values):
            return tracer.create_proxy("call_function", original, values, kwargs)
        return original(*values, **kwargs)

    return choose


def _is_instance(value: Any, kind: Any) -> bool:
    if isinstance(value, kind):
        return True
    return isinstance(value, fx.Proxy) and isinstance(_TENSOR, kind) and not _is_number(value.node)


def _is_number(node: fx.Node) -> bool:
    """Whether a node's value is certainly no tensor: a size, or computed from sizes alone."""
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target in _NUMBERS or (node.target is getattr and node.args[1] in ("shape", "ndim")):
        return True
    inputs = node.all_input_nodes
    plain = node.target in vars(operator).values() or node.target in ("__add__", "__radd__")
    return plain and bool(inputs) and all(map(_is_number, inputs))
