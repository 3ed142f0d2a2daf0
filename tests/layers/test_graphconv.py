"""Graph convolutions written with plain torch: dense and sparse adjacencies, sparse features, where a bias belongs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fxcurv
from fxcurv.capture import Call
from fxcurv.layers.layer import Detection
from fxcurv.layers.proof import prove
from tests.layers.check import Fn, assert_exact, find, reasons

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")]

NODES, INPUTS, OUTPUTS = 7, 4, 3
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda tensor: tensor,
    "coo": Tensor.to_sparse,
    "csr": Tensor.to_sparse_csr,
}
WEIGHTS = {"w": (INPUTS, OUTPUTS), "b": (OUTPUTS,)}


def adjacency() -> Tensor:
    """Weighted and not symmetric, some nodes without neighbours."""
    dense = torch.rand(NODES, NODES) * (torch.rand(NODES, NODES) < 0.4)
    dense[2] = 0
    return dense


def kinds(detection: Detection) -> dict[str, tuple[str, ...]]:
    """Kind and parameters by layer name."""
    return {layer.name: (layer.kind, *layer.params) for layer in detection.layers}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("multiply", [torch.matmul, torch.mm, torch.spmm, lambda a, x: a @ x])
def test_a_bias_after_the_aggregation_is_a_shift(layout: str, multiply: Any):
    model = Fn(lambda m, x, adj: torch.tanh(multiply(adj, x @ m.w) + m.b), **WEIGHTS)
    x, adj = torch.randn(NODES, INPUTS), LAYOUTS[layout](adjacency())
    detection = assert_exact(model, x, adj)
    assert kinds(detection) == {"w": ("linear", "w"), "b": ("shift", "b")} and not detection.uncovered


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bias_after_the_product_is_its_coordinate(layout: str):
    model = Fn(lambda m, x, adj: torch.tanh((adj @ x) @ m.w + m.b), **WEIGHTS)
    x, adj = torch.randn(NODES, INPUTS), LAYOUTS[layout](adjacency())
    captured, detection = find(model, x, adj)
    assert kinds(detection) == {"w": ("linear", "w", "b")}
    assert prove(captured, detection, model, (x, adj)) == []
    (layer,) = detection.layers
    dense = adj.to_dense() if layout != "dense" else adj
    rows = layer.form.rows_a(dense @ x)
    torch.testing.assert_close(rows[:, 0, 0], torch.cat([dense @ x, torch.ones(NODES, 1)], 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adjacency_that_meets_the_weight(layout: str):
    """A network without node features: the rows of the layer are those of the adjacency."""
    multiply = torch.matmul if layout == "dense" else torch.sparse.mm
    model = Fn(lambda m, adj: torch.tanh(multiply(adj, m.w) + m.b), w=(NODES, OUTPUTS), b=(OUTPUTS,))
    dense = adjacency()
    adj = LAYOUTS[layout](dense)
    captured, detection = find(model, adj)
    (layer,) = detection.layers
    assert layer.params == ("w", "b") and prove(captured, detection, model, (adj,)) == []
    rows = layer.form.rows_a(adj)
    torch.testing.assert_close(rows[:, 0, 0], torch.cat([dense, torch.ones(NODES, 1)], 1))


def test_sparse_features():
    features = torch.randn(NODES, INPUTS) * (torch.rand(NODES, INPUTS) < 0.5)
    model = Fn(lambda m, x, adj: torch.tanh(adj @ torch.sparse.mm(x, m.w) + m.b), **WEIGHTS)
    detection = assert_exact(model, features.to_sparse(), adjacency().to_sparse())
    assert kinds(detection) == {"w": ("linear", "w"), "b": ("shift", "b")}
    form = detection.layers[0].form
    torch.testing.assert_close(form.rows_a(features.to_sparse()), form.rows_a(features))


def test_addmm_with_a_sparse_matrix():
    shape = (NODES, OUTPUTS)
    model = Fn(lambda m, a: torch.tanh(torch.sparse.addmm(m.b, a, m.w, alpha=0.5)), w=shape, b=shape)
    detection = assert_exact(model, adjacency().to_sparse())
    assert kinds(detection) == {"w": ("linear", "w")} and detection.layers[0].form.scale == 0.5
    assert list(reasons(detection)) == ["b"]  # one number for each node and output is no bias


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_a_step_are_those_of_the_dense_computation(layout: str):
    """A from the node features, G from the output gradients that have passed the transposed adjacency."""
    dense = adjacency()
    model = Fn(lambda m, x, adj: adj @ (x @ m.w) + m.b, **WEIGHTS)
    x, adj, y = torch.randn(NODES, INPUTS), LAYOUTS[layout](dense), torch.randint(0, OUTPUTS, (NODES,))
    transformed = fxcurv.transform(
        model, "kfac", example_inputs=(x, adj), loss="cross_entropy", fisher="empirical", ema=0.0
    )
    out = transformed(x, adj)
    transformed.backward(torch.nn.functional.cross_entropy(out, y), out, targets=y)
    transformed.precondition_()
    residual = out.softmax(1).detach() - torch.nn.functional.one_hot(y, OUTPUTS)
    factors = transformed.factors("w")
    torch.testing.assert_close(factors["A"], x.T @ x / NODES)
    torch.testing.assert_close(factors["G"], (dense.T @ residual).T @ (dense.T @ residual) / NODES)


def test_layouts_do_not_share_a_graph():
    model = Fn(lambda m, x, adj: adj @ (x @ m.w) + m.b, **WEIGHTS)
    x, dense = torch.randn(NODES, INPUTS), adjacency()
    keys = {Call.of(model, (x, make(dense))).key for make in LAYOUTS.values()}
    assert len(keys) == 3
