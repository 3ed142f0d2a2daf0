"""Memory of a slice from types: what is alive at each of its nodes, with the room that a kernel needs while it runs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from fxcurv.passes.lower import Lowered, resolve
from fxcurv.tools.items import Item


def slice_peak(lowered: Lowered, items: Mapping[fx.Node, Item], due: frozenset[str]) -> int:
    """Most bytes that a slice's own values need at once, beyond its inputs, which the caller holds."""
    live = nodes_of(lowered, due)
    holds: dict[fx.Node, frozenset[fx.Node]] = {}  # whose new memory a value keeps alive
    for node in live:
        operands = [resolve(operand, due) for operand in node.all_input_nodes]
        if node.op == "placeholder":
            holds[node] = frozenset()
        elif node not in items:  # a part of a tuple, or of a stack that is never made
            holds[node] = frozenset().union(*(holds[operand] for operand in operands))
        else:
            own = frozenset([node]) if items[node].executed.fresh else frozenset()
            kept = [_operand_values(node, index, due) for index in items[node].executed.aliases]
            holds[node] = own.union(*(holds[value] for values in kept for value in values))
    last: dict[fx.Node, int] = {}
    for position, node in enumerate(live):
        for operand in (node, *(resolve(operand, due) for operand in node.all_input_nodes)):
            for memory in holds[operand]:
                last[memory] = position
    for value in lowered.slice(due).outputs:
        for memory in holds[resolve(lowered.program.outputs()[value], due)]:
            last[memory] = len(live)
    now = peak = 0
    ends: dict[int, int] = {}
    for position, node in enumerate(live):
        if node in items:
            executed = items[node].executed
            peak = max(peak, now + executed.peak)
            now += executed.fresh
            peak = max(peak, now)
            end = last.get(node, position)
            ends[end] = ends.get(end, 0) + executed.fresh
        now -= ends.pop(position, 0)
    return peak


def nodes_of(lowered: Lowered, due: frozenset[str]) -> list[fx.Node]:
    """The nodes that a slice evaluates or reads, operands first."""
    outputs = lowered.program.outputs()
    wanted = {resolve(outputs[role], due) for role in lowered.slice(due).outputs}
    stack = list(wanted)
    while stack:
        for operand in stack.pop().all_input_nodes:
            value = resolve(operand, due)
            if value not in wanted:
                wanted.add(value)
                stack.append(value)
    return [node for node in lowered.program.graph.nodes if node in wanted]


def _operand_values(node: fx.Node, index: int, due: frozenset[str]) -> list[fx.Node]:
    values: list[fx.Node] = []
    fx.node.map_arg(node.args[index], lambda value: values.append(resolve(value, due)))
    return values
