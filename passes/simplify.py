"""simplify: algebra that changes no value, and dead code.

The table holds what methods and other passes really leave behind: factors of one from options that are switched off,
the round trip between a stored gradient and its matrix, copies of copies. Every rule is exact in floating point, so a
program computes the same numbers with and without this pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxcurv.ir import ops  # noqa: F401  (the table below names ops)
from fxcurv.ir.program import STEP
from fxcurv.ir.rules import Bindings, Rule, apply_rules, same_type
from fxcurv.passes.manager import Compilation, Pass


def _always(bindings: Bindings) -> bool:
    """``x`` exists in every step, so there is nothing to keep for the steps in which a cadence is not due."""
    return isinstance(bindings["x"], fx.Node) and bindings["x"].meta["every"] == STEP


RULES: tuple[Rule, ...] = (
    # neutral elements
    Rule("scale(x, 1.0)", "x"),
    Rule("mean(x, 1.0)", "x"),
    Rule("mul(x, 1.0)", "x", when=same_type("x")),
    Rule("mul(1.0, x)", "x", when=same_type("x")),
    Rule("div(x, 1.0)", "x", when=same_type("x")),
    Rule("add(x, 0.0)", "x", when=same_type("x")),
    Rule("add(0.0, x)", "x", when=same_type("x")),
    Rule("sub(x, 0.0)", "x", when=same_type("x")),
    Rule("bias_correct(x, 0.0, k)", "x"),
    # averages that forget everything, or nothing
    Rule("ema(old, new, 0.0)", "copy(new)", when=same_type("new")),
    Rule("ema(old, new, 1.0)", "copy(old)"),
    Rule("moving(old, new, 0.0)", "copy(new)", when=same_type("new")),
    Rule("moving(old, new, 1.0)", "copy(old)"),
    # inverses of one another
    Rule("neg(neg(x))", "x", when=same_type("x")),
    Rule("tensorize(matricize(x, p, s), p, t)", "x", when=same_type("x")),
    Rule("matricize(tensorize(x, p, t), p, s)", "x", when=same_type("x")),
    Rule("weight_columns(append_column(x, v))", "x", when=same_type("x")),
    Rule("last_column(append_column(m, x))", "x", when=same_type("x")),
    Rule("append_column(weight_columns(x), last_column(x))", "x", when=same_type("x")),
    # idempotent
    Rule("mean_positions(mean_positions(x))", "mean_positions(x)"),
    Rule("sum_positions(mean_positions(x))", "mean_positions(x)"),
    Rule("mean_positions(sum_positions(x))", "sum_positions(x)"),
    Rule("sum_positions(sum_positions(x))", "sum_positions(x)"),
    # copies, and values that need no keeping
    Rule("copy(x)", "x", when=same_type("x")),
    Rule("on_due(x, x)", "x", when=_always),
)


@dataclass(frozen=True)
class Simplify(Pass):
    """Applies RULES to a fixed point and removes what no output needs."""

    name: ClassVar[str] = "simplify"

    def run(self, c: Compilation) -> int:
        assert c.program is not None
        rewrites = apply_rules(c.program, RULES, c.spend)
        c.program.prune()
        return rewrites
