"""Graph networks from the model to the step: outputs, gradients, coverage, statistics, graphs of other sizes."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcurv

pytest.importorskip("torch_geometric")
from torch_geometric import nn as gnn
from torch_geometric.data import Batch, Data
from torch_geometric.utils import to_dense_adj, to_dense_batch

from fxcurv.errors import FxcurvError
from tests.runtime import graph_nets as nets
from tests.runtime.graph_nets import CLASSES, CONVOLUTIONS, HIDDEN, INPUTS, NODES

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),
    pytest.mark.filterwarnings("ignore:Converting sparse tensor to CSR"),
]


def transform(net: nn.Module, inputs: tuple[Tensor, ...] | None, **options: Any) -> Any:
    """kfac on what it sees in one batch, all proofs on."""
    defaults = {"loss": "cross_entropy", "fisher": "empirical", "ema": 0.0, "frontend": "symbolic", "strict": True}
    return fxcurv.transform(net, "kfac", example_inputs=inputs, **{**defaults, **options})


def step(model: Any, inputs: tuple[Tensor, ...], y: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Forward and backward on the nodes of ``mask``; returns the gradients, after which the update is in p.grad."""
    model.zero_grad()
    out = model(*inputs)
    out = out if mask is None else out[mask]
    model.backward(F.cross_entropy(out, y if mask is None else y[mask]), out)
    gradients = {name: p.grad.clone() for name, p in model.strip().named_parameters() if p.grad is not None}
    info = model.precondition_()
    assert not (info.fallback or info.kept or info.repaired)
    return gradients


def forwards(model: Any) -> list[Any]:
    """The captured forwards that the model has by now."""
    return [forward for found in model._forwards.known.values() for forward in found]


def plain_gradients(net: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of the user's model."""
    out = net(*inputs)
    grads = torch.autograd.grad(F.cross_entropy(out, y), list(net.parameters()), allow_unused=True)
    return out.detach(), {n: g for (n, _), g in zip(net.named_parameters(), grads, strict=True) if g is not None}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_convolution(name: str):
    """Covered as a whole, equal to the plain model in output and gradients, and a step of it descends."""
    net = CONVOLUTIONS[name][0]()
    inputs, y = nets.arguments(name), torch.randint(0, CLASSES, (NODES,))
    expected, gradients = plain_gradients(copy.deepcopy(net), inputs, y)
    model = transform(net, inputs)
    assert model.report().frontend == "symbolic" and model.uncovered == ()
    torch.testing.assert_close(model(*inputs).detach(), expected, rtol=0, atol=1e-12)
    found = step(model, inputs, y)
    assert found.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-10, atol=1e-12)
    before = F.cross_entropy(expected, y)
    with torch.no_grad():
        slope = sum((found[n] * p.grad).sum() for n, p in net.named_parameters() if p.grad is not None)
        for p in net.parameters():
            if p.grad is not None:
                p -= 1e-4 * p.grad
    assert slope > 0 and torch.isfinite(slope)
    assert F.cross_entropy(net(*inputs), y) < before


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_graphs_of_other_sizes(name: str):
    """More nodes and edges go through the same captured graph."""
    net = CONVOLUTIONS[name][0]()
    for module in net.modules():  # a cached convolution is for one graph
        if getattr(module, "cached", False):
            module.cached = False
    model = transform(net, nets.arguments(name))
    captured = forwards(model)
    for nodes, edges in ((17, 40), (6, 3)):
        inputs, y = nets.arguments(name, nodes, edges), torch.randint(0, CLASSES, (nodes,))
        expected, gradients = plain_gradients(copy.deepcopy(net), inputs, y)
        torch.testing.assert_close(model(*inputs).detach(), expected, rtol=0, atol=1e-12)
        model.discard()
        found = step(model, inputs, y)
        for key, gradient in gradients.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-10, atol=1e-12)
    assert forwards(model) == captured


def test_features_of_edges_with_and_without_an_axis():
    """The library asks for the number of axes, so that each number has a graph of its own."""
    net = nets.pair(gnn.GATConv, {"edge_dim": 1}, {"edge_dim": 1})()
    x, edges, features = *nets.graph(), torch.rand(nets.EDGES)
    model = transform(net, (x, edges, features[:, None]))
    for given in (features, features[:, None], features):
        torch.testing.assert_close(model(x, edges, given), net(x, edges, given), rtol=0, atol=1e-12)
    assert len(forwards(model)) == 2


