"""Rewrite rules as text, in the printer's own syntax, and the matcher that applies them.

    Rule("ema(s, gram(x), w)", "gram_ema(s, x, w)")
    Rule("mul(x, 1.0)", "x", when=same_type("x"))

A bare name is a variable: it stands for one value or literal, the same one wherever it occurs twice. A number, a string
or a list of numbers stands for itself, a call for an op, ``x[0]`` for one result of an op with several. The pattern is
matched as written: a rule for ``mul(x, 1.0)`` says nothing about ``mul(1.0, x)``.

A match never crosses a cadence. Between refreshes a value of another cadence is a kept one, so a rewrite across
cadences would change *when* something is computed, and with it what later steps read. For the same reason a value is
put in the place of another only if both have one cadence, or nobody reads the place at another. And no rewrite lets an
input become an output, or one value two outputs: the results of a program are tensors of their own.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS
from fxcurv.ir.program import Program, infer, operand_types
from fxcurv.ir.text import print_type

Bindings = dict[str, Any]
ROOT = "root of the match"  # no variable has this name: the matched node itself, for conditions


@dataclass(frozen=True)
class Variable:
    """Stands for a value or a literal."""

    name: str


@dataclass(frozen=True)
class Pattern:
    """An op (or ``operator.getitem``) applied to patterns, variables and literals."""

    target: Any
    operands: tuple[Any, ...]


@dataclass(frozen=True)
class Rule:
    """Replace what matches ``pattern`` by ``replacement`` when ``when(bindings)`` holds.

    The bindings hold a node or literal for every variable, and the matched node under ROOT. Raises
    :class:`FxcurvError` for text that is no pattern, an unknown op, or a replacement with a variable of its own.
    """

    pattern: str
    replacement: str
    when: Callable[[Bindings], bool] | None = None
    name: str = ""
    source: Any = field(init=False, repr=False, compare=False)
    target: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or f"{self.pattern} -> {self.replacement}")
        object.__setattr__(self, "source", _parse(self.pattern))
        object.__setattr__(self, "target", _parse(self.replacement))
        if not isinstance(self.source, Pattern):
            raise FxcurvError(f"rule '{self.name}' must match an op, not '{self.pattern}'.")
        unbound = _variables(self.target) - _variables(self.source)
        if unbound:
            raise FxcurvError(f"rule '{self.name}' replaces by '{min(unbound)}', which its pattern does not bind.")
        if not isinstance(self.target, (Pattern, Variable)):
            raise FxcurvError(f"rule '{self.name}' must replace by an op or a variable.")


def same_type(variable: str) -> Callable[[Bindings], bool]:
    """A condition: the variable is a value of exactly the matched node's type."""

    def holds(bindings: Bindings) -> bool:
        value = bindings[variable]
        return isinstance(value, fx.Node) and value.meta["type"] == bindings[ROOT].meta["type"]

    return holds


def _parse(text: str) -> Any:
    try:
        return _convert(ast.parse(text, mode="eval").body, text)
    except SyntaxError as error:
        raise FxcurvError(f"'{text}' is not a pattern; write for example \"ema(s, gram(x), w)\".") from error


