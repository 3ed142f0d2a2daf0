"""Program text: one line a node, printed and parsed back to an equal program.

    update {                                       # by share, 1.2 ms, 3 rewrites
      cadence statistics=1, refresh=10
      %stat_a : Rows[?,?,1,12] = stat['attn.q.a'] @attn.q
      %state_A : Psd[12] = state['attn.q.A', 'attn.k.A'] init=zeros @attn.q
      %gram : Psd[12] = gram(%stat_a) every=statistics @attn.q
      %eigh : (Vec[12], Orth[12]) = eigh(%state_A) every=refresh @attn.q
      %getitem : Vec[12] = %eigh[0] every=refresh @attn.q
      yield state['attn.q.A', 'attn.k.A'] = %gram
    }

``every=`` is left out for the cadence ``step``, ``@`` when nobody owns the node. Text after ``#`` is a comment.
"""

from __future__ import annotations

import ast
import operator
import re
from functools import lru_cache
from typing import Any

from torch import fx

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS
from fxcurv.ir.program import INPUT_KINDS, OUTPUT_KINDS, STEP, Program, Role
from fxcurv.ir.types import Type, parse_type


def print_program(program: Program, note: str = "") -> str:
    """Text of a program; ``note`` becomes a comment on the first line."""
    lines = ["update {" + (f"  # {note}" if note else "")]
    periods = [f"{name}={period}" for name, period in program.cadences.items() if name != STEP]
    if periods:
        lines.append(f"  cadence {', '.join(periods)}")
    lines += [f"  {print_node(node)}" for node in program.graph.nodes if node.op != "output"]
    lines += [f"  yield {role} = %{node.name}" for role, node in program.outputs().items()]
    return "\n".join([*lines, "}"])


def print_node(node: fx.Node) -> str:
    """One line of program text."""
    meta = node.meta
    head = f"%{node.name} : {print_type(meta['type'])} = "
    tail = "" if meta["every"] == STEP else f" every={meta['every']}"
    tail += f" @{','.join(meta['owner'])}" if meta["owner"] else ""
    if node.op == "placeholder":
        role = meta["role"]
        return head + str(role) + (f" init={role.init}" if role.init else "") + tail
    target: Any = node.target
    if target is operator.getitem:
        return f"{head}{print_value(node.args[0])}[{node.args[1]}]{tail}"
    return f"{head}{target.name}({', '.join(print_value(value) for value in node.args)}){tail}"


@lru_cache(maxsize=4096)
def print_type(type_: Type | tuple[Type, ...]) -> str:
    """Text of a type, or of a tuple of types."""
    return f"({', '.join(str(t) for t in type_)})" if isinstance(type_, tuple) else str(type_)


def print_value(value: Any) -> str:
    """Text of an operand."""
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(print_value(item) for item in value)}]"
    return repr(value)


_LINE = re.compile(r"%(\w+)\s*:\s*(\([^)]*\)|\S+)\s*=\s*(.*?)(?:\s+init=(\w+))?(?:\s+every=(\w+))?(?:\s+@(\S+))?")
_ROLE = re.compile(r"(\w+)\[(.*)\]")
_ITEM = re.compile(r"%(\w+)\[(\d+)\]")
_CALL = re.compile(r"(\w+)\((.*)\)")
_YIELD = re.compile(r"yield\s+(.*)\s=\s%(\w+)")
_TOKEN = re.compile(r"%(\w+)|'[^']*'")


