"""sink: move additive reductions of rows into the taps.

``gram(rows)`` of a layer's rows becomes the statistic input ``stat['gram(fc.a)']``: the backward pass then delivers the
small Gram and the rows are never kept. Allowed when the op is additive over examples and its other operands are
states, whose values are known when the backward runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from fxcurv.ir.op import Op, Trait
from fxcurv.ir.program import STATISTICS, Program, Role, op_of
from fxcurv.ir.statistic import Call, RowsOf, StateOf, Whole, parse_statistic
from fxcurv.passes.manager import Compilation, Pass, erase


@dataclass(frozen=True)
class Sink(Pass):
    """Replaces every additive reduction of rows by a statistic input of the reduced type."""

    name: ClassVar[str] = "sink"
    semantic: ClassVar[bool] = False  # inputs change, so random inputs cannot be compared

    def run(self, c: Compilation) -> int:
        assert c.program is not None
        program, rewrites = c.program, 0
        known = {role.key: node for role, node in program.inputs("stat").items()}
        anchor = next(reversed(program.placeholders), None)
        for node in list(program.nodes):
            if not _has(node, Trait.ADDITIVE):
                continue
            expression = expression_of(node)
            if expression is None or not c.spend():
                continue
            key = str(expression)
            if key not in known:
                anchor = known[key] = _placeholder(program, key, node, anchor)
            erase(program.graph, node, known[key])
            rewrites += 1
        program.prune()
        return rewrites


def expression_of(node: fx.Node) -> Call | RowsOf | StateOf | None:
    """The statistic expression of a value, or ``None`` when it cannot be computed in a tap."""
    if node.op == "placeholder":
        role: Role = node.meta["role"]
        if role.kind == "state":
            return StateOf(role.key)
        return parse_statistic(role.key) if role.kind == "stat" else None
    if node.op != "call_function" or not (_has(node, Trait.ADDITIVE) or _has(node, Trait.ROWWISE)):
        return None
    operands = [_operand(arg) for arg in node.args]
    if any(operand is None for operand in operands):
        return None
    return Call(op_of(node).name, tuple(operand for operand in operands if operand is not None))


def _operand(arg: Any) -> Call | RowsOf | StateOf | Whole | None:
    if isinstance(arg, fx.Node):
        return expression_of(arg)
    return Whole(arg) if isinstance(arg, int) and not isinstance(arg, bool) and arg >= 0 else None


def _has(node: fx.Node, trait: Trait) -> bool:
    return isinstance(node.target, Op) and trait in node.target.traits


def _placeholder(program: Program, key: str, node: fx.Node, after: fx.Node | None) -> fx.Node:
    with program.graph.inserting_after(after):
        stat = program.graph.placeholder(f"stat_{node.name}")
    stat.meta.update(role=Role("stat", key), type=node.meta["type"], every=STATISTICS, owner=())
    return stat