@pytest.mark.parametrize("name", ["gcn", "sage mean", "gat edges", "gatv2", "gin", "transformer", "arma", "gcn2"])
def test_export_and_auto(name: str):
    net = CONVOLUTIONS[name][0]()
    inputs, y = nets.arguments(name), torch.randint(0, CLASSES, (NODES,))
    _, gradients = plain_gradients(copy.deepcopy(net), inputs, y)
    for frontend, chosen in (("export", "export"), ("auto", "symbolic")):
        model = transform(net, inputs, frontend=frontend, strict=False)
        assert model.report().frontend == chosen
        found = step(model, inputs, y)
        for key, gradient in gradients.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["gcn", "gcn weighted", "gcn unnormalised"])
def test_statistics_of_gcn(name: str):
    """A from the node features, G from gradients that have passed the normalised adjacency, a bias from the others."""
    net = CONVOLUTIONS[name][0]()
    inputs, y = nets.arguments(name), torch.randint(0, CLASSES, (NODES,))
    x, edges, weights = inputs[0], inputs[1], inputs[2] if len(inputs) > 2 else None
    model = transform(net, inputs)
    step(model, inputs, y)

    def normalised(conv: Any) -> Tensor:
        """to_dense_adj has sources in rows; messages flow to columns."""
        loops = edges[0] == edges[1]
        values = torch.ones(edges.shape[1]) if weights is None else weights
        dense = to_dense_adj(edges, edge_attr=values, max_num_nodes=NODES)[0].T.clone()
        if not conv.normalize:
            return dense
        if conv.add_self_loops:  # a self loop that is there keeps its weight; of several the last
            kept = {int(n): values[k] for k, n in enumerate(edges[0]) if loops[k]}
            fill = 2.0 if conv.improved else 1.0
            dense.diagonal().copy_(torch.stack([torch.as_tensor(kept.get(n, fill)) for n in range(NODES)]))
        root = dense.sum(1).pow(-0.5)
        root[root.isinf()] = 0
        return root[:, None] * dense * root

    first, second = normalised(net.first), normalised(net.second)
    hidden = (first @ x @ net.first.lin.weight.T + net.first.bias).relu().detach()
    out = second @ hidden @ net.second.lin.weight.T + (0 if net.second.bias is None else net.second.bias)
    residual = out.softmax(1).detach() - F.one_hot(y, CLASSES)
    at_second = second.T @ residual
    behind = (at_second @ net.second.lin.weight).detach() * (hidden > 0)
    at_first = first.T @ behind
    for layer, rows, grads in (("first.lin", x, at_first), ("second.lin", hidden, at_second)):
        factors = model.factors(layer)
        torch.testing.assert_close(factors["A"], rows.T @ rows / NODES)
        torch.testing.assert_close(factors["G"], grads.T @ grads / NODES)
    block = model.factors("first.bias")["F"].reshape(-1)
    torch.testing.assert_close(block, behind.square().mean(0))


SPARSE = (gnn.GCNConv, gnn.SAGEConv, gnn.GATConv, gnn.GATv2Conv, gnn.GraphConv, gnn.TransformerConv)


@pytest.mark.parametrize("layout", ["coo", "csr"])
@pytest.mark.parametrize("conv", SPARSE)
def test_sparse_adjacency(conv: Any, layout: str):
    options = {"add_self_loops": False} if conv is gnn.GATv2Conv else {}
    net = nets.pair(conv, options, options)()
    x, y = torch.randn(NODES, INPUTS), torch.randint(0, CLASSES, (NODES,))
    dense = (torch.rand(NODES, NODES) < 0.4).double()
    adj = dense.to_sparse() if layout == "coo" else dense.to_sparse_csr()
    expected, gradients = plain_gradients(copy.deepcopy(net), (x, adj), y)
    model = transform(net, (x, adj))
    torch.testing.assert_close(model(x, adj).detach(), expected, rtol=0, atol=1e-12)
    found = step(model, (x, adj), y)
    for key, gradient in gradients.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-10, atol=1e-12)
    edges = dense.T.nonzero().T.contiguous()  # the same graph as edges is another graph of operations
    torch.testing.assert_close(model(x, edges).detach(), net(x, edges).detach(), rtol=0, atol=1e-12)
    assert len(forwards(model)) == 2


DENSE = {
    "gcn": lambda: nets.pair(gnn.DenseGCNConv)(),
    "sage": lambda: nets.pair(gnn.DenseSAGEConv)(),
    "graph": lambda: nets.pair(gnn.DenseGraphConv)(),
    "gin": lambda: nets.Net(gnn.DenseGINConv(nets.mlp(INPUTS, HIDDEN)), gnn.DenseGINConv(nets.mlp(HIDDEN, CLASSES))),
}


