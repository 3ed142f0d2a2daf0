"""Time loops as operators of the dispatcher: pure functions, each one node to a compiler instead of T unrolled steps.

A loop writes into buffers of its own with ``out=``; to the outside it reads tensors and returns fresh ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("fxcurv", "FRAGMENT")


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as ``torch.ops.fxcurv.<its name>`` and call it there, on values without gradient.

    Operands get the dtype of the first one, which under autocast is not that of the parameters. fake: the same with
    results of the right shapes alone.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        _LIBRARY.define(name + schema)
        _LIBRARY.impl(name, _plain_precision(function), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fxcurv::{name}", fake, lib=_LIBRARY)
        overload = getattr(torch.ops.fxcurv, name).default

        @functools.wraps(function)
        def call(first: Tensor, *rest: Any) -> Any:
            return overload(first.detach(), *(_operand(item, first.dtype) for item in rest))

        return call

    return register


def _operand(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(dtype) if value.dtype.is_floating_point else value.detach()


def _plain_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """The loop in the dtype of its operands: autocast would give ``out=`` products another one."""

    def run(first: Tensor, *rest: Any) -> Any:
        if not torch.is_autocast_enabled(first.device.type):
            return function(first, *rest)
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *rest)

    return run


def live_rows(batch_sizes: Tensor | None, steps: int, batch: int) -> list[int]:
    """How many sequences, sorted by falling length, still run at each step."""
    return [batch] * steps if batch_sizes is None else [int(size) for size in batch_sizes.tolist()]


def by_step(buffer: Tensor, live: Sequence[int]) -> list[Tensor]:
    """Views of a time-major (T or T + 1, B, ...) buffer, one a step, holding only the sequences that run there."""
    return [row if n == buffer.shape[1] else row[:n] for row, n in zip(buffer.unbind(0), live, strict=False)]


def mask_of(batch_sizes: Tensor, batch: int, device: torch.device) -> Tensor:
    """Which (step, sequence) exists, shape (T, B), bool; T is ``len(batch_sizes)``."""
    return torch.arange(batch, device=device) < batch_sizes.to(device).unsqueeze(1)