def _convert(tree: ast.expr, text: str) -> Any:
    match tree:
        case ast.Name(id=name):
            return Variable(name)
        case ast.Call(func=ast.Name(id=name), args=operands, keywords=[]):
            if name not in OPS:
                raise FxcurvError(f"'{text}' has the unknown op '{name}'; 'fxcurv ops' lists the known ones.")
            return Pattern(OPS[name], tuple(_convert(operand, text) for operand in operands))
        case ast.Subscript(value=value, slice=index):
            return Pattern(operator.getitem, (_convert(value, text), _convert(index, text)))
        case ast.List(elts=items):
            return [_convert(item, text) for item in items]
        case ast.Constant(value=value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
    raise FxcurvError(f"'{text}' is not a pattern; write for example \"ema(s, gram(x), w)\".")


def _variables(pattern: Any) -> set[str]:
    match pattern:
        case Variable(name=name):
            return {name}
        case Pattern(operands=operands):
            return set().union(*map(_variables, operands))
        case list():
            return set().union(*map(_variables, pattern))
    return set()


def matches(pattern: Any, value: Any, bindings: Bindings, every: str) -> bool:
    """Whether ``value`` has the form of ``pattern`` at the cadence ``every``; fills ``bindings``."""
    if isinstance(pattern, Variable):
        return _equal(bindings.setdefault(pattern.name, value), value)
    if isinstance(pattern, Pattern):
        return (
            isinstance(value, fx.Node)
            and value.op == "call_function"
            and value.target is pattern.target
            and value.meta["every"] == every
            and matches(list(pattern.operands), list(value.args), bindings, every)
        )
    if isinstance(pattern, list):
        return (
            isinstance(value, (list, tuple))
            and len(value) == len(pattern)
            and all(matches(one, item, bindings, every) for one, item in zip(pattern, value, strict=True))
        )
    return _equal(pattern, value)


def _equal(one: Any, other: Any) -> bool:
    """Same node, or equal literals (True is not 1)."""
    if isinstance(one, fx.Node) or isinstance(other, fx.Node):
        return one is other
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def apply_rules(program: Program, rules: Iterable[Rule], spend: Callable[[], bool] = lambda: True) -> int:
    """Rewrite until no rule matches or ``spend`` refuses; returns the number of rewrites.

    A new node gets the cadence and owner of the node it replaces and must infer to the same type; interior nodes that
    others read stay. Raises :class:`FxcurvError` when a rule would change a type, or when rules undo one another.
    """
    by_target: dict[Any, list[Rule]] = {}
    for rule in rules:
        by_target.setdefault(rule.source.target, []).append(rule)
    # Operands come before readers, so that whatever a node may match has settled when its turn comes.
    pending = [node for node in program.nodes if node.target in by_target][::-1]
    limit = 100 + 10 * len(program)
    gone: set[fx.Node] = set()
    rewrites = 0
    while pending:
        node = pending.pop()
        if node in gone:
            continue
        for rule in by_target.get(node.target, ()):
            bindings: Bindings = {ROOT: node}
            if not matches(rule.source, node, bindings, node.meta["every"]):
                continue
            if not (rule.when is None or rule.when(bindings)) or not _may_stand_for(rule.target, bindings, node):
                continue
            if rewrites >= limit:
                raise FxcurvError(f"rule '{rule.name}' and others undo one another: {limit} rewrites did not end.")
            if not spend():
                return rewrites
            made = _replace(program, rule, bindings, node)
            rewrites += 1
            _erase_unused(program, node, gone)
            pending += reversed(made)
            break
    return rewrites


def _may_stand_for(target: Any, bindings: Bindings, node: fx.Node) -> bool:
    """Whether an existing value may take the place of ``node``: see the module's docstring."""
    if not isinstance(target, Variable):
        return True
    value, every = bindings[target.name], node.meta["every"]
    if not isinstance(value, fx.Node):
        return False
    if _yielded(node) and (value.op == "placeholder" or _yielded(value)):
        return False
    return value.meta["every"] == every or all(
        user.op != "output" and user.meta["every"] == every for user in node.users
    )


def _yielded(node: fx.Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _replace(program: Program, rule: Rule, bindings: Bindings, node: fx.Node) -> list[fx.Node]:
    """Build the replacement before ``node`` and let everybody read it; returns the new nodes, operands first."""
    made: list[fx.Node] = []

    def build(pattern: Any) -> Any:
        if isinstance(pattern, Variable):
            return bindings[pattern.name]
        if isinstance(pattern, list):
            return [build(item) for item in pattern]
        if not isinstance(pattern, Pattern):
            return pattern
        new = program.graph.call_function(pattern.target, tuple(build(operand) for operand in pattern.operands))
        made.append(new)
        types = infer(pattern.target, operand_types(new))
        new.meta.update(type=types, every=node.meta["every"], owner=node.meta["owner"])
        return new

    with program.graph.inserting_before(node):
        new: fx.Node = build(rule.target)
    old_type, new_type = node.meta["type"], new.meta["type"]
    if new_type != old_type:
        for extra in reversed(made):
            program.graph.erase_node(extra)
        raise FxcurvError(
            f"rule '{rule.name}' would turn %{node.name} from {print_type(old_type)} into {print_type(new_type)}."
        )
    if not made and new.op == "call_function":  # the owner's flags watch the value that remains
        new.meta["owner"] = tuple(dict.fromkeys((*new.meta["owner"], *node.meta["owner"])))
    node.replace_all_uses_with(new)
    return made


def _erase_unused(program: Program, node: fx.Node, gone: set[fx.Node]) -> None:
    """Erase a node without readers, then those of its operands that only it read."""
    stack = [node]
    while stack:
        candidate = stack.pop()
        if candidate in gone or candidate.users or candidate.op != "call_function":
            continue
        stack += candidate.all_input_nodes
        program.graph.erase_node(candidate)
        gone.add(candidate)
