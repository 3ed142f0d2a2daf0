"""Natural gradient for graph networks: the checks of its sheet on a dense graph convolution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import FxcurvError
from fxcurv.losses import SemiSupervised
from fxcurv.methods import gnn_ng
from tests.methods.oracle import Step, ggn, kron, relative, transform
from tests.methods.oracle import step as take_step

pytestmark = pytest.mark.usefixtures("float64")

NODES, FEATURES, CLASSES = 7, 4, 3
DAMPING = 0.05


def adjacency(seed: int = 0) -> Tensor:
    """Normalised, with self-loops: D^-1/2 (A + I) D^-1/2."""
    draw = torch.rand(NODES, NODES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    edges = ((draw + draw.T) > 1.0).double().fill_diagonal_(1.0)
    return edges / (edges.sum(0)[:, None] * edges.sum(1)).sqrt()


class GCN(nn.Module):
    """Graph convolutions that aggregate before the product; the adjacency is a buffer, dense or sparse."""

    def __init__(self, S: Tensor, *widths: int, linear: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.register_buffer("S", S)
        self.linear, self.sparse = linear, S.is_sparse
        self.convs = nn.ModuleList(nn.Linear(i, o, bias=bias) for i, o in zip(widths, widths[1:], strict=False))

    def forward(self, x: Tensor) -> Tensor:
        for k, layer in enumerate(self.convs):
            x = layer(torch.sparse.mm(self.S, x) if self.sparse else self.S @ x)
            x = x if self.linear or k + 1 == len(self.convs) else torch.relu(x)
        return x


X = torch.randn(NODES, FEATURES, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
LABELS = torch.tensor([0, 2, 1, 1, -1, -1, -1])
KNOWN = LABELS >= 0


def semi_supervised_step(net: nn.Module, weight: float, method: str = "gnn_ng", **options: Any) -> Step:
    loss = SemiSupervised(labelled=KNOWN)
    goal = loss.targets(net(X), LABELS, weight)
    return take_step(
        net, method, X, lambda f: loss.value(f, goal), loss=loss, damping=DAMPING, backward={"targets": goal}, **options
    )


def rows(net: GCN, loss: Any) -> list[tuple[Tensor, Tensor]]:
    """For every layer the aggregated inputs with the constant, and the gradient of the user's scalar at its output."""
    found, x, outputs = [], X, []
    S = net.S.to_dense()
    for k, layer in enumerate(net.convs):
        found.append(torch.cat([S @ x, torch.ones(NODES, 1)], 1).detach())
        outputs.append(F.linear(S @ x, layer.weight, layer.bias))
        x = outputs[-1] if k + 1 == len(net.convs) else torch.relu(outputs[-1])
    return list(zip(found, torch.autograd.grad(loss(x), outputs), strict=True))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_factors_are_sums_over_all_nodes(sparse: bool, weight: float) -> None:
    """And the product of the rows reproduces autograd's gradient of weight and bias."""
    S = adjacency()
    net = GCN(S.to_sparse() if sparse else S, FEATURES, 5, CLASSES)
    loss = SemiSupervised(labelled=KNOWN)
    goal = loss.targets(net(X), LABELS, weight)
    taken = semi_supervised_step(net, weight)
    n = 4 + 3 * weight
    assert taken.info.terms == pytest.approx(n)
    for k, (a, g) in enumerate(rows(net, lambda f: loss.value(f, goal))):
        factors = taken.factors(f"convs.{k}")
        torch.testing.assert_close(factors["A"], a.T @ a / n)
        torch.testing.assert_close(factors["G"], (n * g).T @ (n * g) / n)
        gradient, direction = taken.pair(f"convs.{k}")
        torch.testing.assert_close(gradient[0], g.T @ a)
        damped = (factors[part] + DAMPING**0.5 * torch.eye(len(factors[part])) for part in "GA")
        left, right = (torch.linalg.inv(matrix) for matrix in damped)
        torch.testing.assert_close(direction[0], left @ gradient[0] @ right)


