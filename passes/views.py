"""views: layout ops that are read and then forgotten need no memory of their own.

Between a gradient and the product that preconditions it, and between that product and the update, lie reshapes and
slices. As ops they copy, so that no result of a program shares memory with an input. Inside a slice nothing is ever
written to, so a view does as well, if it does not outlive the step: it is no state, is not kept for later steps, and
as an update it is a view of something that the slice has made, not of the gradient that the update will overwrite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxcurv.ir.op import OPS
from fxcurv.ir.program import Role
from fxcurv.kernels.aten.layout import VIEWS
from fxcurv.passes.manager import Compilation, Pass


@dataclass(frozen=True)
class Views(Pass):
    """Marks layout ops (``meta["view"]``) for which ``lower`` takes a view."""

    name: ClassVar[str] = "views"

    def run(self, c: Compilation) -> int:
        assert c.program is not None
        program, rewrites = c.program, 0
        yielded: dict[fx.Node, list[Role]] = {}
        for role, value in program.outputs().items():
            yielded.setdefault(value, []).append(role)
        swapped = {role.key.rpartition(".")[0] for role in program.inputs("rows")}
        for node in program.nodes:
            if node in yielded and swapped.intersection(node.meta["owner"]):
                continue  # becomes the gradient itself
            kept = any(role.kind != "update" for role in yielded.get(node, ()))
            kept = kept or any(user.target is OPS["on_due"] for user in node.users)
            if not _is_layout(node) or kept or (node in yielded and not _made_here(node)) or not c.spend():
                continue
            node.meta["view"] = True
            rewrites += 1
        return rewrites


def _is_layout(node: fx.Node) -> bool:
    return getattr(node.target, "name", "") in VIEWS


def _made_here(node: fx.Node) -> bool:
    """Whether what a chain of layout ops starts from is the result of an op of this program, in this step."""
    while _is_layout(node):
        assert isinstance(node.args[0], fx.Node)
        node = node.args[0]
    return node.op == "call_function" and node.target is not OPS["on_due"]
