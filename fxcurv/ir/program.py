"""Update programs: the factor algebra of a method as a ``torch.fx`` graph.

A placeholder or an output is identified by its :class:`Role`, never by its position. Nodes carry

* ``meta["type"]``: a :class:`~fxcurv.ir.types.Type`, or a tuple of types for an op with several results;
* ``meta["every"]``: the name of the cadence at which the node is evaluated (``"step"``, ``"statistics"``, ...);
* ``meta["owner"]``: names of the layers (or parameters) the node works for.

Everything an op depends on is an operand; ``meta`` only describes. A state placeholder and the output of
equal role form a pair: the value of this step and the value that the next step will read.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS, Op
from fxcurv.ir.statistic import state_keys
from fxcurv.ir.types import Type

INPUT_KINDS = ("grad", "rows", "param", "stat", "state", "hyper", "oracle")
OUTPUT_KINDS = ("update", "state", "flag", "info")
STEP = "step"  # the cadence of what is needed in every step
STATISTICS = "statistics"  # the cadence at which statistics arrive
REFRESH = "refresh"  # the cadence of factorisations

Owner = tuple[str, ...]


@dataclass(frozen=True)
class Role:
    """What an input or output of a program means.

    kind: one of INPUT_KINDS for a placeholder, of OUTPUT_KINDS for an output.
    key: parameter name (grad, param, update), ``layer.x`` or ``layer.dy`` (rows), statistic expression (stat),
        ``owner.part`` (state), hyper-parameter name, oracle name, flag or info name.
    init: how a state starts: "zeros", "ones" or "eye".
    also: further keys of a state that sharing merged into this one; it is saved under all of them.
    """

    kind: str
    key: str
    init: str = ""
    also: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys under which the value is known."""
        return (self.key, *self.also)

    def __hash__(self) -> int:  # kept: a step of a large model looks up thousands of roles
        found = self.__dict__.get("_hash")
        if found is None:
            found = self.__dict__["_hash"] = hash((self.kind, self.key, self.init, self.also))
        return int(found)

    def __getstate__(self) -> dict[str, Any]:  # text has another hash in another process
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}

    def __str__(self) -> str:
        return f"{self.kind}[{', '.join(repr(key) for key in self.keys)}]"


class Program:
    """An update program: a graph whose inputs and outputs have roles, and the periods of its cadences."""

    def __init__(self, graph: fx.Graph, cadences: dict[str, int] | None = None) -> None:
        self.graph = graph
        self.cadences: dict[str, int] = {STEP: 1, **(cadences or {})}

    @property
    def nodes(self) -> Iterator[fx.Node]:
        """All operation nodes in order, without placeholders and the output."""
        return (node for node in self.graph.nodes if node.op == "call_function")

    @property
    def placeholders(self) -> list[fx.Node]:
        """Input nodes in order."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def output(self) -> fx.Node:
        """The output node; its arguments match ``output_roles``."""
        return next(node for node in reversed(self.graph.nodes) if node.op == "output")

    def inputs(self, kind: str | None = None) -> dict[Role, fx.Node]:
        """Placeholders by role, of one kind or all."""
        wanted = (node for node in self.placeholders if kind in (None, node.meta["role"].kind))
        return {node.meta["role"]: node for node in wanted}

    def outputs(self, kind: str | None = None) -> dict[Role, fx.Node]:
        """Output values by role, of one kind or all."""
        values: Any = self.output.args[0]
        pairs = zip(self.output.meta["roles"], values, strict=True)
        return {role: node for role, node in pairs if kind in (None, role.kind)}

    def set_outputs(self, outputs: dict[Role, fx.Node]) -> None:
        """Replace the output node's values and roles."""
        output = self.output
        output.args = (tuple(outputs.values()),)
        output.meta["roles"] = tuple(outputs)

    def copy(self) -> Program:
        """An independent program with the same nodes, names and metadata."""
        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            values[node] = graph.node_copy(node, values.__getitem__)
            values[node].meta = dict(node.meta)
        return Program(graph, dict(self.cadences))

    def prune(self) -> int:
        """Remove nodes and placeholders that no output needs; returns how many.

        The placeholder of a state stays if the program yields that state (it says how it starts) or a statistic
        that is left reads it: taps are readers too.
        """
        removed = 0
        kept = {key for role in self.output.meta["roles"] if role.kind == "state" for key in role.keys}
        nodes = [node for node in self.graph.nodes if node.op != "output"]
        for node in sorted(reversed(nodes), key=_is_state):  # states last: what reads them has then gone, or stays
            role = node.meta.get("role")
            if node.users or (_is_state(node) and not kept.isdisjoint(role.keys)):
                if role is not None and role.kind == "stat":
                    kept.update(state_keys(role.key))
                continue
            self.graph.erase_node(node)
            removed += 1
        return removed

    def text(self, note: str = "") -> str:
        """The program as text that :func:`fxcurv.ir.text.parse_program` reads back to an equal program."""
        from fxcurv.ir.text import print_program

        return print_program(self, note)

    def __str__(self) -> str:
        return self.text()

    def __len__(self) -> int:
        return sum(1 for _ in self.nodes)


def _is_state(node: fx.Node) -> bool:
    return node.op == "placeholder" and node.meta["role"].kind == "state"


def op_of(node: fx.Node) -> Op:
    """The op that a node applies; raises :class:`FxcurvError` for any other target."""
    if not isinstance(node.target, Op):
        raise FxcurvError(f"%{node.name} applies {node.target}, which is not an op.")
    return node.target