@pytest.mark.parametrize("fisher", ["empirical", "ggn", "mc"])
def test_without_edges_it_is_kfac(fisher: str) -> None:
    """S = I and all nodes count fully: n = N."""
    net = GCN(torch.eye(NODES), FEATURES, 5, CLASSES)
    ours = semi_supervised_step(net, 1.0, fisher=fisher)
    theirs = semi_supervised_step(net, 1.0, "kfac", fisher=fisher, damping_scheme="sqrt")
    torch.testing.assert_close(ours.direction, theirs.direction)
    for name in ("convs.0", "convs.1"):
        torch.testing.assert_close(ours.factors(name), theirs.factors(name))


@pytest.mark.parametrize("fisher", ["empirical", "ggn", "mc"])
def test_n_is_that_of_the_paper_for_every_source(fisher: str) -> None:
    """Half-weighted pseudo-labels: A is K-FAC's times the number of nodes over N, whatever normalises G."""
    net = GCN(adjacency(), FEATURES, 5, CLASSES)
    ours = semi_supervised_step(net, 0.5, fisher=fisher, fisher_samples=3)
    theirs = semi_supervised_step(net, 0.5, "kfac", fisher=fisher, fisher_samples=3)
    for name in ("convs.0", "convs.1"):
        torch.testing.assert_close(ours.factors(name)["A"], theirs.factors(name)["A"] * NODES / 5.5)
        torch.testing.assert_close(ours.factors(name)["G"], theirs.factors(name)["G"])


@pytest.mark.parametrize("bias", [True, False])
def test_one_linear_layer_with_a_square_loss_is_exact(bias: bool) -> None:
    net = GCN(adjacency(), FEATURES, CLASSES, linear=True, bias=bias)
    y = torch.randn(NODES, CLASSES)

    def user(f: Tensor) -> Tensor:
        return (f - y).square().sum() / 2 / NODES

    taken = take_step(net, "gnn_ng", X, user, loss="gaussian", fisher="ggn")
    torch.testing.assert_close(kron(taken.factors("convs.0")), ggn(net, "convs.0", X, user))


class Late(GCN):
    """Aggregates after the product, as most graph networks are written."""

    def forward(self, x: Tensor) -> Tensor:
        for k, layer in enumerate(self.convs):
            h = layer(x)
            x = torch.sparse.mm(self.S, h) if self.sparse else self.S @ h
            x = x if self.linear or k + 1 == len(self.convs) else torch.relu(x)
        return x


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_a_product_before_the_aggregation_is_measured_behind_it(sparse: bool, bias: bool, frontend: str) -> None:
    """S (H W) as (S H) W: the same factors and directions; a bias inside the product is aggregated with it."""
    S = adjacency()
    net = Late(S.to_sparse() if sparse else S, FEATURES, 5, CLASSES, bias=bias)
    taken = semi_supervised_step(net, 0.5, frontend=frontend, proofs=("gradient", "output"))
    loss = SemiSupervised(labelled=KNOWN)
    goal = loss.targets(net(X), LABELS, 0.5)
    x, outputs, inputs = X, [], []
    for layer in net.convs:
        ones = torch.ones(NODES, int(bias))
        inputs.append(S @ torch.cat([x, ones], 1))
        outputs.append(S @ layer(x))
        x = torch.relu(outputs[-1])
    gradients = torch.autograd.grad(loss.value(outputs[-1], goal), outputs)
    for k, (a, g) in enumerate(zip(inputs, gradients, strict=True)):
        factors = taken.factors(f"convs.{k}")
        torch.testing.assert_close(factors["A"], (a.T @ a / 5.5).detach())
        torch.testing.assert_close(factors["G"], 5.5 * g.T @ g)
        torch.testing.assert_close(taken.pair(f"convs.{k}")[0][0], (g.T @ a).detach())
    if not bias:
        early = GCN(S, FEATURES, 5, CLASSES, bias=False)
        early.load_state_dict({**early.state_dict(), **dict(net.named_parameters())})
        torch.testing.assert_close(semi_supervised_step(early, 0.5).direction, taken.direction)


