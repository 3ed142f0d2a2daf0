"""Graph networks: torch_geometric's convolutions in two-layer models, its pooled and basic models, our own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.sample import Sample

LIBRARY = "torch_geometric"
NODES, WIDTH, HIDDEN, CLASSES = 10, 8, 12, 4

# Class in torch_geometric.nn: its arguments after (inputs, outputs).
_CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "GCNConv": {}, "SAGEConv": {}, "GATConv": {"heads": 2, "concat": False}, "GATv2Conv": {"heads": 2, "concat": False},
    "GraphConv": {}, "ChebConv": {"K": 3}, "TAGConv": {"K": 2}, "SGConv": {"K": 2},
    "ARMAConv": {"num_stacks": 2, "num_layers": 2},
    "TransformerConv": {"heads": 2, "concat": False}, "LEConv": {}, "ClusterGCNConv": {}, "MFConv": {},
    "FeaStConv": {"heads": 2}, "ResGatedGraphConv": {}, "SuperGATConv": {"heads": 2, "concat": False},
}  # fmt: skip


def edges() -> Tensor:
    """A ring with chords, both directions, no self-loop; shape (2, edges)."""
    pairs = [(i, (i + 1) % NODES) for i in range(NODES)] + [(0, 4), (2, 7)]
    return torch.tensor(pairs + [(j, i) for i, j in pairs]).T.contiguous()


class TwoLayers(nn.Module):
    """Two convolutions, node classes out."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        import torch_geometric.nn as tg

        self.first = getattr(tg, name)(WIDTH, HIDDEN, **options)
        self.second = getattr(tg, name)(HIDDEN, CLASSES, **options)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x, edge_index)), edge_index)


class GIN(nn.Module):
    """Isomorphism convolutions and a sum over each graph."""

    def __init__(self) -> None:
        super().__init__()
        from torch_geometric.nn import GINConv

        def mlp(inputs: int) -> nn.Module:
            return nn.Sequential(
                nn.Linear(inputs, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN)
            )

        self.first, self.second = GINConv(mlp(WIDTH), train_eps=True), GINConv(mlp(HIDDEN))
        self.out = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        from torch_geometric.nn import global_add_pool

        x = torch.relu(self.first(x, edge_index))
        x = torch.relu(self.second(x, edge_index))
        return self.out(global_add_pool(x, batch, 2))


class GCN2(nn.Module):
    """Deep graph convolutions with initial residual and identity mapping."""

    def __init__(self) -> None:
        super().__init__()
        from torch_geometric.nn import GCN2Conv

        self.enter, self.out = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, CLASSES)
        self.layers = nn.ModuleList(GCN2Conv(HIDDEN, 0.1, 0.5, layer + 1) for layer in range(3))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = first = torch.relu(self.enter(x))
        for layer in self.layers:
            x = torch.relu(layer(x, first, edge_index))
        return self.out(x)


class DenseGCN(nn.Module):
    """Adjacency as a matrix, ``adjacency @ (x @ weight)``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(WIDTH, HIDDEN) / 3), nn.Linear(HIDDEN, CLASSES)
        self.shift = nn.Parameter(torch.zeros(HIDDEN))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return adjacency @ self.second(torch.relu(adjacency @ (x @ self.first) + self.shift))


class SparseGCN(nn.Module):
    """Adjacency as a sparse matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return torch.sparse.mm(adjacency, self.second(torch.relu(torch.sparse.mm(adjacency, self.first(x)))))


class MessagePassing(nn.Module):
    """Messages by an MLP on pairs of nodes, summed with ``index_add``; a GRU cell updates the nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(WIDTH, HIDDEN)
        self.message = nn.Sequential(nn.Linear(2 * HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN))
        self.update, self.out = nn.GRUCell(HIDDEN, HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x, (source, target) = torch.relu(self.enter(x)), (edge_index[0], edge_index[1])
        for _ in range(2):
            messages = self.message(torch.cat([x[source], x[target]], 1))
            x = self.update(torch.zeros_like(x).index_add(0, target, messages), x)
        return self.out(x)


def _normalised() -> Tensor:
    index = edges()
    matrix = torch.eye(NODES)
    matrix[index[0], index[1]] = 1.0
    scale = matrix.sum(1).rsqrt()
    return scale[:, None] * matrix * scale


def _whole(name: str) -> Sample:
    """One of torch_geometric's basic models: GCN, GraphSAGE, GAT, GIN, PNA-like stacks with dropout and norm."""
    import torch_geometric.nn as tg

    model = getattr(tg, name)(WIDTH, HIDDEN, num_layers=2, out_channels=CLASSES, dropout=0.2, norm="batch")
    return Sample(model, (torch.randn(NODES, WIDTH), edges()))


_LIST: dict[str, Callable[[], Sample]] = {
    **{
        name: lambda name=name, options=options: Sample(
            TwoLayers(name, **options), (torch.randn(NODES, WIDTH), edges())
        )
        for name, options in _CONVOLUTIONS.items()
    },
    "GINConv_pooled": lambda: Sample(
        GIN(), (torch.randn(NODES, WIDTH), edges(), torch.arange(NODES).ge(NODES // 2).long())
    ),
    "GCN2Conv": lambda: Sample(GCN2(), (torch.randn(NODES, WIDTH), edges())),
    "GCN": lambda: _whole("GCN"),
    "GraphSAGE": lambda: _whole("GraphSAGE"),
    "GAT": lambda: _whole("GAT"),
    "GIN": lambda: _whole("GIN"),
    "dense_gcn": lambda: Sample(DenseGCN(), (torch.randn(NODES, WIDTH), _normalised())),
    "sparse_gcn": lambda: Sample(SparseGCN(), (torch.randn(NODES, WIDTH), _normalised().to_sparse())),
    "message_passing_gru": lambda: Sample(MessagePassing(), (torch.randn(NODES, WIDTH), edges())),
}


def names() -> tuple[str, ...]:
    """The list."""
    return tuple(_LIST)


def sample(name: str) -> Sample:
    """A listed model."""
    return _LIST[name]()