def operand_types(node: fx.Node) -> list[Any]:
    """The node's operands with every value replaced by its type; literals stay."""

    def one(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return value.meta["type"]
        if isinstance(value, (list, tuple)):
            return [one(item) for item in value]
        return value

    return [one(value) for value in node.args]


def infer(target: Any, operands: list[Any]) -> Type | tuple[Type, ...]:
    """Type of ``target`` applied to operand types; raises :class:`FxcurvError` when they do not fit."""
    if target is operator.getitem:
        types, index = operands
        return types[index]
    key = (target.name, *(tuple(operand) if isinstance(operand, list) else operand for operand in operands))
    if key not in _INFERRED or len(_INFERRED) > 100_000:
        _INFERRED[key] = _infer(target, operands)
    return _INFERRED[key]


_INFERRED: dict[Any, Any] = {}  # types are values: a program of equal layers asks the same questions again and again


def _infer(target: Any, operands: list[Any]) -> Type | tuple[Type, ...]:
    try:
        return target.infer(*operands)
    except FxcurvError:
        raise
    except (TypeError, AttributeError, IndexError, ValueError) as error:
        shown = ", ".join(str(operand) for operand in operands)
        raise FxcurvError(f"{target.name}({shown}) does not fit its schema {target.schema}: {error}.") from error


class Builder:
    """Writes a program. ``builder.gram(rows)`` appends the op ``gram``; every registered op is a method.

    ``at`` and ``owner`` set the cadence and the owner of what is built; use :meth:`within` to set them for a block.
    """

    def __init__(self, cadences: dict[str, int] | None = None) -> None:
        self.program = Program(fx.Graph(), cadences)
        self.at = STEP
        self.owner: Owner = ()
        self._inputs: dict[tuple[str, str], fx.Node] = {}
        self._first: fx.Node | None = None  # the first op: placeholders go before it
        self._outputs: dict[Role, fx.Node] = {}

    def within(self, *, at: str | None = None, owner: Owner | None = None) -> _Within:
        """A context in which nodes get this cadence and owner."""
        return _Within(self, self.at if at is None else at, self.owner if owner is None else owner)

    def input(self, kind: str, key: str, type_: Type, init: str = "") -> fx.Node:
        """The placeholder of a role; asking twice for one role gives the same node."""
        if (kind, key) not in self._inputs:
            graph = self.program.graph
            with graph.inserting_before(self._first):
                node = graph.placeholder(_identifier(f"{kind}_{key}"))
            owner = self.owner if kind in ("grad", "param", "state") else ()
            every = STATISTICS if kind == "stat" else STEP
            node.meta.update(role=Role(kind, key, init), type=type_, every=every, owner=owner)
            self._inputs[kind, key] = node
        node = self._inputs[kind, key]
        if node.meta["type"] != type_:
            raise FxcurvError(f"{kind}['{key}'] is read as {node.meta['type']} and as {type_}.")
        return node

    def emit(self, op: Op, *operands: Any) -> fx.Node:
        """Append one op; its type is inferred from the operands' types."""
        node = self.program.graph.call_function(op, operands)
        self._first = self._first or node
        node.meta.update(type=infer(op, operand_types(node)), every=self.at, owner=self.owner)
        return node

    def item(self, node: fx.Node, index: int) -> fx.Node:
        """One result of an op with several."""
        taken = self.program.graph.call_function(operator.getitem, (node, index))
        taken.meta.update(type=node.meta["type"][index], every=node.meta["every"], owner=self.owner)
        return taken

    def latest(self, new: fx.Node, old: fx.Node) -> fx.Node:
        """``new`` in a step in which its cadence is due, ``old`` in any other."""
        with self.within(at=new.meta["every"]):
            return self.emit(OPS["on_due"], new, old)

    def __getattr__(self, name: str) -> Any:
        if name not in OPS:
            raise AttributeError(f"there is no op named '{name}'")
        return lambda *operands: self.emit(OPS[name], *operands)

    def give(self, kind: str, key: str, value: fx.Node) -> None:
        """Add an output. A state's output must have the type of its placeholder."""
        role = Role(kind, key)
        if kind == "state":
            placeholder = self._inputs[kind, key]
            if placeholder.meta["type"] != value.meta["type"]:
                old, new = placeholder.meta["type"], value.meta["type"]
                raise FxcurvError(f"state['{key}'] is {old} but its next value is {new}.")
            role = placeholder.meta["role"]
        if role in self._outputs:
            raise FxcurvError(f"{role} is yielded twice.")
        self._outputs[role] = value

    def given(self, kind: str, key: str) -> fx.Node:
        """The value of an output that was added before; raises :class:`FxcurvError` if none was."""
        if Role(kind, key) not in self._outputs:
            raise FxcurvError(f"{Role(kind, key)} is read before it is yielded; emit what yields it first.")
        return self._outputs[Role(kind, key)]

    def finish(self) -> Program:
        """Close the program."""
        output = self.program.graph.output(tuple(self._outputs.values()))
        output.meta["roles"] = tuple(self._outputs)
        return self.program


class _Within:
    def __init__(self, builder: Builder, at: str, owner: Owner) -> None:
        self.builder, self.new = builder, (at, owner)

    def __enter__(self) -> None:
        self.old = self.builder.at, self.builder.owner
        self.builder.at, self.builder.owner = self.new

    def __exit__(self, *exc: object) -> None:
        self.builder.at, self.builder.owner = self.old


def _identifier(text: str) -> str:
    cleaned = "".join(c if c.isalnum() else "_" for c in text).strip("_")
    return cleaned if cleaned and not cleaned[0].isdigit() else f"v_{cleaned}"
