"""stagger: factorisations of different layers are renewed in different steps.

Every ``solve_every`` steps all factorisations at once make one step many times slower than the others. Nothing in a
layer-wise method asks for that: what one layer's factorisation reads of another's is nothing at all. Here the refresh
is divided into its connected components, the components into groups of equal cost (the largest first, each to the group
that has least), and each group gets an offset of its own (:mod:`fxcurv.ir.schedule`). Every layer is still refreshed
every ``solve_every`` steps, all of them in the first step and when ``due(refresh=True)`` asks for it.

Results differ from those of a common refresh as they do for a shifted schedule, so this is on request
(``stagger=True``). What a method couples in its refresh is one component and stays together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxcurv.ir.cost import node_costs
from fxcurv.ir.program import REFRESH, STATISTICS, Program
from fxcurv.passes.manager import Compilation, Pass

SOURCES = ("hyper", "oracle")
"""Inputs that belong to no layer."""


@dataclass(frozen=True)
class Stagger(Pass):
    """Gives refresh nodes a shifted cadence each. groups: at most so many; 0 for as many as there are steps between."""

    groups: int = 0
    name: ClassVar[str] = "stagger"
    semantic: ClassVar[bool] = False  # other states are renewed in a step than before

    def run(self, c: Compilation) -> int:
        assert c.program is not None
        program = c.program
        offsets = offsets_of(program.cadences)
        parts = components(program)
        count = min(len(offsets), len(parts), self.groups or len(parts))
        if not c.options.get("stagger") or count < 2:
            return 0
        for node in reversed(common(program)):
            _divide(program, node, parts)
        moved = 0
        for group, offset in zip(balance(program, parts, count), _spread(offsets, count), strict=True):
            cadence = f"{REFRESH}_{offset}" if offset else REFRESH
            program.cadences[cadence] = program.cadences[REFRESH]
            if offset and not c.spend():
                continue
            for node in group:
                node.meta["every"] = cadence
            moved += bool(offset)
        return moved


def offsets_of(cadences: dict[str, int]) -> list[int]:
    """Steps of a refresh period in which a part of it may fall: after new statistics, if that leaves a choice."""
    period, statistics = cadences.get(REFRESH, 1), cadences.get(STATISTICS, 1)
    aligned = [step for step in range(period) if step % statistics == 0]
    return aligned if len(aligned) > 1 and period % statistics == 0 else list(range(period))


def refreshed(program: Program) -> list[fx.Node]:
    """Nodes that are evaluated with the refresh."""
    return [node for node in program.nodes if node.meta["every"] == REFRESH]


def common(program: Program) -> list[fx.Node]:
    """Refresh nodes that depend on no layer, only on numbers: every group computes its own."""
    found: dict[fx.Node, None] = {}
    for node in refreshed(program):
        if node.all_input_nodes and all(x in found or _is_number(x) for x in node.all_input_nodes):
            found[node] = None
    return list(found)


def _is_number(node: fx.Node) -> bool:
    return node.op == "placeholder" and node.meta["role"].kind in SOURCES


def components(program: Program) -> list[list[fx.Node]]:
    """Refresh nodes that must stay together: they read one another, or one layer's flag speaks for both."""
    shared = set(common(program))
    part_of: dict[fx.Node | str, list[fx.Node | str]] = {}  # nodes and owners -> all that they hang together with
    nodes = [node for node in refreshed(program) if node not in shared]
    for node in nodes:
        read = [x for x in node.all_input_nodes if x.meta["every"] == REFRESH and x not in shared]
        parts = [part_of.get(one, [one]) for one in (node, *read, *node.meta["owner"])]
        joined = list(dict.fromkeys(one for part in parts for one in part))
        part_of.update(dict.fromkeys(joined, joined))
    unique = {id(part): part for part in map(part_of.__getitem__, nodes)}
    return [[one for one in part if isinstance(one, fx.Node)] for part in unique.values()]


def balance(program: Program, parts: list[list[fx.Node]], count: int) -> list[list[fx.Node]]:
    """The components in ``count`` groups by longest processing time first; the costliest group comes first."""
    costs = node_costs(program)
    weight = [sum(costs[node].flops for node in part if node in costs) for part in parts]
    groups: list[tuple[float, list[fx.Node]]] = [(0.0, []) for _ in range(count)]
    for place in sorted(range(len(parts)), key=lambda k: -weight[k]):
        least = min(range(count), key=lambda k: (groups[k][0], k))
        groups[least] = groups[least][0] + weight[place], groups[least][1] + parts[place]
    return [nodes for _, nodes in groups]


def _spread(offsets: list[int], count: int) -> list[int]:
    """``count`` of the offsets, evenly."""
    return [offsets[k * len(offsets) // count] for k in range(count)]


def _divide(program: Program, node: fx.Node, parts: list[list[fx.Node]]) -> None:
    """Give every component that reads ``node`` a copy of it."""
    copies: dict[int, fx.Node] = {}
    member = {one: k for k, part in enumerate(parts) for one in part}
    for user in list(node.users):
        if user not in member:
            continue
        k = member[user]
        if k not in copies:
            with program.graph.inserting_after(node):
                copies[k] = program.graph.node_copy(node)
            owners = {owner for one in parts[k] for owner in one.meta["owner"]}
            copies[k].meta = {**node.meta, "owner": tuple(name for name in node.meta["owner"] if name in owners)}
            parts[k].append(copies[k])
            member[copies[k]] = k
        user.replace_input_with(node, copies[k])
    if not node.users:
        program.graph.erase_node(node)
