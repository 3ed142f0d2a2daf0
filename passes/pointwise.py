"""pointwise: chains of point-wise ops become one op, which a generated kernel computes in one walk over memory.

The tail of an optimizer (averages, bias correction, division, scale) reads and writes every number a dozen times and
starts a launch for each step. Neighbours with the same shape and cadence are joined where nothing outside lies between
them; the op that takes their place lists its parts, so the program still says what it does and prints and parses.

It pays on a GPU, where the parts would be launches: the pass does nothing unless generated kernels are there to run
its op. On one CPU core, Adam's tail compiled by Inductor takes 1.2 times as long as its parts for 32 x 32
numbers, 0.65 for 256 x 256 and 0.27 for 1000 x 784, after a minute of compiling for each new tail; cut into pieces that
stay in the cache 2.5, 2.3 and 0.8. Neither is worth it where products of matrices are most of a step.
"""

from __future__ import annotations

import heapq
import operator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from fxcurv.ir.op import OPS
from fxcurv.ir.program import infer, operand_types
from fxcurv.ir.types import Scalar
from fxcurv.kernels.registry import preferred
from fxcurv.passes.manager import Compilation, Pass

ARITHMETIC = frozenset({"add", "sub", "mul", "div", "square", "sqrt", "neg", "copy", "scale"})
FUSIBLE = ARITHMETIC | {"mean", "damped_divide", "ema", "moving", "ema_scaled", "ema_mean"}
"""Ops that may be part of a chain; each has a line in ``fxcurv.kernels.triton.pointwise``."""
MOST = 24
"""Operands and results of one chain."""


@dataclass(frozen=True)
class Pointwise(Pass):
    """Joins chains of at least ``least`` ops. always: also where no generated kernels will run them."""

    least: int = 2
    always: bool = False
    name: ClassVar[str] = "pointwise"

    def run(self, c: Compilation) -> int:
        assert c.program is not None
        if not self.always and "triton" not in preferred(c.options.get("backend") or "auto"):
            return 0
        graph = c.program.graph
        factors: dict[Any, fx.Node] = {}
        for node in [node for node in graph.nodes if node.target is OPS["bias_correct"]]:
            if _is_full(node) and node.meta["type"].dtype == torch.float32 and c.spend():
                _split_bias(graph, node, factors)
        chains = [chain for chain in _chains(list(c.program.nodes)) if len(chain) >= self.least]
        chains = [chain for chain in _acyclic(graph, chains) if _fits(chain) and c.spend()]
        for chain in chains:
            _join(graph, chain)
        if chains:
            _sort(graph)
        return len(chains)


def _is_full(node: fx.Node) -> bool:
    type_ = node.meta["type"]
    return not isinstance(type_, (tuple, Scalar)) and bool(type_.shape) and None not in type_.shape


def _split_bias(graph: fx.Graph, node: fx.Node, factors: dict[Any, fx.Node]) -> None:
    """bias_correct(x, beta, k) is a division by a number that all parameters share, by its operands in ``factors``."""
    x, beta, k = node.args
    type_, every = node.meta["type"], node.meta["every"]
    if not isinstance(k, fx.Node) or infer(OPS["div"], [type_, Scalar((), torch.float32)]) != type_:
        return
    with graph.inserting_before(node):
        factor = factors.get((beta, k, every)) or graph.call_function(OPS["bias_factor"], (beta, k))
        divided = graph.call_function(OPS["div"], (x, factor))
    factors[beta, k, every] = factor
    factor.meta.update(type=infer(factor.target, operand_types(factor)), every=every, owner=())
    divided.meta.update(node.meta)
    node.replace_all_uses_with(divided)
    graph.erase_node(node)


def _joinable(node: fx.Node) -> bool:
    """A known op on float32 values of one shape and scalars."""
    known = getattr(node.target, "name", "") in FUSIBLE and _is_full(node)
    if not known or node.meta.get("into") or node.meta.get("view"):
        return False
    shape = node.meta["type"].shape
    for operand in node.all_input_nodes:
        type_ = operand.meta["type"]
        if isinstance(type_, tuple) or type_.dtype != torch.float32:
            return False
        if type_.shape != shape and not (isinstance(type_, Scalar) and type_.shape == shape[: len(type_.shape)]):
            return False
    return bool(node.meta["type"].dtype == torch.float32)


