"""Bytes of an update program by owner, from the types of its values: what a layer keeps, and what it needs at once."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from fxcurv.ir.cost import sized
from fxcurv.ir.op import OPS
from fxcurv.ir.program import Program
from fxcurv.ir.types import Type


@dataclass(frozen=True)
class Memory:
    """Memory of one owner (a layer, or a parameter of a tensor-wise method), in bytes.

    states: curvature kept between steps. shared: the part of it that other owners use too. transient: the largest value
    that is made and dropped within a step.
    """

    states: int = 0
    shared: int = 0
    transient: int = 0


def memory_by_owner(program: Program, rows: int = 1) -> dict[str, Memory]:
    """Memory by owner; rows of statistics, whose number only a run knows, count as ``rows``.

    What several layers share is in the account of each.
    """
    found: dict[str, Memory] = {}
    for node in program.graph.nodes:
        kept, size = _is_state(node), _nbytes(node, rows)
        owners = tuple(_owners(node)) if kept or _is_transient(node) else ()
        for owner in owners:
            old = found.get(owner, Memory())
            if kept:
                found[owner] = Memory(old.states + size, old.shared + (size if len(owners) > 1 else 0), old.transient)
            else:
                found[owner] = Memory(old.states, old.shared, max(old.transient, size))
    return found


def largest_transient(program: Program, rows: int = 1) -> int:
    """Bytes of the largest value that is made and dropped within a step."""
    return max((_nbytes(node, rows) for node in program.graph.nodes if _is_transient(node)), default=0)


def _is_state(node: fx.Node) -> bool:
    return node.op == "placeholder" and node.meta["role"].kind == "state"


def _is_transient(node: fx.Node) -> bool:
    """Statistics, and results of ops; a switch and a part of a tuple only pass a value on."""
    if node.op == "placeholder":
        return bool(node.meta["role"].kind == "stat")
    return node.op == "call_function" and node.target not in (operator.getitem, OPS["on_due"])


def _owners(node: fx.Node) -> Iterator[str]:
    """The owners of a node; of a statistic, which has none of its own, those of the nodes that read it."""
    readers = [node] if node.meta["owner"] else list(node.users)
    yield from dict.fromkeys(owner for reader in readers for owner in reader.meta.get("owner", ()))


def _nbytes(node: fx.Node, rows: int) -> int:
    if node.op == "output":
        return 0
    type_ = sized(node.meta["type"], rows)
    parts: tuple[Type, ...] = type_ if isinstance(type_, tuple) else (type_,)
    return sum(part.nbytes for part in parts)
