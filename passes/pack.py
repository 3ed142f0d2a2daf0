"""pack: symmetric matrices that are kept between refreshes lose one of their triangles, on request.

Half of the memory of an inverse for an unpacking a step (``stale="packed"``). What the taps read stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxcurv.ir.kept import keep_as, kept_values, tapped_states
from fxcurv.ir.types import Psd
from fxcurv.passes.manager import Compilation, Pass


@dataclass(frozen=True)
class Pack(Pass):
    """Packs kept Psd states. min: size from which a matrix is packed; smaller ones are hardly any memory."""

    min: int = 32
    name: ClassVar[str] = "pack"
    semantic: ClassVar[bool] = False  # states change their form

    def run(self, c: Compilation) -> int:
        assert c.program is not None
        if "packed" not in c.options.get("stale", ""):
            return 0
        rewrites, tapped = 0, tapped_states(c.program)
        for role, switch in kept_values(c.program).items():
            type_ = switch.meta["type"]
            if not isinstance(type_, Psd) or (type_.shape[-1] or 0) < self.min or tapped.intersection(role.keys):
                continue
            if c.spend():
                keep_as(c.program, switch, ("pack_triangle",), ("unpack_triangle",))
                rewrites += 1
        return rewrites
