"""tap: insert into the forward graph exactly the slots that the program still reads.

The program's statistic inputs say what to measure; the detected layers say where. Every use of a layer gets at most one
tap node, on the product itself, with one slot for each statistic. A slot of a reduction is shared by all uses of the
layer (autograd sums); rows that no pass could reduce get a slot for each use, whose gradients are concatenated.
The size of such a slot is known only when the forward runs: the graph's input is then a function that makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any, ClassVar

import torch
from torch import fx

import fxcurv.layers.reductions  # noqa: F401  (registers the reductions that need no rows)
from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS
from fxcurv.ir.program import Program
from fxcurv.ir.statistic import RowsOf, StateOf, evaluate, leaves, parse_statistic
from fxcurv.ir.types import Rows, Type
from fxcurv.kernels.registry import preferred, select
from fxcurv.layers.keep import LINEAR, KeptLinear, linear_arguments
from fxcurv.layers.layer import Layer, Use
from fxcurv.layers.tap import TapSpec, tap
from fxcurv.passes.manager import Compilation, Pass


@dataclass(frozen=True)
class Slot:
    """One leaf whose gradient is a statistic. shape is ``None`` for rows, whose size is known when the forward runs."""

    key: str
    shape: tuple[int, ...] | None
    dtype: torch.dtype


@dataclass
class Tapped:
    """The forward graph with taps. Its placeholders are the slots, then the states, then the user's inputs.

    rest: the graphs after this one, where plain Python divides the forward. unmeasured: where
    rows are kept in place of weight gradients, the graph for steps without statistics; the first input of either is
    then what keeps them (see :mod:`fxcurv.layers.keep`). deferred: whether some taps note what to reduce later; the
    first input of all is then what they note it with (see :mod:`fxcurv.passes.defer`).
    """

    graph: fx.Graph
    slots: tuple[Slot, ...]
    states: tuple[str, ...]
    taps: dict[str, tuple[str, ...]] = field(default_factory=dict)  # statistics by tap node name
    rest: tuple[Tapped, ...] = ()
    unmeasured: fx.Graph | None = None
    deferred: bool = False

    @property
    def graphs(self) -> tuple[Tapped, ...]:
        """All graphs of the forward in the order in which they were first run."""
        return (self, *self.rest)

    def text(self) -> str:
        """The graph, or all graphs, as readable code."""
        return "".join(str(tapped.graph.python_code("self").src) for tapped in self.graphs)

    def __str__(self) -> str:
        return self.text()


class BoundTap:
    """A tap with its specification, callable from a graph."""

    def __init__(self, spec: TapSpec) -> None:
        self.spec = spec
        self.__name__ = "tap"

    def __call__(self, y: torch.Tensor, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        extras = rest[: self.spec.aux + len(self.spec.states)]
        slots = rest[len(extras) :]
        if any(callable(slot) for slot in slots):
            slots = tuple(
                slot(self._rows_like(self.spec.statistics[i], y, x, extras)) if callable(slot) else slot
                for i, slot in enumerate(slots)
            )
        return tap(self.spec, y, x, *extras, *slots)

    def _rows_like(self, side: Any, y: torch.Tensor, x: torch.Tensor, extras: tuple[torch.Tensor, ...]) -> torch.Tensor:
        with torch.no_grad():
            form = self.spec.form
            return form.rows_a(x, *extras[: self.spec.aux]) if side.side[0] == "a" else form.rows_g(y)


@dataclass(frozen=True)
class TapPass(Pass):
    """Copies the captured graph and adds the taps."""

    name: ClassVar[str] = "tap"
    needs: ClassVar[tuple[str, ...]] = ("program", "captured", "facts")

    def run(self, c: Compilation) -> int:
        assert c.program is not None and c.captured is not None
        backend = c.options.get("backend") or "auto"
        c.tapped, *rest = (insert_taps(part.graph, c.layers, c.program, backend) for part in c.captured.graphs)
        c.tapped.rest = tuple(rest)
        return sum(len(tapped.taps) for tapped in c.tapped.graphs)


def wanted(program: Program) -> dict[str, tuple[Any, Any]]:
    """Statistics that taps have to deliver, by key: the expression and its type."""
    found = {}
    for role, node in program.inputs("stat").items():
        expression = parse_statistic(role.key)
        if expression is not None:
            found[role.key] = (expression, node.meta["type"])
    return found


def insert_taps(
    captured: fx.Graph,
    layers: tuple[Layer, ...],
    program: Program,
    backend: str = "auto",
    partial: bool = False,
    measure: bool = True,
) -> Tapped:
    """A copy of the graph with a tap on every use that a wanted statistic reads.

    partial: a call of another kind may leave out layers; without it a missing one raises :class:`FxcurvError`.
    measure: False for the graph of steps without statistics, in which only products with kept rows are replaced.
    """
    statistics = wanted(program) if measure else {}
    types = {key: node.meta["type"] for role, node in program.inputs("state").items() for key in role.keys}
    by_layer: dict[str, list[str]] = {}
    for key, (expression, _) in statistics.items():
        by_layer.setdefault(_home(expression), []).append(key)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(captured, copies)
    output_node = captured.output_node()
    graph.output(output, output_node.type)
    tapped = Tapped(graph, (), ())
    slots: list[Slot] = []
    states: dict[str, fx.Node] = {}
    with graph.inserting_before(next(iter(graph.nodes))):
        anchor = graph.placeholder("fxcurv_anchor")
    if keep_rows(graph, copies, layers, program, anchor) and measure:
        tapped.unmeasured = insert_taps(captured, layers, program, backend, partial, measure=False).graph
    known = {layer.name: layer for layer in layers}
    for name, keys in by_layer.items():
        if name not in known and partial:
            continue
        if name not in known:
            raise FxcurvError(f"the program wants statistics of a layer '{name}' that this model does not have.")
        shared: dict[str, fx.Node] = {}
        for use in known[name].uses:
            if use.y not in copies:  # in another graph of a forward in pieces
                continue
            mine = [key for key in keys if _reads_swapped(statistics[key][0]) == use.swapped]
            if not mine:
                continue
            operands: list[fx.Node] = []
            for key in mine:
                expression, type_ = statistics[key]
                rows = isinstance(expression, RowsOf)
                if key not in shared or rows:
                    with graph.inserting_before(anchor):
                        shared[key] = graph.placeholder(f"slot_{len(slots)}")
                    slots.append(Slot(key, None if rows else tuple(type_.shape), type_.dtype))
                operands.append(shared[key])
            expressions = tuple(statistics[key][0] for key in mine)
            read = list(dict.fromkeys(leaf.key for e in expressions for leaf in leaves(e) if isinstance(leaf, StateOf)))
            for state in read:
                if state not in states:
                    with graph.inserting_after(anchor):
                        states[state] = graph.placeholder(f"state_{len(states)}")
            dtypes = tuple(statistics[key][1].dtype for key in mine)
            kernels = _kernels(expressions, dtypes, use, types, backend)
            spec = TapSpec(use.form, expressions, len(use.aux), tuple(read), kernels, preferred(backend))
            node = _insert(graph, copies, use, spec, [states[state] for state in read], operands)
            tapped.taps[node.name] = tuple(mine)
    graph.erase_node(anchor)
    order = [node.name for node in graph.nodes if node.op == "placeholder"]
    tapped.slots = tuple(slots)
    tapped.states = tuple(sorted(states, key=lambda key: order.index(states[key].name)))
    graph.lint()
    return tapped


def keep_rows(
    graph: fx.Graph,
    copies: dict[fx.Node, fx.Node],
    layers: tuple[Layer, ...],
    program: Program,
    first: fx.Node,
) -> bool:
    """Replace the products of layers whose gradient the program reads as rows; returns whether there is any.

    The graph's first input is then what keeps the rows, or ``None`` for ordinary weight gradients.
    """
    kept = {role.key.rpartition(".")[0] for role in program.inputs("rows")}
    products = {layer.name: copies.get(layer.uses[0].y) for layer in layers if layer.name in kept}
    # A call of another kind may spell a product otherwise; it then has an ordinary gradient.
    chosen = [
        layer
        for layer in layers
        if (y := products.get(layer.name)) is not None and (y.op == "call_module" or y.target in LINEAR)
    ]
    if not chosen:
        return False
    with graph.inserting_before(first):
        keep = graph.placeholder("keep")
    for layer in chosen:
        use = layer.uses[0]
        y = copies[use.y]
        with graph.inserting_before(y):
            whole = y.op == "call_module"
            operands = (y.args[0], graph.get_attr(str(y.target))) if whole else linear_arguments(y)
            node = graph.call_function(KeptLinear(layer.name), (keep, *operands))
        y.replace_all_uses_with(node)
        graph.erase_node(y)
        copies[use.y] = node
    return True


def _insert(
    graph: fx.Graph,
    copies: dict[fx.Node, fx.Node],
    use: Use,
    spec: TapSpec,
    states: list[fx.Node],
    slots: list[fx.Node],
) -> fx.Node:
    y, x = copies[use.y], copies[use.x]
    with graph.inserting_after(y):
        node = graph.call_function(BoundTap(spec), (y, x, *(copies[a] for a in use.aux), *states, *slots))
    y.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    return node


def _kernels(
    expressions: tuple[Any, ...], dtypes: tuple[torch.dtype, ...], use: Use, states: dict[str, Type], backend: str
) -> tuple[tuple[tuple[int, int], Callable[..., Any]], ...]:
    """The kernels that claim the ops of a tap's statistics, by statistic and number of the call in it."""
    form, chosen = use.form, {}
    for index, expression in enumerate(expressions):
        calls = count()

        def read(leaf: RowsOf | StateOf, dtype: torch.dtype = dtypes[index]) -> Type:
            if isinstance(leaf, StateOf):
                return states[leaf.key]
            return Rows((None, None, form.groups, form.d_in if leaf.side[0] == "a" else form.d_out), dtype)

        def apply(op: str, operands: list[Any], index: int = index, calls: Iterator[int] = calls) -> Any:
            place, result = (index, next(calls)), OPS[op].infer(*operands)
            kernel = None if backend == "reference" else select(op, result, operands, backend)
            if kernel is not None:
                chosen[place] = kernel.run
            return result

        evaluate(expression, read, apply)
    return tuple(chosen.items())


def _home(expression: Any) -> str:
    """The layer whose taps measure an expression: that of its output-gradient rows, else of its input rows."""
    rows = [leaf for leaf in leaves(expression) if isinstance(leaf, RowsOf)]
    return next((leaf.layer for leaf in rows if leaf.side[0] == "g"), rows[0].layer)


def _reads_swapped(expression: Any) -> bool:
    return any(isinstance(leaf, RowsOf) and leaf.side.endswith("2") for leaf in leaves(expression))
