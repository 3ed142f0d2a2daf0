"""What a program costs, from types alone: floating-point operations and bytes, per node and per cadence.

A size that is known only when the program runs counts as ``rows``: the rows of a statistic are taken as one flat list
of that many. A reduction that ``sink`` moved into a tap no longer is a node, but it still has to be computed: its cost
is worked out from the statistic's expression and added to the cadence "statistics".
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS, Cost, Trait
from fxcurv.ir.program import STATISTICS, Program
from fxcurv.ir.statistic import Call, RowsOf, StateOf, Whole, parse_statistic
from fxcurv.ir.types import Rows, Type


@dataclass(frozen=True)
class Budget:
    """Cost of one evaluation of each cadence, and the bytes that states occupy between steps.

    periods: steps between two evaluations, by cadence.
    """

    costs: dict[str, Cost]
    periods: dict[str, int]
    state_bytes: int

    @property
    def per_step(self) -> Cost:
        """Average cost of a step: every cadence divided by its period."""
        parts = [(self.costs[name], self.periods[name]) for name in self.costs]
        return Cost(sum(cost.flops / n for cost, n in parts), sum(cost.bytes / n for cost, n in parts))


def budget(program: Program, rows: int = 1) -> Budget:
    """Costs by cadence and memory of a program for statistics of ``rows`` rows."""
    return Budget(program_cost(program, rows), dict(program.cadences), sum(state_bytes(program).values()))


def program_cost(program: Program, rows: int = 1) -> dict[str, Cost]:
    """Cost of one evaluation of each cadence, taps included."""
    total = {name: Cost() for name in program.cadences}
    for node, cost in node_costs(program, rows).items():
        every = STATISTICS if node.op == "placeholder" else node.meta["every"]
        total[every] = total.get(every, Cost()) + cost
    return total


def node_costs(program: Program, rows: int = 1) -> dict[fx.Node, Cost]:
    """Cost of every op, and of every statistic input that a tap has to reduce."""
    states = state_types(program)
    costs: dict[fx.Node, Cost] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.meta["role"].kind == "stat":
            cost = statistic_cost(node.meta["role"].key, node.meta["type"], states, rows)
            if cost != Cost():
                costs[node] = cost
        elif node.op == "call_function" and node.target is not operator.getitem and node.target is not OPS["on_due"]:
            operands = fx.node.map_arg(node.args, lambda value: sized(value.meta["type"], rows))
            costs[node] = node.target.cost(sized(node.meta["type"], rows), *operands)
    return costs


def state_types(program: Program) -> dict[str, Type]:
    """Types of the states under all their names."""
    return {key: node.meta["type"] for role, node in program.inputs("state").items() for key in role.keys}


def state_bytes(program: Program) -> dict[str, int]:
    """Bytes of every state by its first name; a merged state is there once."""
    return {role.key: node.meta["type"].nbytes for role, node in program.inputs("state").items()}


def sized(type_: Any, rows: int) -> Any:
    """A type with unknown sizes filled in: rows as (rows, 1, groups, features), any other unknown size as ``rows``."""
    if isinstance(type_, tuple):
        return tuple(sized(one, rows) for one in type_)
    if None not in type_.shape:
        return type_
    shape = [rows if size is None else size for size in type_.shape]
    if isinstance(type_, Rows) and type_.shape[0] is None and type_.shape[1] is None:
        shape[1] = 1
    return type(type_)(tuple(shape), type_.dtype)


def _one_side(result: Type, rows: int) -> list[Type]:
    """Rows of a reduction to (d, d) or (d,), with groups in front."""
    return [Rows((rows, 1, _groups(result), result.shape[-1]), result.dtype)]


def _two_sides(result: Type, rows: int) -> list[Type]:
    """Rows a and g of a reduction to (o, i)."""
    groups = _groups(result)
    return [Rows((rows, 1, groups, d), result.dtype) for d in (result.shape[-1], result.shape[-2])]


def _flat_sides(result: Type, rows: int) -> list[Type]:
    """Rows a and g of a reduction to (o i, o i): only the product matters to the cost, so o is taken as 1."""
    groups = _groups(result)
    return [Rows((rows, 1, groups, d), result.dtype) for d in (result.shape[-1], 1)]


def _weighed_side(result: Type, rows: int) -> list[Type]:
    """Rows and those whose lengths weigh them, which cost nothing beside the product."""
    return [*_one_side(result, rows), Rows((rows, 1, _groups(result), 1), result.dtype)]


def _block_side(result: Type, rows: int) -> list[Type]:
    """Rows of a reduction to blocks (n, size, size): only their number of features matters, so one group is as good."""
    size = result.shape[-1] or 1
    return [Rows((rows, 1, 1, result.numel // size), result.dtype)]


def _uncounted(result: Type, rows: int) -> list[Type]:
    """The number of rows costs nothing and does not say how wide they are."""
    return [Rows((rows, 1, 1, 0), result.dtype)]


def _groups(result: Type) -> int | None:
    return result.batch[0] if result.batch else 1


READS: dict[str, Callable[[Type, int], list[Type]]] = {
    "gram": _one_side,
    "diag_gram": _one_side,
    "row_sum": _one_side,
    "count": _uncounted,
    "examples": _uncounted,
    "block_gram": _block_side,
    "weighted_gram": _weighed_side,
    "weighted_diag_gram": _weighed_side,
    "grad_square": _two_sides,
    "second_moment": _two_sides,
    "grad_gram": _flat_sides,
}
"""How the rows that a reduction reads follow from the type of its result."""


def statistic_cost(key: str, type_: Type, states: Mapping[str, Type], rows: int = 1) -> Cost:
    """Cost of what a tap computes for the statistic ``key`` of a given type; nothing for plain rows and numbers.

    states: types of the program's states by name, for reductions that read some. An upper bound where a layer has a
    cheaper way (the Gram of one-hot rows is a count). Raises :class:`FxcurvError` for a reduction it does not know.
    """
    expression = parse_statistic(key)
    if not isinstance(expression, Call):
        return Cost()
    if expression.op not in READS:
        raise FxcurvError(f"the cost of the statistic '{key}' is not known: '{expression.op}' is no reduction of rows.")
    operands = iter(READS[expression.op](sized(type_, rows), rows))
    types: list[Any] = []
    inner = Cost()
    for operand in expression.operands:
        if isinstance(operand, StateOf):
            if operand.key not in states:
                raise FxcurvError(f"the statistic '{key}' reads the state '{operand.key}', which does not exist.")
            types.append(states[operand.key])
        elif isinstance(operand, Whole):
            types.append(operand.value)
        else:
            types.append(next(operands))
            inner = inner + _rowwise(operand, types[-1])
    return OPS[expression.op].cost(type_, *types) + inner


def _rowwise(expression: Call | RowsOf | StateOf | Whole, type_: Type) -> Cost:
    """Cost of the ops between the rows and their reduction, taken to keep the rows' size."""
    if not isinstance(expression, Call):
        return Cost()
    op = OPS[expression.op]
    if Trait.ROWWISE not in op.traits:
        raise FxcurvError(f"'{expression}' inside a statistic is not computed row by row.")
    cost = op.cost(type_, type_)
    for operand in expression.operands:
        cost = cost + _rowwise(operand, type_)
    return cost
