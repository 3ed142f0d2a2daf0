"""precision: what is kept between refreshes is kept in bfloat16, on request.

A preconditioner that is some steps old is no exact one; eight bits of its numbers say about as much (``stale="bf16"``).
It is computed and applied in full precision. Factors and their averages, which add up over steps, keep theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxcurv.ir.kept import keep_as, kept_values
from fxcurv.ir.types import DTYPE_NAMES, Scalar
from fxcurv.passes.manager import Compilation, Pass


@dataclass(frozen=True)
class Precision(Pass):
    """Narrows kept states of at least ``min`` numbers."""

    min: int = 1024
    name: ClassVar[str] = "precision"
    semantic: ClassVar[bool] = False  # results are rounded

    def run(self, c: Compilation) -> int:
        assert c.program is not None
        if "bf16" not in c.options.get("stale", ""):
            return 0
        rewrites = 0
        for switch in kept_values(c.program).values():
            type_ = switch.meta["type"]
            if isinstance(type_, Scalar) or type_.numel < self.min or not type_.dtype.is_floating_point:
                continue
            if c.spend():
                keep_as(c.program, switch, ("cast", "bf16"), ("cast", DTYPE_NAMES[type_.dtype]))
                rewrites += 1
        return rewrites