class DenseNet(nn.Module):
    """Graph classification on padded dense graphs."""

    def __init__(self, convs: nets.Net) -> None:
        super().__init__()
        self.first, self.second = convs.first, convs.second

    def forward(self, x: Tensor, adj: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.second(self.first(x, adj, mask).relu(), adj, mask).mean(1)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("name", DENSE)
def test_dense_convolutions(name: str, batched: bool):
    net = DenseNet(DENSE[name]())
    shape = (5, 6) if batched else (6,)
    inputs: tuple[Tensor, ...] = (torch.randn(*shape, INPUTS), (torch.rand(*shape, 6) < 0.5).double())
    if batched:
        inputs = (*inputs, torch.rand(shape) < 0.8)
    y = torch.randint(0, CLASSES, (5 if batched else 1,))
    expected, gradients = plain_gradients(copy.deepcopy(net), inputs, y)
    model = transform(net, inputs)
    assert model.uncovered == ()
    torch.testing.assert_close(model(*inputs).detach(), expected, rtol=0, atol=1e-12)
    found = step(model, inputs, y)
    for key, gradient in gradients.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-10, atol=1e-12)


def batch(count: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Graphs of different sizes as one batch, with a label each."""
    data = Batch.from_data_list([Data(*nets.graph(4 + k, 8 + k)) for k in range(count)])
    return (data.x, data.edge_index, data.batch), torch.randint(0, CLASSES, (count,))


POOLS = {
    "mean": gnn.global_mean_pool, "add": gnn.global_add_pool, "max": gnn.global_max_pool,
    "module": gnn.aggr.MeanAggregation(), "sorting": gnn.aggr.SortAggregation(k=1),
}  # fmt: skip


@pytest.mark.parametrize("pool", POOLS)
def test_batched_graphs(pool: str):
    net = nets.Classifier(POOLS[pool])
    inputs, y = batch(4)
    model = transform(net, inputs)
    for count in (4, 6):
        inputs, y = batch(count)
        expected, gradients = plain_gradients(copy.deepcopy(net), inputs, y)
        found = step(model, inputs, y)
        for key, gradient in gradients.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-10, atol=1e-12)
    assert len(forwards(model)) == 1
    model.eval()
    torch.testing.assert_close(model(*inputs), net(*inputs), rtol=0, atol=1e-12)


class Padded(nn.Module):
    """No convolution, but a function of the library, called by the user's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.head = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor, batch: Tensor) -> Tensor:
        rows, there = to_dense_batch(torch.tanh(self.lift(x)), batch)
        return self.head((rows * there.unsqueeze(-1)).sum(1))


def test_a_function_of_the_library_is_one_node():
    net = Padded()
    (x, _, index), y = batch(4)
    model = transform(net, (x, index))
    assert [node.name for node in model.graph.graph.nodes if node.target is to_dense_batch] == ["to_dense_batch"]
    for count in (4, 6):
        (x, _, index), y = batch(count)
        _, gradients = plain_gradients(copy.deepcopy(net), (x, index), y)
        found = step(model, (x, index), y)
        torch.testing.assert_close(found, gradients, rtol=1e-10, atol=1e-12)
    assert len(forwards(model)) == 1


def test_attention_in_the_readout():
    net = nets.Classifier(gnn.aggr.AttentionalAggregation(nn.Linear(HIDDEN, 1)))
    inputs, y = batch(4)
    _, gradients = plain_gradients(copy.deepcopy(net), inputs, y)
    found = step(transform(net, inputs), inputs, y)
    torch.testing.assert_close(found["pool.gate_nn.weight"], gradients["pool.gate_nn.weight"])


def test_loss_on_a_part_of_the_nodes():
    """outputs = out[mask] and the whole output with mask= are the same step."""
    net = CONVOLUTIONS["gcn"][0]()
    inputs, y, mask = nets.arguments("gcn"), torch.randint(0, CLASSES, (NODES,)), torch.arange(NODES) < 6
    twin = copy.deepcopy(net)
    first, second = transform(net, inputs, fisher="mc"), transform(twin, inputs, fisher="ggn")
    gradients = step(first, inputs, y, mask)
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())
    out = second(*inputs)
    second.backward(F.cross_entropy(out[mask], y[mask]), out, targets=y, mask=mask)
    for name, p in twin.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name])
    second.precondition_()
    hidden = twin.first(*inputs).relu().detach()
    torch.testing.assert_close(second.factors("second.lin")["A"], hidden.T @ hidden / NODES)


def test_train_and_eval():
    net = CONVOLUTIONS["gat"][0]()
    net.dropout, net.first.dropout = 0.5, 0.5
    inputs = nets.arguments("gat")
    model = transform(net, inputs)
    for mode in (True, False):
        model.train(mode)
        torch.manual_seed(3)
        found = model(*inputs)
        torch.manual_seed(3)
        torch.testing.assert_close(found, net(*inputs), rtol=0, atol=1e-12)


