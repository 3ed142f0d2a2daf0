"""The verifier: what must hold for every program after every pass.

Passes rewrite graphs freely; this is the one place that says what they may not break. It reads metadata only, so it is
cheap enough to run after each pass (tens of milliseconds for thousands of nodes), and each violation is one sentence
that names the node and the rule.
"""

from __future__ import annotations

import operator

from torch import fx

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS, Op
from fxcurv.ir.program import INPUT_KINDS, OUTPUT_KINDS, Program, Role, infer, operand_types
from fxcurv.ir.statistic import parse_statistic, state_keys
from fxcurv.ir.text import print_type
from fxcurv.ir.types import Type

INITS = ("zeros", "ones", "eye")
META = ("type", "every", "owner")


def verify(program: Program, where: str = "") -> None:
    """Raise :class:`FxcurvError` naming a node and the rule it breaks; ``where`` says what ran last.

    Rules: operands are defined before they are read; every target is a registered op; every node has type, cadence and
    owner, the cadence is one of the program's and the type is what the op infers; roles are known, unique and well
    formed; a state's next value has the type of its placeholder.
    """
    try:
        seen: set[fx.Node] = set()
        for node in program.graph.nodes:
            _check_order(node, seen)
            seen.add(node)
            if node.op != "output":
                _check_meta(node, program)
            if node.op == "call_function":
                _check_call(node)
        inputs = _check_inputs(program)
        _check_outputs(program, inputs)
    except FxcurvError as error:
        raise FxcurvError(f"{where}: {error}" if where else str(error)) from error


def _check_order(node: fx.Node, seen: set[fx.Node]) -> None:
    """Operands come first; nothing follows the one output."""
    for operand in node.all_input_nodes:
        if operand not in seen:
            raise FxcurvError(f"%{node.name} reads %{operand.name} before it is defined.")
    if node.op not in ("placeholder", "call_function", "output"):
        raise FxcurvError(f"%{node.name} is a '{node.op}' node; programs consist of inputs, ops and one output.")
    if node.op == "output" and node.next.op != "root":
        raise FxcurvError(f"%{node.next.name} comes after the output.")


def _check_meta(node: fx.Node, program: Program) -> None:
    """Every value has a type, a known cadence and owners."""
    missing = [key for key in META if key not in node.meta]
    if missing:
        raise FxcurvError(f"%{node.name} has no {missing[0]} in its metadata.")
    type_, every, owner = (node.meta[key] for key in META)
    if not all(isinstance(one, Type) for one in (type_ if isinstance(type_, tuple) else (type_,))):
        raise FxcurvError(f"%{node.name} has {type_!r} for a type.")
    if every not in program.cadences:
        raise FxcurvError(f"%{node.name} has cadence '{every}'; the program knows {', '.join(program.cadences)}.")
    if not isinstance(owner, tuple):
        raise FxcurvError(f"%{node.name} has {owner!r} for owners; they are a tuple of names.")


def _check_call(node: fx.Node) -> None:
    """The target is a registered op whose type rule gives the node's type."""
    target = node.target
    if target is not operator.getitem and not (isinstance(target, Op) and OPS.get(target.name) is target):
        raise FxcurvError(f"%{node.name} calls {target!r}, which is not a registered op.")
    if node.kwargs:
        raise FxcurvError(f"%{node.name} has keyword operands; all operands of an op are positional.")
    try:
        expected = infer(target, operand_types(node))
    except FxcurvError as error:
        raise FxcurvError(f"%{node.name}: {error}") from error
    except (TypeError, IndexError) as error:
        raise FxcurvError(f"%{node.name} takes a result that %{node.args[0]} does not have.") from error
    if expected != node.meta["type"]:
        stated = print_type(node.meta["type"])
        raise FxcurvError(f"%{node.name} says it is {stated} but its op gives {print_type(expected)}.")


def _check_inputs(program: Program) -> dict[tuple[str, str], fx.Node]:
    """Input roles are known and unique; returns the placeholders by kind and every key."""
    found: dict[tuple[str, str], fx.Node] = {}
    read: list[tuple[fx.Node, str]] = []
    for node in program.placeholders:
        role = _check_role(node.meta.get("role"), INPUT_KINDS, f"input %{node.name}")
        for key in role.keys:
            if (role.kind, key) in found:
                raise FxcurvError(f"%{node.name} and %{found[role.kind, key].name} are both {role.kind}['{key}'].")
            found[role.kind, key] = node
        if role.kind == "state" and role.init not in INITS:
            raise FxcurvError(f"%{node.name} is a state with init='{role.init}'; it starts as {', '.join(INITS)}.")
        if role.init == "eye" and not node.meta["type"].square:
            raise FxcurvError(f"%{node.name} is {node.meta['type']}, which cannot start as init=eye.")
        if role.kind == "stat":
            try:
                parse_statistic(role.key)
                read += [(node, key) for key in state_keys(role.key)]
            except FxcurvError as error:
                raise FxcurvError(f"%{node.name}: {error}") from error
    for node, key in read:
        if ("state", key) not in found:
            raise FxcurvError(f"%{node.name} is measured with the state '{key}', which the program does not have.")
    return found


def _check_outputs(program: Program, inputs: dict[tuple[str, str], fx.Node]) -> None:
    """Output roles are known, unique and paired with their inputs."""
    output = next((node for node in reversed(program.graph.nodes) if node.op == "output"), None)
    if output is None:
        raise FxcurvError("the program yields nothing: it has no output node.")
    roles = output.meta.get("roles")
    values = output.args[0]
    if not isinstance(roles, tuple) or not isinstance(values, tuple) or len(roles) != len(values):
        raise FxcurvError("the output node does not list one role for every value.")
    seen: set[tuple[str, str]] = set()
    for given, value in zip(roles, values, strict=True):
        role = _check_role(given, OUTPUT_KINDS, "an output")
        if not isinstance(value, fx.Node):
            raise FxcurvError(f"output {role} is {value!r}; outputs are values of the program.")
        for key in role.keys:
            if (role.kind, key) in seen:
                raise FxcurvError(f"{role.kind}['{key}'] is yielded twice.")
            seen.add((role.kind, key))
        if isinstance(value.meta["type"], tuple):
            raise FxcurvError(f"output {role} is %{value.name}, which has several results.")
        if role.kind == "state":
            _check_state(role, value, inputs)
        if role.kind == "update" and ("grad", role.key) in inputs:
            gradient = inputs["grad", role.key].meta["type"]
            if gradient.shape != value.meta["type"].shape:
                raise FxcurvError(f"output {role} is {value.meta['type']} but its gradient is {gradient}.")


def _check_state(role: Role, value: fx.Node, inputs: dict[tuple[str, str], fx.Node]) -> None:
    """A state's next value matches its placeholder in role and type."""
    old = inputs.get(("state", role.key))
    if old is None:
        raise FxcurvError(f"output {role} has no placeholder: nothing says how the state starts.")
    if old.meta["role"] != role:
        raise FxcurvError(f"output {role} and its placeholder %{old.name} differ in their further names or init.")
    if old.meta["type"] != value.meta["type"]:
        raise FxcurvError(f"{role} is {old.meta['type']} but its next value %{value.name} is {value.meta['type']}.")


def _check_role(role: object, kinds: tuple[str, ...], what: str) -> Role:
    if not isinstance(role, Role) or role.kind not in kinds:
        raise FxcurvError(f"{what} has role {role}; the kinds here are {', '.join(kinds)}.")
    if not all(role.keys):
        raise FxcurvError(f"{what} has role {role} with an empty key.")
    return role