def test_graphs_of_a_batch_have_an_adjacency_each() -> None:
    S, x, y = torch.stack([adjacency(k) for k in range(3)]), torch.randn(3, NODES, FEATURES), torch.tensor([0, 2, 1])

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Linear(FEATURES, CLASSES, bias=False), nn.Linear(CLASSES, CLASSES)

        def forward(self, x: Tensor, S: Tensor) -> Tensor:
            return self.head(torch.matmul(S, self.conv(x)).mean(1))

    net = Pooled()
    model = fxcurv.transform(
        net, "gnn_ng", loss="cross_entropy", example_inputs=(x, S), proofs=("gradient",), factor_every=1
    )
    outputs = model(x, S)
    value = F.cross_entropy(outputs, y)
    hidden = (S @ net.conv(x)).detach().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(net.head(hidden.mean(1)), y), hidden)
    model.backward(value, outputs)
    model.precondition_()
    a, g = (S @ x).flatten(0, 1), g.flatten(0, 1)
    torch.testing.assert_close(model.factors("conv"), {"A": a.T @ a / 3, "G": 3 * g.T @ g})


class Messages(nn.Module):
    """torch_geometric's layers, which gather and scatter along edges after their product."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        conv = pytest.importorskip("torch_geometric.nn").GCNConv
        self.convs = nn.ModuleList([conv(FEATURES, 5, **options), conv(5, CLASSES, **options)])

    def forward(self, x: Tensor, edges: Tensor, weights: Tensor | None = None) -> Tensor:
        return self.convs[1](torch.relu(self.convs[0](x, edges, weights)), edges, weights)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("flow", ["source_to_target", "target_to_source"])
@pytest.mark.parametrize("layout", ["edges", "weighted", "sparse"])
def test_message_passing_is_a_matrix_too(flow: str, layout: str) -> None:
    """The normalised adjacency is measured by sending unit features through the layer itself."""
    edges = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 2, 5], [1, 2, 0, 4, 5, 3, 2, 6, 4, 1]])
    weights = torch.rand(10) + 0.5 if layout == "weighted" else None
    if layout == "sparse" and flow == "target_to_source":
        pytest.skip("a sparse adjacency has one direction")
    given = torch.sparse_coo_tensor(edges, torch.ones(10), (NODES, NODES)) if layout == "sparse" else edges
    inputs = (X, given) if weights is None else (X, given, weights)
    net = Messages(flow=flow)
    conv = type(net.convs[0])(NODES, NODES, bias=False, flow=flow)
    with torch.no_grad():
        conv.lin.weight.copy_(torch.eye(NODES))
        S = conv(torch.eye(NODES), *inputs[1:])
    assert not torch.allclose(S, S.T)
    model = fxcurv.transform(net, "gnn_ng", loss="cross_entropy", example_inputs=inputs, proofs=("gradient", "output"))
    y = torch.tensor([0, 2, 1, 1, 0, 2, 1])
    hidden = (S @ net.convs[0].lin(X) + net.convs[0].bias).detach().requires_grad_()
    last = (S @ net.convs[1].lin(torch.relu(hidden)) + net.convs[1].bias).detach().requires_grad_()
    (g_last,) = torch.autograd.grad(F.cross_entropy(last, y), last)
    (g_hidden,) = torch.autograd.grad(net.convs[1].lin(torch.relu(hidden)), hidden, S.T @ g_last)
    outputs = model(*inputs)
    torch.testing.assert_close(outputs, last)
    model.backward(F.cross_entropy(outputs, y), outputs)
    model.precondition_()
    for k, (a, g) in enumerate(((S @ X, g_hidden), (S @ torch.relu(hidden.detach()), g_last))):
        expected = {"A": a.T @ a / NODES, "G": NODES * g.T @ g}
        torch.testing.assert_close(model.factors(f"convs.{k}.lin"), expected)


class Scores(nn.Module):
    """What looks like an aggregation and is none: weights that depend on parameters, or a value read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.w = (nn.Linear(FEATURES, FEATURES) for _ in range(3))
        self.out = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor, S: Tensor) -> Tensor:
        attended = torch.softmax(self.q(x) @ x.transpose(0, 1), -1) @ self.v(x)
        twice = self.w(x)
        return self.out(attended + S @ twice + twice)


