"""build: write the update program of the method for the detected layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxcurv.methods.facts import gather
from fxcurv.passes.manager import Compilation, Pass


@dataclass(frozen=True)
class Build(Pass):
    """Lets the method's parts emit ops; nothing is optimised yet, every statistic is still rows."""

    name: ClassVar[str] = "build"
    needs: ClassVar[tuple[str, ...]] = ("model", "method")

    def run(self, c: Compilation) -> int:
        assert c.model is not None and c.method is not None
        c.facts = gather(c.model, c.layers, c.method.max_factor_dim, c.method.sharing, c.options.get("link", ""))
        c.program = c.method.build(c.facts)
        c.program.prune()
        return len(c.program)
