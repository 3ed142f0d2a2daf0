"""memory: an average is written over the statistic that it takes in.

A statistic is summed anew for every step and read once. The average of it and a state has the same size, so it may take
its memory: one matrix less is alive at the peak, and one less is written. The old state itself is never written to: it
is what a step keeps when something was not finite. Nor does a repair miss the statistic: it starts from the average
that the step has found (the role ``result``).

A spare buffer for each state, swapped at every step, would save nothing: the allocator hands the same pages out again
(no page faults were measured between refreshes), and one matrix more would be held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxcurv.ir.op import OPS
from fxcurv.ir.program import Role
from fxcurv.kernels.aten.tracking import INTO
from fxcurv.passes.guard import links
from fxcurv.passes.manager import Compilation, Pass


@dataclass(frozen=True)
class Memory(Pass):
    """Marks averages (``meta["into"]``) that ``lower`` lets overwrite their sum.

    Off where a step that fails raises: the statistics must then be as they were.
    """

    name: ClassVar[str] = "memory"

    def run(self, c: Compilation) -> int:
        assert c.program is not None
        if c.options.get("on_nonfinite") == "raise":
            return 0
        rewrites = 0
        result_of = {
            new: Role("result", role.key, also=role.also)
            for role, value in c.program.outputs("state").items()
            for new, _ in links(value)
        }
        for node in c.program.nodes:
            if getattr(node.target, "name", "") not in INTO:
                continue
            total = node.args[1]
            if not isinstance(total, fx.Node) or set(total.users) != {node} or total.meta.get("view"):
                continue
            into = result_of.get(node) if _is_statistic(total) else True if _made_here(total) else None
            if into is not None and total is not node.args[0] and c.spend():
                node.meta["into"] = into
                rewrites += 1
        return rewrites


def _is_statistic(node: fx.Node) -> bool:
    return node.op == "placeholder" and node.meta["role"].kind == "stat"


def _made_here(node: fx.Node) -> bool:
    """Whether a value is the fresh result of an op, and no part of another."""
    return getattr(node.target, "name", "") in OPS and node.target not in (OPS["on_due"], OPS["stack"])