def test_attention_and_values_read_twice_stay_where_they_are() -> None:
    model = fxcurv.transform(Scores(), "gnn_ng", loss="cross_entropy", example_inputs=(X, adjacency()))
    assert {layer.name: type(layer.form).__name__ for layer in model.layers} == dict.fromkeys(
        ("q", "v", "w", "out"), "LinearForm"
    )


def test_other_methods_measure_the_product_where_it_is() -> None:
    """The two are different approximations of one block; for K-FAC the rows are those of the product."""
    net = Late(adjacency(), FEATURES, CLASSES, linear=True, bias=False)
    y = torch.randn(NODES, CLASSES)

    def user(f: Tensor) -> Tensor:
        return (f - y).square().sum() / 2 / NODES

    theirs = take_step(net, "kfac", X, user, loss="gaussian", fisher="ggn").factors("convs.0")
    ours = take_step(net, "gnn_ng", X, user, loss="gaussian", fisher="ggn").factors("convs.0")
    torch.testing.assert_close(theirs["A"], X.T @ X / NODES)
    torch.testing.assert_close(kron(ours), ggn(net, "convs.0", X, user))
    assert relative(kron(theirs), kron(ours)) > 0.05


def test_unlabelled_nodes_matter_with_and_without_pseudo_labels() -> None:
    """Every node is a row of every layer, and of all but the last it has a gradient even with strength 0."""
    net = GCN(adjacency(), FEATURES, 5, CLASSES)
    loss = SemiSupervised(labelled=KNOWN)
    goal = loss.targets(net(X), LABELS, 0.0)
    (_, hidden), (_, last) = rows(net, lambda f: loss.value(f, goal))
    assert hidden[~KNOWN].any() and not last[~KNOWN].any()
    without, half = semi_supervised_step(net, 0.0), semi_supervised_step(net, 0.5)
    assert relative(half.factors("convs.1")["G"], without.factors("convs.1")["G"]) > 0.05


def test_the_strength_may_change_from_step_to_step() -> None:
    net, loss = GCN(adjacency(), FEATURES, 5, CLASSES), SemiSupervised(labelled=KNOWN)
    model = transform(net, "gnn_ng", X, loss=loss, factor_every=1)
    for weight in (0.0, 0.5, 1.0):
        outputs = model(X)
        goal = loss.targets(outputs, LABELS, weight)
        model.backward(loss.value(outputs, goal), outputs, targets=goal)
        assert model.precondition_().terms == pytest.approx(4 + 3 * weight)
        model.zero_grad()


def test_defaults_are_those_of_the_paper() -> None:
    method = gnn_ng()
    assert method.source.kind == "empirical" and method.hyper["damping"] == 0.01 and method.hyper["ema"] == 0.0
    assert (method.every.factors, method.every.solve) == (50, 50) and method.rule.momentum == 0.9


def test_wrong_settings() -> None:
    with pytest.raises(FxcurvError, match="sharing='reduce'"):
        gnn_ng(sharing="reduce")
    with pytest.raises(FxcurvError, match="damping_scheme='none' is unknown"):
        gnn_ng(damping_scheme="none")