def parse_program(text: str) -> Program:
    """The program that :func:`print_program` printed; raises :class:`FxcurvError` naming the line it cannot read."""
    program = Program(fx.Graph())
    values: dict[str, fx.Node] = {}
    outputs: dict[Role, fx.Node] = {}
    states: dict[tuple[str, ...], Role] = {}
    closed = False
    for number, raw in enumerate(text.splitlines(), 1):
        line = _strip_comment(raw)
        if line in ("", "update {"):
            continue
        if line == "}":
            closed = True
            break
        try:
            if line.startswith("cadence "):
                for part in line[len("cadence ") :].split(","):
                    name, period = part.strip().split("=")
                    program.cadences[name] = int(period)
            elif line.startswith("yield "):
                match = _YIELD.fullmatch(line)
                if match is None:
                    raise FxcurvError("a yield reads: yield update['name'] = %value")
                role = _parse_role(match[1], OUTPUT_KINDS)
                if role.kind == "state":  # the output role of a state is that of its placeholder, init included
                    role = states.get(role.keys, role)
                if role in outputs:
                    raise FxcurvError(f"{role} is yielded twice")
                outputs[role] = values[match[2]]
            else:
                node = _parse_node(line, program, values)
                values[node.name] = node
                if node.op == "placeholder" and node.meta["role"].kind == "state":
                    states[node.meta["role"].keys] = node.meta["role"]
        except KeyError as error:
            raise FxcurvError(f"line {number}: {error.args[0]} is not defined above: {line}") from error
        except (FxcurvError, ValueError, SyntaxError) as error:
            raise FxcurvError(f"line {number}: {error} (in: {line})") from error
    if not closed:
        raise FxcurvError("the program text has no closing brace on a line of its own.")
    output = program.graph.output(tuple(outputs.values()))
    output.meta["roles"] = tuple(outputs)
    return program


def _strip_comment(line: str) -> str:
    quoted = False
    for position, char in enumerate(line):
        if char == "'":
            quoted = not quoted
        elif char == "#" and not quoted:
            return line[:position].strip()
    return line.strip()


def _parse_node(line: str, program: Program, values: dict[str, fx.Node]) -> fx.Node:
    match = _LINE.fullmatch(line)
    if match is None:
        raise FxcurvError("a node reads: %name : Type = op(operands)")
    name, type_text, body, init, every, owner = match.groups()
    several = type_text[0] == "("
    types: Any = tuple(map(parse_type, _split(type_text[1:-1]))) if several else parse_type(type_text)
    graph = program.graph
    if item := _ITEM.fullmatch(body):
        node = graph.create_node("call_function", operator.getitem, (values[item[1]], int(item[2])), name=name)
    elif call := _CALL.fullmatch(body):
        if call[1] not in OPS:
            raise FxcurvError(f"there is no op named '{call[1]}'; 'fxcurv ops' lists them")
        node = graph.create_node("call_function", OPS[call[1]], _parse_operands(call[2], values), name=name)
    else:
        role = _parse_role(body, INPUT_KINDS)
        node = graph.create_node("placeholder", name, name=name)
        node.meta["role"] = Role(role.kind, role.key, init or "", role.also)
    if node.name != name:
        raise FxcurvError(f"%{name} is defined twice or is not a usable name")
    node.meta.update(type=types, every=every or STEP, owner=tuple(owner.split(",")) if owner else ())
    return node


def _parse_role(text: str, kinds: tuple[str, ...]) -> Role:
    match = _ROLE.fullmatch(text.strip())
    if match is None or match[1] not in kinds:
        raise FxcurvError(f"'{text}' is not a role; the kinds here are {', '.join(kinds)}")
    keys = ast.literal_eval(f"({match[2]},)")
    return Role(match[1], keys[0], "", tuple(keys[1:]))


def _parse_operands(text: str, values: dict[str, fx.Node]) -> tuple[Any, ...]:
    names: list[str] = []

    def hide(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0]
        names.append(match[1])
        return f"('%', {len(names) - 1})"

    literal = ast.literal_eval(f"({_TOKEN.sub(hide, text)},)") if text.strip() else ()

    def restore(value: Any) -> Any:
        if isinstance(value, tuple) and value[:1] == ("%",):
            return values[names[value[1]]]
        return [restore(item) for item in value] if isinstance(value, list) else value

    return tuple(restore(value) for value in literal)


def _split(text: str) -> list[str]:
    """Split at commas outside brackets."""
    parts, depth, current = [], 0, ""
    for char in text:
        depth += (char == "[") - (char == "]")
        if char == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += char
    return [*parts, current] if current.strip() else parts
