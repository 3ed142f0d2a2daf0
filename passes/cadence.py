"""cadence: make explicit what a step reads that it does not compute.

A value with a cadence of its own (a factorisation every 10 steps) that is read at another cadence becomes
``on_due(value, state)``: this step's value when it is due, the kept one when not. A value that already is the next
value of a state uses that state; any other gets a state of its own, named after the state it is computed from
(``fc.A`` -> ``fc.A.inverse``) and saved under every name of that state.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from fxcurv.ir.op import OPS
from fxcurv.ir.program import STEP, Program, Role
from fxcurv.passes.manager import Compilation, Pass


@dataclass(frozen=True)
class Cadence(Pass):
    """Inserts ``on_due`` wherever a value crosses from one cadence to another."""

    name: ClassVar[str] = "cadence"

    def run(self, c: Compilation) -> int:
        assert c.program is not None
        program, rewrites = c.program, 0
        states = program.inputs("state")
        taken = {key for role in states for key in role.keys}
        outputs = program.outputs()
        yielded: dict[fx.Node, list[Role]] = {}  # roles of values that must exist in every step
        for role, value in outputs.items():
            if role.kind in ("state", "update"):
                yielded.setdefault(value, []).append(role)
        state_of = {value: role for role, value in outputs.items() if role.kind == "state"}
        anchor = next(reversed(program.placeholders), None)
        for node in list(program.nodes):
            every = node.meta["every"]
            if every == STEP or _is_switch(node) or isinstance(node.meta["type"], tuple):
                continue
            readers = [user for user in node.users if _reads_elsewhere(user, node, every)]
            mine = yielded.get(node, [])
            if not readers and not mine:
                continue
            roles = [role for role in mine if role.kind == "state"]
            if not roles:
                roles = [_name_state(node, state_of, states, taken)]
                anchor = states[roles[0]] = _new_placeholder(program, node, roles[0], anchor)
            first = _switch(program, node, states[roles[0]], node)
            switches = {roles[0]: first} | {role: _switch(program, node, states[role], first) for role in roles[1:]}
            for user in readers:
                user.replace_input_with(node, first)
            outputs.update({role: first for role in mine} | switches)
            state_of.update({switch: role for role, switch in switches.items()})
            rewrites += 1
        program.set_outputs(outputs)
        return rewrites


def _switch(program: Program, node: fx.Node, state: fx.Node, after: fx.Node) -> fx.Node:
    with program.graph.inserting_after(after):
        switch = program.graph.call_function(OPS["on_due"], (node, state))
    switch.meta.update(type=node.meta["type"], every=node.meta["every"], owner=node.meta["owner"])
    return switch


def _is_switch(node: fx.Node) -> bool:
    return node.target is OPS["on_due"]


def _reads_elsewhere(user: fx.Node, node: fx.Node, every: str) -> bool:
    if user.op == "output":  # told apart by role
        return False
    if _is_switch(user):  # its first operand is read when due, its second in every other step
        return user.args[1] is node or user.meta["every"] != every
    return bool(user.meta["every"] != every)


def _name_state(node: fx.Node, state_of: dict[fx.Node, Role], states: dict[Role, fx.Node], taken: set[str]) -> Role:
    """A state for a value without one: ``<key of the state it is computed from>.<ops in between>``; takes the names."""
    source, path, base = node, [], None
    while source.op == "call_function":
        base = state_of.get(source)
        if base is not None:
            break
        target: Any = source.target
        path += [str(source.args[1])] if target is operator.getitem else [target.name]
        source = next((arg for arg in source.args if isinstance(arg, fx.Node)), node.graph.output_node())
    if source.op == "placeholder" and source.meta["role"].kind == "state":
        base = source.meta["role"]
    owner = node.meta["owner"]
    tail = ".".join(reversed(path))
    keys = [key for key in base.keys if _owner_of(key, states[base].meta["owner"]) in owner] if base else []
    names = [f"{key}.{tail}" for key in keys] or [f"{name}.{node.name}" for name in owner] or [f"shared.{node.name}"]
    names = [f"{name}.{node.name}" if name in taken else name for name in names]
    taken.update(names)
    return Role("state", names[0], "zeros", tuple(names[1:]))


def _owner_of(key: str, owners: tuple[str, ...]) -> str:
    """The owner whose name begins a state's key; the longest one where the name of a layer begins another's."""
    return max((name for name in owners if key.startswith(f"{name}.")), key=len, default="")


def _new_placeholder(program: Program, node: fx.Node, role: Role, after: fx.Node | None) -> fx.Node:
    with program.graph.inserting_after(after):
        state = program.graph.placeholder(f"state_{node.name}")
    state.meta.update(role=role, type=node.meta["type"], every=STEP, owner=node.meta["owner"])
    return state
