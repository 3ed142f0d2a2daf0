"""share: merge values and states that can never differ.

Optimistic value numbering across the step boundary: assume that all states of equal type and start are equal, number
the graph under that assumption, split the classes whose next values got different numbers, and repeat until nothing
splits. What is still together is equal at every step, by induction. So q, k and v projections that read one tensor
collapse to one factor, one average and one inverse without any rule about attention.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import fx

from fxcurv.ir.op import Op, Trait
from fxcurv.ir.program import Program, Role
from fxcurv.passes.manager import Compilation, Pass, erase


@dataclass(frozen=True)
class Share(Pass):
    """Merges equal values; with ``states`` also states that evolve equally."""

    states: bool = True
    name: ClassVar[str] = "share"

    def run(self, c: Compilation) -> int:
        assert c.program is not None
        return merge(c.program, c, congruence(c.program, self.states))


def congruence(program: Program, states: bool = True) -> dict[fx.Node, int]:
    """A number for every node; equal numbers mean equal values at every step."""
    placeholders = program.inputs("state")
    following = program.outputs("state")
    klass: dict[Role, Any] = {
        role: (node.meta["type"], role.init) if states and role in following else role
        for role, node in placeholders.items()
    }
    described = _describe(program)
    while True:
        numbers = _number(described, klass)
        split = {role: (klass[role], numbers[following[role]]) if role in following else role for role in klass}
        names: dict[Any, int] = {}
        new: dict[Role, Any] = {role: names.setdefault(value, len(names)) for role, value in split.items()}
        if len(set(new.values())) == len(set(klass.values())):
            return numbers
        klass = new


Described = list[tuple[fx.Node, "Role | None", int, list[fx.Node]]]


def _describe(program: Program) -> Described:
    """Every node with the role of a state, a number for all that does not depend on values, and the values it reads."""
    table: dict[Any, int] = {}
    described: Described = []

    def skeleton(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return "%"
        if isinstance(value, (list, tuple)):
            return tuple(skeleton(item) for item in value)
        return (type(value).__name__, value)

    for node in program.graph.nodes:
        if node.op == "output":
            continue
        state = None
        if node.op == "placeholder":
            role = node.meta["role"]
            key: Any = (role.kind, role.key)
            state = role if role.kind == "state" else None
        elif isinstance(node.target, Op) and Trait.ORACLE in node.target.traits:
            key = node
        else:
            key = (node.target, node.meta["every"], skeleton(node.args))
        reads: list[fx.Node] = []
        fx.node.map_arg(node.args, reads.append)
        described.append((node, state, table.setdefault(key, len(table)), reads))
    return described


def _number(described: Described, klass: dict[Role, Any]) -> dict[fx.Node, int]:
    table: dict[Any, int] = {}
    numbers: dict[fx.Node, int] = {}
    for node, state, static, reads in described:
        key = ("state", klass[state]) if state is not None else (static, *[numbers[value] for value in reads])
        numbers[node] = table.setdefault(key, len(table))
    return numbers


def merge(program: Program, c: Compilation, numbers: dict[fx.Node, int]) -> int:
    """Replace every node by the first one of equal number; owners and state keys are united."""
    leaders: dict[int, fx.Node] = {}
    leader_of: dict[Role, Role] = {}
    rewrites = 0
    outputs = program.outputs()
    for node in list(program.graph.nodes):
        if node.op == "output":
            continue
        leader = leaders.setdefault(numbers[node], node)
        if leader is node or not c.spend():
            continue
        leader.meta["owner"] = tuple(dict.fromkeys((*leader.meta["owner"], *node.meta["owner"])))
        if node.op == "placeholder":
            leader_of[node.meta["role"]] = leader.meta["role"]
        erase(program.graph, node, leader)
        rewrites += 1
    left: Any = program.output.args[0]
    values = dict(zip(outputs, left, strict=True))
    united = {lead: lead for lead in leader_of.values()}
    for role, lead in leader_of.items():
        united[lead] = replace(united[lead], also=(*united[lead].also, *role.keys))
    for node in program.placeholders:
        node.meta["role"] = united.get(node.meta["role"], node.meta["role"])
    program.set_outputs({united.get(role, role): node for role, node in values.items() if role not in leader_of})
    program.prune()
    return rewrites
