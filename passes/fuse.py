"""fuse: neighbouring ops that walk over the same matrix become one op.

Two kinds. An average of a scaled sum is one op (the rules below). And the finite check of a matrix that is a sum of
squares looks at its diagonal alone: with r r^T summed, |A_ij| is at most the larger of A_ii and A_jj, whatever was
rounded, so an entry that is not finite has company on the diagonal; an average of such matrices is one, and the inverse
by a Cholesky factor, L^-T L^-1, too (where the factorisation fails, everything is NaN). The check of a slice of a
matrix looks at the whole, which lies in one piece: weight and bias are checked together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from fxcurv.ir.op import OPS
from fxcurv.ir.program import infer, operand_types
from fxcurv.ir.rules import ROOT, Bindings, Rule, apply_rules
from fxcurv.ir.types import Psd
from fxcurv.kernels.registry import preferred
from fxcurv.passes.manager import Compilation, Pass


def _only_reader(bindings: Bindings) -> bool:
    """The average alone reads the scaled sum, so that nothing is computed twice."""
    inner: Any = bindings[ROOT].args[1]
    return isinstance(inner, fx.Node) and len(inner.users) == 1


RULES: tuple[Rule, ...] = (
    Rule("ema(old, scale(total, c), w)", "ema_scaled(old, total, c, w)", when=_only_reader),
    Rule("ema(old, mean(total, n), w)", "ema_mean(old, total, n, w)", when=_only_reader),
)
GRAM_RULES: tuple[Rule, ...] = (
    Rule("ema_scaled(old, gram(x), c, w)", "gram_ema_scaled(old, x, c, w)", when=_only_reader),
    Rule("ema_mean(old, gram(x), n, w)", "gram_ema_mean(old, x, n, w)", when=_only_reader),
)
"""A sum that never lies in memory: only where Triton's kernels may claim it."""
SQUARES = ("ema", "ema_scaled", "ema_mean", "gram_ema_scaled", "gram_ema_mean", "inverse")
"""Ops whose Psd results are sums of squares when their operands are."""
LAYOUT = ("tensorize", "weight_columns", "last_column")
"""Ops between a direction and the updates of the stored parameters."""


@dataclass(frozen=True)
class Fuse(Pass):
    """Applies RULES, then narrows the finite checks of matrices with at least ``dim`` rows to their diagonals."""

    dim: int = 16
    name: ClassVar[str] = "fuse"

    def run(self, c: Compilation) -> int:
        assert c.program is not None
        rules = RULES + GRAM_RULES if "triton" in preferred(c.options.get("backend") or "auto") else RULES
        rewrites = apply_rules(c.program, rules, c.spend)
        for check in [node for node in c.program.nodes if node.target is OPS["finite"]]:
            watched = list(check.args[0])  # type: ignore[arg-type]
            narrowed = [self._diagonal(_whole(node), check, c) for node in watched]
            if narrowed != watched:
                check.args = (list(dict.fromkeys(narrowed)),)
        rewrites += sum(node.target is OPS["diagonal"] for node in c.program.nodes)
        c.program.prune()
        return rewrites

    def _diagonal(self, node: fx.Node, check: fx.Node, c: Compilation) -> fx.Node:
        type_ = node.meta["type"]
        squares = getattr(node.target, "name", "") in SQUARES and isinstance(type_, Psd)
        if not squares or (type_.shape[-1] or 0) < self.dim or node.meta["every"] != check.meta["every"]:
            return node
        known = [user for user in node.users if user.target is OPS["diagonal"]]
        if known or not c.spend():
            return known[0] if known else node
        assert c.program is not None
        with c.program.graph.inserting_after(node):
            line = c.program.graph.call_function(OPS["diagonal"], (node,))
        line.meta.update(
            type=infer(OPS["diagonal"], operand_types(line)), every=node.meta["every"], owner=node.meta["owner"]
        )
        return line


def _whole(node: fx.Node) -> fx.Node:
    """What layout ops have taken apart: finite if and only if all of its parts, which one layer yields, are."""
    while getattr(node.target, "name", "") in LAYOUT:
        source = node.args[0]
        made_here = isinstance(source, fx.Node) and source.op == "call_function"
        if not made_here or source.meta["every"] != node.meta["every"]:  # type: ignore[union-attr]
            break
        node = source  # type: ignore[assignment]
    return node
