"""The critical path of a slice: what would be left of its time if everything independent ran at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import fx

from fxcurv.passes.lower import Lowered, resolve
from fxcurv.tools.peak import nodes_of


@dataclass(frozen=True)
class CriticalPath:
    """seconds: of the longest chain of nodes that wait for each other; total: of all nodes. nodes: the chain."""

    seconds: float
    total: float
    nodes: tuple[fx.Node, ...]


def critical_path(lowered: Lowered, due: frozenset[str], weights: Mapping[fx.Node, float]) -> CriticalPath:
    """The longest path through the nodes of a slice; ``weights`` in seconds, 0 for a node that is not listed.

    Program order is topological, so one sweep suffices.
    """
    longest: dict[fx.Node, tuple[float, fx.Node | None]] = {}
    total = 0.0
    for node in nodes_of(lowered, due):
        operands = {resolve(operand, due) for operand in node.all_input_nodes}
        before = max(operands, key=_by(longest), default=None)
        weight = weights.get(node, 0.0)
        total += weight
        longest[node] = (weight + (longest[before][0] if before is not None else 0.0), before)
    if not longest:
        return CriticalPath(0.0, 0.0, ())
    end: fx.Node | None = max(longest, key=_by(longest))
    assert end is not None
    seconds, chain = longest[end][0], []
    while end is not None:
        chain.append(end)
        end = longest[end][1]
    return CriticalPath(seconds, total, tuple(reversed(chain)))


def _by(longest: Mapping[fx.Node, tuple[float, fx.Node | None]]) -> Callable[[fx.Node], float]:
    return lambda node: longest[node][0]
