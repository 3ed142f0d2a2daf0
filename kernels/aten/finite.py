"""The finite check of many small tensors at once."""

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
    """``finite``: small tensors are concatenated, so their number does not matter; large ones are read in place."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    large = []
    for x in xs:
        if x.numel() < SMALL:
            groups.setdefault(x.dtype, []).append(x.reshape(-1))
        else:
            large.append(x)
    return OPS["finite"].reference([*large, *(torch.cat(group) for group in groups.values())])  # type: ignore[no-any-return]


def when(result: Any, xs: Sequence[Any]) -> bool:
    """More than a few tensors."""
    return len(xs) >= 4


DOC = """Concatenates the small tensors before the reduction. On one CPU core, against the reference: 3.3x for 50
tensors of 100 elements, 1.3x to 1.5x for 4 tensors, 1.0x where one large tensor dominates."""

register(Kernel("finite", "joined", "aten", when, run, DOC))
