"""Names for profilers: ``fxcurv::gram [attn.q]`` around every node of a slice and every statistic of a tap.

Entering a range costs microseconds even when nobody listens, so nothing here is entered without a profiler: slices have
a second function with ranges, and taps ask once per statistic. The answer is a flag of the host, never of a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

SHOWN = 2  # owners named in a title; of more, their number


def profiling() -> bool:
    """Whether a profiler records in this thread (``torch.profiler``, ``emit_nvtx``), and no graph is being traced."""
    return not torch.compiler.is_compiling() and bool(torch.autograd._profiler_enabled())


def title(op: str, owners: Iterable[str]) -> str:
    """The name of a range: the op and the layers (or parameters) that it works for."""
    names = list(owners)
    shown = ", ".join(names[:SHOWN]) + (f" +{len(names) - SHOWN}" if len(names) > SHOWN else "")
    return f"fxcurv::{op} [{shown}]" if names else f"fxcurv::{op}"


def ranged(name: str, function: Callable[..., Any], *operands: Any) -> Any:
    """``function(*operands)`` in a range of that name."""
    with torch.profiler.record_function(name):
        return function(*operands)
