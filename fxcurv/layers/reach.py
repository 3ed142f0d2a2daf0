"""Which of the model's outputs depend on a layer: layers that no output has in common are trained apart.

Layers that read the same rows are measured once, in the tap of one of them. That tap runs in the backward pass of a
loss only if the loss depends on its layer; so two heads on one trunk, each with an output and a loss of its own, must
not lean on each other's measurement, while q, k and v, which meet in one output, may.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from fxcurv.layers.layer import Layer

Outputs = frozenset[fx.Node]


def outputs_of(layers: Iterable[Layer]) -> dict[str, Outputs]:
    """By the layer's name the values that the graph returns and that depend on one of its uses."""
    layers = tuple(layers)
    graphs = {use.y.graph for layer in layers for use in layer.uses}
    behind = {leaf: _ancestors(leaf) for graph in graphs for leaf in graph.output_node().all_input_nodes}
    return {
        layer.name: frozenset(leaf for leaf, nodes in behind.items() if any(use.y in nodes for use in layer.uses))
        for layer in layers
    }


def together(one: Outputs, other: Outputs) -> bool:
    """Whether a loss may be taken to depend on both layers or on neither; a layer behind no output says nothing."""
    return not one or not other or bool(one & other)


def _ancestors(leaf: fx.Node) -> set[fx.Node]:
    stack, seen = [leaf], {leaf}
    while stack:
        fresh = [source for source in stack.pop().all_input_nodes if source not in seen]
        seen.update(fresh)
        stack += fresh
    return seen