def test_pooling_that_drops_nodes():
    """The checks of the library, which look at sizes, are taken to pass; what scores the nodes is listed."""
    inputs, y = batch(4)
    net = nets.Pooled()
    _, gradients = plain_gradients(copy.deepcopy(net), inputs, y)
    model = transform(net, inputs, strict=False)
    found = step(model, inputs, y)
    for key, gradient in gradients.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-10, atol=1e-12)
    assert [name for name, _ in model.uncovered] == ["pool.select.weight"]


def test_a_value_left_on_a_convolution():
    with pytest.raises(FxcurvError, match="changes the attribute 'last'"):
        transform(nets.Keeps(INPUTS, CLASSES), nets.graph(), proofs=False)


def test_a_cache_stays_the_users():
    """A filled cache is neither read into the graph nor replaced by the capture, and an empty one stays empty."""
    net = CONVOLUTIONS["gcn cached"][0]()
    inputs, y = nets.arguments("gcn cached"), torch.randint(0, CLASSES, (NODES,))
    transform(net, inputs, proofs=False)
    assert net.first._cached_edge_index is None
    net(*inputs)
    cache = net.first._cached_edge_index
    model = transform(net, inputs)
    assert net.first._cached_edge_index is cache
    step(model, inputs, y)
    assert model._engine.compilation.captured.constants == {} and net.first._cached_edge_index is cache


def test_what_a_message_function_leaves_on_the_module_is_cleared():
    net = CONVOLUTIONS["transformer"][0]()
    inputs, y = nets.arguments("transformer"), torch.randint(0, CLASSES, (NODES,))
    model = transform(net, inputs)
    step(model, inputs, y)
    assert net.first._alpha is None
    copy.deepcopy(net)


def test_attention_weights_as_a_second_output():
    class Weights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.other = gnn.GATConv(INPUTS, CLASSES), gnn.TransformerConv(CLASSES, CLASSES)

        def forward(self, x: Tensor, edge_index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x, (_, first) = self.conv(x, edge_index, return_attention_weights=True)
            x, (_, second) = self.other(x, edge_index, return_attention_weights=True)
            return x, first, second

    net, inputs = Weights(), nets.graph()
    for found, expected in zip(transform(net, inputs)(*inputs), net(*inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_without_example_inputs():
    """Plain convolutions need none; parameters inside messages do, and the error says so."""
    net, inputs = CONVOLUTIONS["gcn"][0](), nets.arguments("gcn")
    model = transform(net, None)
    torch.testing.assert_close(model(*inputs), net(*inputs), rtol=0, atol=1e-12)
    with pytest.raises(
        FxcurvError, match=r"'first' \(GATv2Conv\) reads parameters inside its messages.*example_inputs"
    ):
        transform(CONVOLUTIONS["gatv2"][0](), None)


def test_parameters_without_a_shape():
    net = nets.Net(gnn.SAGEConv(-1, HIDDEN), gnn.SAGEConv(-1, CLASSES))
    inputs = nets.arguments("gcn")
    with pytest.raises(FxcurvError, match="'first.lin_l' .* has no shape yet: run the model once"):
        transform(net, inputs)
    net(*inputs)
    assert transform(net, inputs).uncovered == ()


def test_a_convolution_is_a_model():
    net, inputs = gnn.GATv2Conv(INPUTS, CLASSES), nets.graph()
    model = transform(net, inputs)
    assert {layer.name for layer in model.layers} >= {"lin_l", "lin_r", "att"}
    torch.testing.assert_close(model(*inputs), net(*inputs), rtol=0, atol=1e-12)


def test_the_library_is_as_before_after_a_capture():
    from torch_geometric.nn.conv import gat_conv
    from torch_geometric.utils import softmax

    before = {cls: dict(vars(cls)) for cls in (gnn.GATConv, gnn.MessagePassing, gnn.aggr.Aggregation)}
    net = CONVOLUTIONS["gat edges"][0]()
    before = {cls: dict(vars(cls)) for cls in before}
    names = dict(vars(gat_conv))
    transform(net, nets.arguments("gat edges"))
    assert all(dict(vars(cls)) == attributes for cls, attributes in before.items())
    assert dict(vars(gat_conv)) == names and gat_conv.softmax is softmax and "isinstance" not in names


def test_message_passing_is_told_to_couple_examples():
    inputs = nets.arguments("gcn")
    notes = transform(CONVOLUTIONS["gcn"][0](), inputs, fisher="ggn").report().notes
    assert any("message passing couples examples" in note for note in notes)


def test_the_library_is_not_imported(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.startswith("torch_geometric")]:
        monkeypatch.delitem(sys.modules, name)
    net, x = nn.Linear(INPUTS, CLASSES), torch.randn(NODES, INPUTS)
    step(transform(net, (x,)), (x,), torch.randint(0, CLASSES, (NODES,)))
    assert not any(name.startswith("torch_geometric") for name in sys.modules)
