"""Graph networks of every convolution, and the graphs that they run on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric import nn as gnn
from torch_geometric.utils import add_self_loops, degree

NODES, EDGES, INPUTS, HIDDEN, CLASSES, EDGE_FEATURES = 10, 26, 4, 6, 3, 2


def graph(nodes: int = NODES, edges: int = EDGES) -> tuple[Tensor, Tensor]:
    """Node features and edges, self loops and repeated edges among them; the last node has no neighbour."""
    return torch.randn(nodes, INPUTS), torch.randint(0, nodes - 1, (2, edges))


class Net(nn.Module):
    """Two convolutions; further arguments (weights or features of edges) go to both."""

    def __init__(self, first: nn.Module, second: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.second, self.dropout = first, second, dropout

    def forward(self, x: Tensor, edge_index: Tensor, *edges: Tensor) -> Tensor:
        x = F.dropout(F.relu(self.first(x, edge_index, *edges)), self.dropout, self.training)
        return F.log_softmax(self.second(x, edge_index, *edges), dim=1)


class Residual(nn.Module):
    """A GCN2Conv between two linear layers."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, CLASSES)
        self.conv = gnn.GCN2Conv(HIDDEN, alpha=0.1, theta=0.5, layer=1, **options)

    def forward(self, x: Tensor, edge_index: Tensor, *edges: Tensor) -> Tensor:
        first = F.relu(self.encode(x))
        return self.decode(self.conv(first, first, edge_index, *edges))


class Classifier(nn.Module):
    """One prediction for each graph of a batch."""

    def __init__(self, pool: Any = gnn.global_mean_pool) -> None:
        super().__init__()
        self.first, self.second = gnn.GraphConv(INPUTS, HIDDEN), gnn.GCNConv(HIDDEN, HIDDEN)
        self.graph_norm, self.batch_norm = gnn.GraphNorm(HIDDEN), gnn.BatchNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)
        self.pool = pool

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        x = self.graph_norm(self.first(x, edge_index), batch).relu()
        x = self.batch_norm(self.second(x, edge_index)).relu()
        return self.head(self.pool(x, batch))


class Pooled(nn.Module):
    """Graph classification with half of the nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = gnn.GraphConv(INPUTS, HIDDEN), gnn.TopKPooling(HIDDEN, 0.5)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        x = self.conv(x, edge_index).relu()
        x, _, _, batch, _, _ = self.pool(x, edge_index, batch=batch)
        return self.head(gnn.global_mean_pool(x, batch))


class Keeps(gnn.GCNConv):
    """A convolution that keeps its output on itself."""

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        self.last = super().forward(x, edge_index)
        return self.last


class HandWritten(gnn.MessagePassing):
    """A convolution of the user's own that normalises by itself."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(aggr="add")
        self.lin = nn.Linear(inputs, outputs, bias=False)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        edge_index, weight = add_self_loops(edge_index, num_nodes=x.size(0))
        if weight is None:
            weight = x.new_ones(edge_index.size(1))
        row, col = edge_index
        scale = degree(col, x.size(0), dtype=x.dtype).pow(-0.5)
        scale[scale == float("inf")] = 0
        return self.propagate(edge_index, x=self.lin(x), norm=scale[row] * weight * scale[col]) + self.bias

    def message(self, x_j: Tensor, norm: Tensor) -> Tensor:
        return norm.view(-1, 1) * x_j


