"""guard: let every step report which of its results are finite.

For every owner and cadence the program yields ``flag['fc:step']``, ``flag['fc:statistics']`` or ``flag['fc:refresh']``:
whether the updates, the statistics' states and the factorisations of that layer came out finite. Nothing is decided
inside a slice; the run time commits a state only if the flags of all its owners hold, gives a layer back its gradient
if its update is not finite, and starts the repair ladder for a failed factorisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxcurv.ir.op import OPS
from fxcurv.ir.program import STEP, Role
from fxcurv.passes.manager import Compilation, Pass


@dataclass(frozen=True)
class Guard(Pass):
    """Adds the flags; a state that several layers share is checked once, for all of them."""

    name: ClassVar[str] = "guard"

    def run(self, c: Compilation) -> int:
        assert c.program is not None
        program = c.program
        groups: dict[tuple[str, str], list[fx.Node]] = {}
        for role, value in program.outputs().items():
            if role.kind == "update":
                watched = [(value, STEP)]
            elif role.kind == "state":
                watched = links(value)
            else:
                continue
            for owner in value.meta["owner"] or ("",):
                for node, every in watched:
                    groups.setdefault((owner, every), []).append(node)
        outputs = program.outputs()
        flags: dict[tuple[fx.Node, ...], fx.Node] = {}
        for (owner, every), values in groups.items():
            unique = tuple(dict.fromkeys(values))
            if unique not in flags:
                with program.graph.inserting_before(program.output):
                    node = program.graph.call_function(OPS["finite"], (list(unique),))
                type_ = OPS["finite"].infer([v.meta["type"] for v in unique])
                node.meta.update(type=type_, every=every, owner=(owner,) if owner else ())
                flags[unique] = node
            outputs[Role("flag", f"{owner}:{every}")] = flags[unique]
        program.set_outputs(outputs)
        return len(flags)


def links(value: fx.Node) -> list[tuple[fx.Node, str]]:
    """What a state's next value may be: every new operand of its ``on_due`` chain with the cadence of that link."""
    found = []
    while value.target is OPS["on_due"]:
        new, old = value.args
        assert isinstance(new, fx.Node) and isinstance(old, fx.Node)
        found.append((new, value.meta["every"]))
        value = old
    return found if value.op == "placeholder" else [*found, (value, value.meta["every"])]
