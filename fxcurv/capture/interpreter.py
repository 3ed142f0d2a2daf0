"""An interpreter of graphs that hands arguments over as generated code does: as lists that the callee may change.

A graph keeps its lists immutable, so ``torch.fx.Interpreter`` fails where a function works on a list of its caller's
(the window sizes of a shifted attention).
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx.immutable_collections import immutable_dict, immutable_list


class Interpreter(fx.Interpreter):
    """``torch.fx.Interpreter`` with plain lists and dictionaries as arguments."""

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The values of a node's arguments."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(map(_plain, args)), {key: _plain(value) for key, value in kwargs.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, immutable_list):
        return [_plain(item) for item in value]
    if isinstance(value, immutable_dict):
        return {key: _plain(item) for key, item in value.items()}
    return tuple(map(_plain, value)) if type(value) is tuple else value
