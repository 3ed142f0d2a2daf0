"""Values that are kept between refreshes, and how to keep them in another form."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxcurv.ir.op import OPS
from fxcurv.ir.program import REFRESH, Program, Role, infer, operand_types
from fxcurv.ir.schedule import base_of
from fxcurv.ir.statistic import state_keys

Form = tuple[Any, ...]
"""Name of the op that turns a value into another form, or back, and the op's further operands."""


def kept_values(program: Program) -> dict[Role, fx.Node]:
    """States that change with a refresh alone, by role: the ``on_due`` of a new value and the state's placeholder."""
    placeholders = program.inputs("state")
    found = {}
    for role, value in program.outputs("state").items():
        if value.target is OPS["on_due"] and base_of(value.meta["every"]) == REFRESH:
            new, old = value.args
            if old is placeholders.get(role) and isinstance(new, fx.Node) and new.op == "call_function":
                found[role] = value
    return found


def tapped_states(program: Program) -> set[str]:
    """Keys of the states that taps read."""
    return {key for role in program.inputs("stat") for key in state_keys(role.key)}


def keep_as(program: Program, switch: fx.Node, put: Form, take: Form) -> None:
    """Keep the value of ``switch``, an ``on_due`` of :func:`kept_values`, in the form that ``put`` makes.

    Everybody who read it reads it through ``take``: in the step of the refresh too, so that a step does not depend on
    whether the state has been saved and loaded before it.
    """
    new, old = switch.args
    assert isinstance(new, fx.Node) and isinstance(old, fx.Node)
    graph, every, owner = program.graph, switch.meta["every"], switch.meta["owner"]
    others = [user for user in old.users if user is not switch]
    with graph.inserting_before(switch):
        name, *rest = put
        stored = graph.call_function(OPS[name], (new, *rest))
        stored.meta.update(type=infer(stored.target, operand_types(stored)), every=every, owner=owner)
    old.meta["type"] = switch.meta["type"] = stored.meta["type"]
    readers = [user for user in switch.users if user.op != "output"]
    switch.args = (stored, old)
    for source, users in ((switch, readers), (old, others)):
        for cadence in dict.fromkeys(user.meta["every"] for user in users):
            with graph.inserting_after(source):
                name, *rest = take
                read = graph.call_function(OPS[name], (source, *rest))
            read.meta.update(type=infer(read.target, operand_types(read)), every=cadence, owner=owner)
            for user in users:
                if user.meta["every"] == cadence:
                    user.replace_input_with(source, read)
