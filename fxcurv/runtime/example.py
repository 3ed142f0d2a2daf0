"""Example inputs as text: an artifact remembers the shapes of the call that its model was transformed with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fxcurv.ir.types import DTYPE_NAMES, DTYPES


def pack_example(args: Iterable[Any] | None, kwargs: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Example inputs as type text ("f32[8,3]"); ``None`` when there are none or one is more than a tensor."""
    if args is None and kwargs is None:
        return None
    args, kwargs = tuple(args or ()), dict(kwargs or {})
    if not all(isinstance(value, Tensor) and value.dtype in DTYPE_NAMES for value in (*args, *kwargs.values())):
        return None
    return {"args": [_text(value) for value in args], "kwargs": {name: _text(value) for name, value in kwargs.items()}}


def zeros_like_text(text: str) -> Tensor:
    """A tensor of the type that the text describes."""
    dtype, _, sizes = text.rstrip("]").partition("[")
    return torch.zeros([int(size) for size in sizes.split(",") if size], dtype=DTYPES[dtype])


def _text(value: Tensor) -> str:
    return f"{DTYPE_NAMES[value.dtype]}[{','.join(str(size) for size in value.shape)}]"