def _chains(nodes: list[fx.Node]) -> list[list[fx.Node]]:
    """Connected ops of one shape and cadence that no other op lies between, in order."""
    order = {node: place for place, node in enumerate(nodes)}
    before: dict[fx.Node, int] = {}  # what a value needs, as a set of bits
    for node in nodes:
        needs = 0
        for operand in node.all_input_nodes:
            if operand in order:
                needs |= before[operand] | 1 << order[operand]
        before[node] = needs
    chain_of: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        if not _joinable(node):
            continue
        chain_of[node] = [node]
        for operand in node.all_input_nodes:
            near = chain_of.get(operand)
            if near is None or near is chain_of[node] or _kind(near[0]) != _kind(node):
                continue
            together = near + chain_of[node]
            inside = sum(1 << order[member] for member in together)
            outside = (x for member in together for x in member.all_input_nodes if x in order and x not in together)
            if not any(before[x] & inside for x in outside):
                together.sort(key=order.__getitem__)
                chain_of.update(dict.fromkeys(together, together))
    return list({id(chain): chain for chain in chain_of.values()}.values())


def _kind(node: fx.Node) -> tuple[Any, str]:
    return node.meta["type"].shape, node.meta["every"]


def _acyclic(graph: fx.Graph, chains: list[list[fx.Node]]) -> list[list[fx.Node]]:
    """The chains without those that would wait for one another."""
    while True:
        head = {node: chain[0] for chain in chains for node in chain}
        stuck = _unsorted(graph, head)
        left = [chain for chain in chains if chain[0] not in stuck]
        if len(left) == len(chains):
            return chains
        chains = left


def _unsorted(graph: fx.Graph, head: dict[fx.Node, fx.Node]) -> set[fx.Node]:
    """Units (nodes, or chains by their heads) that wait for themselves."""
    waits: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        unit = head.get(node, node)
        waits.setdefault(unit, set()).update({head.get(x, x) for x in node.all_input_nodes} - {unit})
    readers: dict[fx.Node, list[fx.Node]] = {}
    for unit, needs in waits.items():
        for need in needs:
            readers.setdefault(need, []).append(unit)
    ready = [unit for unit, needs in waits.items() if not needs]
    count = {unit: len(needs) for unit, needs in waits.items()}
    done = set(ready)
    while ready:
        for reader in readers.get(ready.pop(), ()):
            count[reader] -= 1
            if not count[reader]:
                ready.append(reader)
                done.add(reader)
    return set(waits) - done


def _read_outside(chain: list[fx.Node]) -> list[fx.Node]:
    return [node for node in chain if any(user not in chain for user in node.users)]


def _operands_of(chain: list[fx.Node]) -> list[fx.Node]:
    return list(dict.fromkeys(x for node in chain for x in node.all_input_nodes if x not in chain))


def _fits(chain: list[fx.Node]) -> bool:
    """Whether a kernel can take the chain: a full value to begin with, and not too many of anything."""
    operands = _operands_of(chain)
    shape = chain[0].meta["type"].shape
    return any(x.meta["type"].shape == shape for x in operands) and len(operands) + len(_read_outside(chain)) <= MOST


def _join(graph: fx.Graph, chain: list[fx.Node]) -> None:
    """Put one op in the place of a chain, at its end; the graph is sorted later."""
    operands, kept = _operands_of(chain), _read_outside(chain)
    number = {node: place for place, node in enumerate([*operands, *chain])}

    def text(value: Any) -> str:
        return f"x{number[value]}" if isinstance(value, fx.Node) else repr(value)

    steps = [f"{node.target.name}({', '.join(map(text, node.args))})" for node in chain]  # type: ignore[union-attr]
    owners = tuple(dict.fromkeys(owner for node in chain for owner in node.meta["owner"]))
    with graph.inserting_after(chain[-1]):
        joined = graph.call_function(OPS["pointwise"], (operands, steps, [number[node] for node in kept]))
    types = tuple(replace(node.meta["type"]) for node in kept)
    joined.meta.update(type=types, every=chain[0].meta["every"], owner=owners)
    after = joined
    for place, node in enumerate(kept):
        with graph.inserting_after(after):
            after = graph.call_function(operator.getitem, (joined, place))
        after.meta.update(type=node.meta["type"], every=node.meta["every"], owner=node.meta["owner"])
        node.replace_all_uses_with(after, delete_user_cb=lambda user: user not in chain)
    for node in reversed(chain):
        graph.erase_node(node)


def _sort(graph: fx.Graph) -> None:
    """Bring nodes into an order in which operands come first, changing as little as possible."""
    nodes = list(graph.nodes)
    place = {node: k for k, node in enumerate(nodes)}
    count = {node: len(node.all_input_nodes) for node in nodes}
    ready = [place[node] for node in nodes if not count[node]]
    heapq.heapify(ready)
    order: list[fx.Node] = []
    while ready:
        node = nodes[heapq.heappop(ready)]
        order.append(node)
        for user in node.users:
            count[user] -= 1
            if not count[user]:
                heapq.heappush(ready, place[user])
    for before, node in zip(order, order[1:], strict=False):
        if before.next is not node:
            before.append(node)
