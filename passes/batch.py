"""batch: one op for what many small layers do alike.

A step of a model with sixty layers of width 32 is a thousand ops on tiny matrices, and all that it costs is to start
them. Nodes that compute the same from operands that are computed the same, on values of equal types, become one node on
a stack: a value with one more leading dimension, a row for each layer. Such nodes lie at the same depth of the program,
so none of them can wait for another. Rows are put together where a stack begins (gradients, statistics, states) and
taken apart where it ends (updates, states, flags); in between the stack is handed on as it is. States keep their names,
shapes and flags: each is a row.

It pays where values are small: on one CPU core, for inverses and products with matrices of up to 64 rows. What is
larger is computed by itself, as is everything of a layer that owns something larger.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS, Op, Trait
from fxcurv.ir.ops.batched import stacked
from fxcurv.ir.program import STEP, Program, Role, infer, operand_types
from fxcurv.ir.statistic import parse_statistic
from fxcurv.ir.types import Scalar, Type
from fxcurv.passes.manager import Compilation, Pass

Lifted = Callable[[list[Any], int], tuple[str, list[Any]]]


def _axes(name: str) -> Lifted:
    """An op whose literals name all axes of its operand: the leading one is left where it is."""
    return lambda args, rows: (name, [args[0], [0, *(axis + 1 for axis in args[1])], [rows, *args[2]]])


LIFTED: dict[str, Lifted] = {
    "matricize": _axes("matricize"),
    "tensorize": _axes("tensorize"),
    "append_column": lambda args, rows: ("append_column", args),
    "weight_columns": lambda args, rows: ("weight_columns", args),
    "border": lambda args, rows: ("border", args),
    **{
        name: lambda args, rows, name=name: (f"{name}_each", args)  # type: ignore[misc]
        for name in ("dot", "finite", "last_column", "mode_gram", "mode_diag", "mode_apply")
    },
}
"""Ops without the trait BATCHABLE: (operands on stacks, number of rows) -> the op on stacks and its operands."""
JOINING = ("clip_kl", "match_norm")
"""Ops that take lists of scalars of any shape: a stack may stand for its rows."""


@dataclass(frozen=True)
class Batch(Pass):
    """Stacks equal computations of at least ``min`` layers with no value larger than ``limit`` x ``limit``, one row and
    column more for biases allowed."""

    limit: int = 64
    min: int = 4
    name: ClassVar[str] = "batch"

    def run(self, c: Compilation) -> int:
        assert c.program is not None
        depths, groups = alike(c.program, (self.limit + 1) ** 2, self.min)
        if not groups:
            return 0
        emitter = _Emitter(c.program)
        rewrites = 0
        group_of = {node: group for group in groups for node in group}
        todo = sorted(c.program.nodes, key=lambda node: depths[node])  # stable: operands before readers
        for node in todo:
            group = group_of.get(node)
            if group is None:
                emitter.copy(node)
            elif node is group[0]:
                if not emitter.wants(group) or not c.spend() or not emitter.stack(group):
                    for member in group:
                        emitter.copy(member)
                    continue
                rewrites += 1
        emitter.finish()
        return rewrites


def alike(program: Program, most: int, least: int) -> tuple[dict[fx.Node, int], list[list[fx.Node]]]:
    """(depth by node, groups of at least ``least`` nodes that may be stacked: operands first, each in program order).

    Nodes are alike if they apply one op with equal literals to operands that are alike, and if everything that belongs
    to their owners is alike too, so that the rows of all stacks of a layer are in step. most: elements of a value.
    """
    table: dict[Any, int] = {}
    number: dict[fx.Node, int] = {}
    depth: dict[fx.Node, int] = {}

    def skeleton(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return "%", number[value]
        if isinstance(value, (list, tuple)):
            return tuple(skeleton(item) for item in value)
        return type(value).__name__, value

    large: set[tuple[str, ...]] = set()
    owned: dict[tuple[str, ...], Counter[int]] = {}
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        type_, owner = node.meta["type"], node.meta["owner"]
        if node.op == "placeholder":
            role = node.meta["role"]
            one = role.kind in ("hyper", "oracle") or (role.kind == "stat" and parse_statistic(role.key) is None)
            key: Any = node if one else (role.kind, type_, role.init)
        else:
            key = node.target, node.meta["every"], type_, skeleton(node.args)
            owned.setdefault(owner, Counter())[table.setdefault(key, len(table))] += 1
        number[node] = table.setdefault(key, len(table))
        depth[node] = 1 + max((depth[operand] for operand in node.all_input_nodes), default=0)
        values = type_ if isinstance(type_, tuple) else (type_,)
        if any(value.numel > most for value in values) and owner:
            large.add(owner)
    names = {name for owner in large for name in owner}
    whole = {owner: frozenset(kinds.items()) if owner else None for owner, kinds in owned.items()}
    groups: dict[Any, list[fx.Node]] = {}
    for node in program.nodes:
        owner = node.meta["owner"]
        if not names.intersection(owner) and _liftable(node):
            groups.setdefault((number[node], whole[owner]), []).append(node)
    return depth, [group for group in groups.values() if len(group) >= least]


def _liftable(node: fx.Node) -> bool:
    target: Any = node.target
    if target is operator.getitem or target is OPS["on_due"]:
        return True
    return isinstance(target, Op) and (Trait.BATCHABLE in target.traits or target.name in LIFTED)


@dataclass(eq=False)
class _Stack:
    """Values of equal nodes as one: ``value`` in the new graph, ``members`` in the old one; apart: the rows, a list."""

    value: fx.Node
    members: list[fx.Node]
    apart: fx.Node | None = field(default=None)


class _Emitter:
    """Writes the program anew, in an order in which operands come first."""

    def __init__(self, program: Program) -> None:
        self.program, self.graph = program, fx.Graph()
        self.alone: dict[fx.Node, fx.Node] = {}  # new values by old node
        self.place: dict[fx.Node, tuple[_Stack, int]] = {}
        self.made: dict[tuple[str, tuple[fx.Node, ...]], fx.Node] = {}
        for node in program.placeholders:
            self.copy(node)

    def copy(self, node: fx.Node) -> None:
        """The node as it was."""
        joined = self.joined(node) if getattr(node.target, "name", "") in JOINING else node.args
        args: Any = fx.node.map_arg(joined, lambda n: n if n.graph is self.graph else self.single(n))
        new = self.graph.create_node(node.op, node.target, args, {}, name=node.name)
        new.meta = dict(node.meta)
        self.alone[node] = new

    def joined(self, node: fx.Node) -> tuple[Any, ...]:
        """Operands with a stack in every list in which all of its rows are."""
        return tuple(self._joined(value) if isinstance(value, (list, tuple)) else value for value in node.args)

    def _joined(self, values: Sequence[Any]) -> list[Any]:
        stack_of = {value: self.place[value][0] for value in values if value in self.place}
        found = Counter(stack_of[value] for value in values if value in stack_of)
        whole = {stack for stack, rows in found.items() if rows == len(stack.members)}
        stacks = [stack.value for stack in found if stack in whole]
        return [*stacks, *(value for value in values if stack_of.get(value) not in whole)]

    def wants(self, group: list[fx.Node]) -> bool:
        """Whether a group is worth it: what no layer owns is stacked only behind stacks."""
        return bool(group[0].meta["owner"]) or all(self._behind(node) for node in group)

    def _behind(self, node: fx.Node) -> bool:
        return any(operand in self.place for operand in node.all_input_nodes)

    def stack(self, group: list[fx.Node]) -> bool:
        """One node for all of a group; False where types stand against it."""
        first, rows = group[0], len(group)
        if first.target is operator.getitem and first.args[0] not in self.place:
            return False
        each = first.target is OPS["finite"]
        args = [self._operand([node.args[i] for node in group], first, i, each) for i in range(len(first.args))]
        target: Any = first.target
        if isinstance(target, Op) and target.name in LIFTED:
            name, args = LIFTED[target.name](args, rows)
            target = OPS[name]
        type_ = first.meta["type"]
        expected = tuple(stacked(t, rows) for t in type_) if isinstance(type_, tuple) else stacked(type_, rows)
        new = self.graph.create_node("call_function", target, tuple(args), {}, name=f"{first.name}_rows")
        try:
            fits = infer(target, operand_types(new)) == expected
        except FxcurvError:
            fits = False
        if not fits:
            self.graph.erase_node(new)
            return False
        owner = tuple(dict.fromkeys(name for node in group for name in node.meta["owner"]))
        new.meta.update(type=expected, every=first.meta["every"], owner=owner)
        stack = _Stack(new, group)
        self.place.update({node: (stack, i) for i, node in enumerate(group)})
        return True

    def _operand(self, values: list[Any], reader: fx.Node, index: int, each: bool) -> Any:
        """One operand of a stack from those of its rows."""
        if isinstance(values[0], (list, tuple)):
            return [self._operand(list(items), reader, index, each) for items in zip(*values, strict=True)]
        if not isinstance(values[0], fx.Node):
            return values[0]
        one = len(set(values)) == 1
        if one and isinstance(values[0].meta["type"], Scalar) and not each and reader.target is not OPS["on_due"]:
            return self.single(values[0])
        stack, _ = self.place.get(values[0], (None, 0))
        if stack is not None and stack.members == values:
            return stack.value
        # Between refreshes on_due reads its second operand, whatever its own cadence is.
        every = STEP if reader.target is OPS["on_due"] and index == 1 else reader.meta["every"]
        return self._put_together(values, every)

    def _put_together(self, values: list[fx.Node], every: str) -> fx.Node:
        if all(value.op == "placeholder" for value in values):
            every = values[0].meta["every"]
        key = every, tuple(values)
        if key not in self.made:
            rows = [self.single(value) for value in values]
            new = self.graph.create_node("call_function", OPS["stack"], (rows,), {}, name=f"{rows[0].name}_rows")
            type_: Type = infer(OPS["stack"], operand_types(new))  # type: ignore[assignment]
            owner = tuple(dict.fromkeys(name for value in values for name in value.meta["owner"]))
            new.meta.update(type=type_, every=every, owner=owner)
            self.made[key] = new
        return self.made[key]

    def single(self, node: fx.Node) -> fx.Node:
        """The new value of one old node: a row, where it is in a stack."""
        if node in self.alone:
            return self.alone[node]
        stack, index = self.place[node]
        if node.target is OPS["on_due"]:  # costs nothing, and lets a step without the cadence leave the state alone
            self.copy(node)
            return self.alone[node]
        value = stack.value
        if stack.apart is None:
            stack.apart = self.graph.call_function(OPS["unstack"], (value,))
            types = infer(OPS["unstack"], operand_types(stack.apart))
            stack.apart.meta.update(type=types, every=value.meta["every"], owner=value.meta["owner"])
        row = self.graph.create_node("call_function", operator.getitem, (stack.apart, index), {}, name=node.name)
        row.meta = dict(node.meta)
        self.alone[node] = row
        return row

    def _outputs(self) -> dict[Role, fx.Node]:
        """New values by role; the flags of a whole stack are one output with a row for each key."""
        old = self.program.outputs()
        flags: dict[_Stack, dict[int, list[Role]]] = {}
        for role, value in old.items():
            if role.kind == "flag" and value in self.place:
                stack, index = self.place[value]
                flags.setdefault(stack, {}).setdefault(index, []).append(role)
        found = {}
        for stack, rows in flags.items():
            if len(rows) == len(stack.members) and all(len(roles) == 1 for roles in rows.values()):
                keys = [rows[i][0].key for i in range(len(rows))]
                found[Role("flag", keys[0], also=tuple(keys[1:]))] = stack.value
        whole = {key for role in found for key in role.keys}
        return {r: self.single(v) for r, v in old.items() if r.kind != "flag" or r.key not in whole} | found

    def finish(self) -> None:
        """Yield what the program yielded, from the new values."""
        outputs = self._outputs()
        output = self.graph.output(tuple(outputs.values()))
        output.meta["roles"] = tuple(outputs)
        self.program.graph = self.graph
        self.program.prune()
