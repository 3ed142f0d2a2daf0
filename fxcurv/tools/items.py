"""What there is to pay for in a transformed model: each node of its program and each statistic of its taps."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxcurv.capture import Call
from fxcurv.capture.shapes import propagate
from fxcurv.ir.cost import state_types, statistic_cost
from fxcurv.ir.op import OPS
from fxcurv.ir.program import STATISTICS, Program, op_of
from fxcurv.ir.statistic import Call as Reduction
from fxcurv.ir.statistic import RowsOf, leaves
from fxcurv.ir.types import Tensor, Type
from fxcurv.layers.tap import TapSpec, pattern
from fxcurv.passes.defer import DeferredTap
from fxcurv.passes.tap import BoundTap, Tapped
from fxcurv.runtime.describe import reachable
from fxcurv.runtime.module import CurvatureModule
from fxcurv.tools.execute import Executed, Executor
from fxcurv.tools.recorder import Work


@dataclass(frozen=True)
class Item:
    """One node, or one statistic at one use.

    name: of the node, or the statistic's key. op: what it does. owners: layers (or parameters) that it works for.
    cadence: when. executed: what one evaluation costs; times: evaluations each time.
    """

    name: str
    op: str
    owners: tuple[str, ...]
    cadence: str
    executed: Executed
    times: int = 1

    @property
    def works(self) -> tuple[Work, ...]:
        """All works of one time the cadence is due."""
        return self.executed.works * self.times


_CALL = re.compile(r"^    (\w+) = \w+\(", re.MULTILINE)


def node_items(module: CurvatureModule, executor: Executor) -> dict[fx.Node, Item]:
    """The items of the program's nodes that some step evaluates: others only say how values are put together."""
    lowered = module._engine.lowered
    slices = [lowered.slice(due, bundled=True) for due in reachable(lowered.program.cadences)]
    evaluated = {name for piece in slices for name in _CALL.findall(piece.source)}
    found = {}
    for node in lowered.program.nodes:
        if node.target is operator.getitem or node.target is OPS["on_due"] or node.name not in evaluated:
            continue
        executed = executor.node(node, lowered.kernels[node.name], lowered.functions[node.name])
        found[node] = Item(node.name, op_of(node).name, tuple(node.meta["owner"]), node.meta["every"], executed)
    return found


def tap_items(module: CurvatureModule, executor: Executor, columns: int) -> list[Item]:
    """The items of the statistics that taps measure, at every use of a layer.

    columns: backward passes of the source; a statistic of inputs alone is measured in the first of them only.
    """
    compilation = module._engine.compilation
    call: Call = compilation.options["call"]
    if compilation.captured is None or compilation.tapped is None:
        return []
    propagate(compilation.captured, module._engine.model, call.leaves)
    found: list[Item] = []
    for part, tapped in zip(compilation.captured.graphs, compilation.tapped.graphs, strict=False):
        shapes = {node.name: node.meta for node in part.graph.nodes}
        found += _graph_items(tapped, shapes, module.program, executor, max(1, columns))
    return found


def _graph_items(
    tapped: Tapped, shapes: dict[str, dict[str, Any]], program: Program, executor: Executor, columns: int
) -> Iterator[Item]:
    """The items of one tapped graph; taps that are reduced together are one item for each of their statistics."""
    states, types = state_types(program), {role.key: n.meta["type"] for role, n in program.inputs("stat").items()}
    groups: dict[Any, list[fx.Node]] = {}
    for node in tapped.graph.nodes:
        if isinstance(node.target, BoundTap):
            groups.setdefault(_together(node, shapes), []).append(node)
    for nodes in groups.values():
        spec = _spec(nodes[0])
        operands = [_type(shapes.get(arg.name, {})) for arg in _operands(nodes[0])]
        read = [states[key] for key in spec.states]
        for index, expression in enumerate(spec.statistics):
            keys = [tapped.taps[node.name][index] for node in nodes]
            executed = _measured(spec, index, operands, read, executor)
            if executed is None:
                cost = statistic_cost(keys[0], types[keys[0]], states, executor.rows)
                executed = Executed((Work("product", cost.flops, cost.bytes, types[keys[0]].dtype, 1.0),))
            if len(nodes) > 1:
                executed = replace(executed, works=tuple(_wider(work, len(nodes)) for work in executed.works))
            read_there = [leaf for node in nodes for leaf in leaves(_spec(node).statistics[index])]
            rows = [leaf for leaf in read_there if isinstance(leaf, RowsOf)]
            often = columns if any(leaf.side[0] == "g" for leaf in rows) else 1
            name = expression.op if isinstance(expression, Reduction) else "rows"
            yield Item(keys[0], name, tuple(dict.fromkeys(r.layer for r in rows)), STATISTICS, executed, often)


def _operands(node: fx.Node) -> list[fx.Node]:
    """(y, x, aux...) of a tap."""
    given: Any = node.args[1:] if isinstance(node.target, DeferredTap) else node.args
    return list(given[: 2 + _spec(node).aux])


def _spec(node: fx.Node) -> TapSpec:
    """What a tap's node measures."""
    assert isinstance(node.target, BoundTap)
    return node.target.spec


def _together(node: fx.Node, shapes: dict[str, dict[str, Any]]) -> Any:
    """Equal for taps whose statistics are reduced in one go: small ones of one kind that the pass 'defer' chose."""
    target: Any = node.target
    y = shapes.get(_operands(node)[0].name, {}).get("shape")
    if not isinstance(target, DeferredTap) or y is None or math.prod(y) > target.elements:
        return node
    return target.kind, y


def _wider(work: Work, count: int) -> Work:
    return replace(work, flops=count * work.flops, bytes=count * work.bytes)


def _measured(
    spec: TapSpec, index: int, operands: list[Type | None], read: list[Type], executor: Executor
) -> Executed | None:
    """One statistic on operands (y, x, aux...) of known types; ``None`` where one is unknown or nothing can run it."""
    if any(one is None for one in operands):
        return None
    y, x, *aux = operands
    key = ("tap", spec.form, pattern(spec.statistics[index]), spec.kernels, y, x, tuple(aux), tuple(read))
    return executor.call(key, lambda x, g, extra: spec.measure(index, x, g, tuple(extra)), [x, y, [*aux, *read]])


def _type(meta: dict[str, Any]) -> Type | None:
    return Tensor(meta["shape"], meta.get("dtype", torch.float32)) if "shape" in meta else None
