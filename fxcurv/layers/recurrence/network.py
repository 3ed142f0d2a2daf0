"""Layers, directions and dropout between layers: the nodes of a whole recurrent network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxcurv.layers.expose import Exposure
from fxcurv.layers.recurrence import sequence
from fxcurv.layers.recurrence.strands import Kind, Strand, Weights

Node = fx.Node


@dataclass(frozen=True)
class Network:
    """A recurrent network at one place of the graph.

    x: the sequence, (T, B, d). hx: nodes of the user's initial states (layers * directions, B, size), one a state, or
    ``None``. sizes: their features. dropout: probability between layers, 0 outside training. packed: the node of the
    packed sequence where the user gave one. lengths: the node of its batch sizes.
    """

    at: Exposure
    kind: Kind
    x: Node
    hx: tuple[Any, ...]
    sizes: tuple[Any, ...]
    dropout: float = 0.0
    packed: Node | None = None
    lengths: Node | None = None

    def nodes(self, layers: Sequence[Sequence[Weights]]) -> tuple[Node, list[list[Node]]]:
        """Outputs (T, B, directions * R) of the last layer, and by state the last values of all layers and directions.

        layers: by layer and direction.
        """
        at, x = self.at, self.x
        mask = None if self.lengths is None else at.call(sequence.steps_of, x, self.lengths)
        last: list[list[Node]] = [[] for _ in range(self.kind.states)]
        for depth, directions in enumerate(layers):
            outs = []
            for direction, weights in enumerate(directions):
                index = depth * len(directions) + direction
                source = at.call(sequence.reverse, x, self.lengths) if direction else x
                states = tuple(
                    at.call(sequence.initial, x, hx, index, size, self.packed)
                    for hx, size in zip(self.hx, self.sizes, strict=True)
                )
                made = self.kind.nodes(Strand(at, source, states, weights, self.lengths, mask))
                out, *ends = at.items(made, 1 + self.kind.states)
                outs.append(at.call(sequence.reverse, out, self.lengths) if direction else out)
                for values, end in zip(last, ends, strict=True):
                    values.append(end)
            x = outs[0] if len(outs) == 1 else at.call(torch.cat, outs, -1)
            if self.dropout and depth + 1 < len(layers):
                x = at.call(sequence.dropout, x, self.dropout, self.lengths)
        return x, last