class EdgeNetwork(gnn.MessagePassing):
    """A convolution of the user's own whose messages are a network: its rows are edges."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(aggr="max")
        self.net = mlp(2 * inputs, outputs)

    def forward(self, x: Tensor | tuple[Tensor, Tensor], edge_index: Tensor) -> Tensor:
        if isinstance(x, Tensor):
            x = (x, x)
        return self.propagate(edge_index, x=x)

    def message(self, x_i: Tensor, x_j: Tensor) -> Tensor:
        return self.net(torch.cat([x_i, x_j - x_i], dim=1))


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    """Two linear layers."""
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, outputs))


def pair(conv: Any, first: dict[str, Any] | None = None, second: dict[str, Any] | None = None) -> Callable[[], Net]:
    """Two convolutions of one class; the second takes what several concatenated heads of the first give."""
    first, second = first or {}, second or {}
    width = HIDDEN * (first.get("heads", 1) if first.get("concat", True) else 1)
    return lambda: Net(conv(INPUTS, HIDDEN, **first), conv(width, CLASSES, **second))


EDGE_ATTR = {"edge_dim": EDGE_FEATURES}
STACKS = {"num_stacks": 2, "num_layers": 2}
CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "gcn": (pair(gnn.GCNConv), ""),
    "gcn weighted": (pair(gnn.GCNConv, {"improved": True}, {"bias": False}), "weight"),
    "gcn cached": (pair(gnn.GCNConv, {"cached": True}, {"cached": True}), ""),
    "gcn unnormalised": (pair(gnn.GCNConv, {"add_self_loops": False}, {"normalize": False}), "weight"),
    "sage mean": (pair(gnn.SAGEConv), ""),
    "sage project": (pair(gnn.SAGEConv, {"aggr": "max", "project": True}, {"aggr": "sum", "normalize": True}), ""),
    "sage several": (pair(gnn.SAGEConv, {"aggr": ["mean", "max", "std"]}, {"root_weight": False}), ""),
    "gat": (pair(gnn.GATConv, {"heads": 2}, {"heads": 2, "concat": False}), ""),
    "gat edges": (pair(gnn.GATConv, {"heads": 2, "residual": True, **EDGE_ATTR}, EDGE_ATTR), "features"),
    "gatv2": (pair(gnn.GATv2Conv, {"heads": 2, "concat": False}, {"share_weights": True}), ""),
    "gatv2 edges": (pair(gnn.GATv2Conv, {"heads": 2, **EDGE_ATTR}, {"residual": True, **EDGE_ATTR}), "features"),
    "graph": (pair(gnn.GraphConv, {}, {"aggr": "mean"}), "weight"),
    "gin": (lambda: Net(gnn.GINConv(mlp(INPUTS, HIDDEN), train_eps=True), gnn.GINConv(mlp(HIDDEN, CLASSES))), ""),
    "gine": (
        lambda: Net(gnn.GINEConv(mlp(INPUTS, HIDDEN), **EDGE_ATTR), gnn.GINEConv(mlp(HIDDEN, CLASSES), **EDGE_ATTR)),
        "features",
    ),
    "chebyshev": (pair(gnn.ChebConv, {"K": 3}, {"K": 1}), "weight"),
    "tag": (pair(gnn.TAGConv, {"K": 2}, {"K": 1, "normalize": False}), "weight"),
    "sg": (pair(gnn.SGConv, {"K": 2}, {"K": 1, "cached": True}), ""),
    "arma": (
        pair(
            gnn.ARMAConv, {"num_stacks": 2, "num_layers": 2}, {"num_stacks": 2, "num_layers": 2, "shared_weights": True}
        ),
        "",
    ),
    "transformer": (pair(gnn.TransformerConv, {"heads": 2}, {"beta": True}), ""),
    "transformer edges": (pair(gnn.TransformerConv, {"beta": True, **EDGE_ATTR}, EDGE_ATTR), "features"),
    "gcn2": (Residual, ""),
    "gcn2 two weights": (lambda: Residual(shared_weights=False), "weight"),
    "edge": (lambda: Net(gnn.EdgeConv(mlp(2 * INPUTS, HIDDEN)), gnn.EdgeConv(mlp(2 * HIDDEN, CLASSES))), ""),
    "hand-written": (pair(HandWritten), ""),
    "edge network": (pair(EdgeNetwork), ""),
    "library gcn": (lambda: gnn.GCN(INPUTS, HIDDEN, 2, CLASSES), ""),
    "library gat": (lambda: gnn.GAT(INPUTS, HIDDEN, 2, CLASSES, v2=True, heads=2, jk="cat"), ""),
    "library gin": (lambda: gnn.GIN(INPUTS, HIDDEN, 2, CLASSES, norm="batch_norm"), ""),
}
"""Networks by name, and what they take of the edges: "weight", "features" or nothing."""


def arguments(name: str, nodes: int = NODES, edges: int = EDGES) -> tuple[Tensor, ...]:
    """The inputs of a network of ``CONVOLUTIONS``."""
    extra = {"weight": (torch.rand(edges) + 0.1,), "features": (torch.randn(edges, EDGE_FEATURES),), "": ()}
    return (*graph(nodes, edges), *extra[CONVOLUTIONS[name][1]])
