"""Products that a graph aggregates afterwards, measured behind the aggregation: S (H W) read as (S H) W.

A graph convolution written as ``S @ (H @ W)`` sums over neighbours after the product, so a tap on the product sees the
inputs H of single nodes and the gradients S^T g. Since aggregation and product commute, the tap may as well sit on the
aggregated value: it then sees g itself, and the inputs S H, which are computed only where a statistic needs them. The
forward stays as it is. The weight's gradient is the same sum over rows either way, but its Kronecker factors are not;
which ones to take is the method's choice (``Method.aggregated``).
"""

from __future__ import annotations

import operator
import sys
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcurv.capture.captured import resolve
from fxcurv.capture.graphs import pass_messages
from fxcurv.errors import FxcurvError
from fxcurv.layers.chain import END_ATTRIBUTES, ENDS
from fxcurv.layers.form import Form
from fxcurv.layers.layer import Layer, Use
from fxcurv.layers.linear import LinearForm

aten = torch.ops.aten
PRODUCTS = {operator.matmul, torch.matmul, torch.mm, torch.bmm, torch.spmm, torch.sparse.mm, "matmul", "mm", "bmm"}
PRODUCTS |= {aten.matmul.default, aten.mm.default, aten.bmm.default, aten._sparse_mm.default, "smm"}


@dataclass(frozen=True)
class AggregatedForm(Form):
    """The rows of ``S @ (x @ W.T)`` as those of ``(S @ x) @ W.T``: the last auxiliary operand is S.

    x: (nodes, inputs) or (graphs, nodes, inputs); S: (nodes', nodes), dense or sparse, or a dense one for each graph.
    The constant of a bias that the product itself has is aggregated too. inner: the form of the product.
    """

    inner: Form = field(kw_only=True)

    def rows_a(self, x: Tensor, *aux: Tensor) -> Tensor:
        """See :meth:`Form.rows_a`; raises :class:`FxcurvError` for an x of other than two or three axes."""
        if x.dim() not in (2, 3):
            raise FxcurvError(
                f"the nodes of a graph convolution have features of shape {tuple(x.shape)}; reshape them to (nodes, "
                "features) or (graphs, nodes, features), or choose a method that is not for graphs."
            )
        *own, S = aux
        rows = self.inner.rows_a(x, *own)
        S = S.to(rows.dtype)
        if x.dim() == 2:
            return (S @ rows.flatten(1)).unflatten(1, rows.shape[1:])
        if S.dim() == 3:
            return (S @ rows.flatten(2)).unflatten(2, rows.shape[2:])
        nodes_first = rows.transpose(0, 1)  # one S for all graphs; a sparse one multiplies matrices only
        return (S @ nodes_first.flatten(1)).unflatten(1, nodes_first.shape[1:]).transpose(0, 1)

    def rows_g(self, g: Tensor) -> Tensor:
        """See :meth:`Form.rows_g`; g shaped like the aggregated value."""
        return self.inner.rows_g(g)

    @property
    def tag(self) -> str:
        """See :attr:`Form.tag`."""
        return f"aggregated {self.inner.tag}"


def aggregated(layer: Layer, model: nn.Module) -> Layer:
    """The layer with every use moved behind the aggregation that follows it, where one does and nothing else reads it.

    An aggregation is a matrix product with data from the left, or the message passing of torch_geometric's ``GCNConv``,
    where no parameter of ``model`` enters. For message passing a node that makes its matrix is added to the graph.
    """
    return replace(layer, uses=tuple(_moved(use, model) for use in layer.uses))


def edge_matrix(edge_index: Tensor, edge_weight: Tensor | None, x: Tensor, flow: str) -> Tensor:
    """The sparse (nodes, nodes) matrix of messages ``weight * x`` along edges, summed where they arrive.

    edge_index: (2, edges), or that matrix itself; x: (..., nodes, features); flow: "source_to_target" or the reverse.
    """
    if edge_index.layout != torch.strided:
        return edge_index
    sources, targets = edge_index if flow == "source_to_target" else edge_index.flip(0)
    values = x.new_ones(sources.shape) if edge_weight is None else edge_weight.detach().to(x.dtype)
    return torch.sparse_coo_tensor(torch.stack([targets, sources]), values, (x.shape[-2],) * 2, check_invariants=False)


def _moved(use: Use, model: nn.Module) -> Use:
    users = list(use.y.users)
    if type(use.form) is not LinearForm or use.form.axis != -1 or len(users) != 1:
        return use
    S = _matrix(users[0], use, model)
    if S is None:
        return use
    common = {item.name: getattr(use.form, item.name) for item in fields(Form)}
    return replace(use, y=users[0], form=AggregatedForm(**common, inner=use.form), aux=(*use.aux, S))


def _matrix(node: fx.Node, use: Use, model: nn.Module) -> fx.Node | None:
    """S with value of ``node`` = S @ value of ``use.y``, ``None`` where the node is no aggregation."""
    if node.target in PRODUCTS and len(node.args) == 2 and node.args[1] is use.y:
        S: Any = node.args[0]
        return S if isinstance(S, fx.Node) and S is not use.y and not _reads_parameters(S, model) else None
    if node.target is not pass_messages or len(node.args) != 2 or set(node.kwargs) != {"x", "edge_weight"}:
        return None
    entry, edges = node.args
    convolution = (
        resolve(model, str(getattr(entry, "target", "")).rpartition(".")[0]) if _of_gcn(entry, model) else None
    )
    if convolution is None or node.kwargs["x"] is not use.y:
        return None
    weights: Any = node.kwargs["edge_weight"]
    if any(isinstance(part, fx.Node) and _reads_parameters(part, model) for part in (edges, weights)):
        return None
    with node.graph.inserting_before(node):
        return node.graph.call_function(edge_matrix, (edges, weights, use.x, convolution.flow))


def _of_gcn(entry: Any, model: nn.Module) -> bool:
    """Whether a node is the ``propagate`` of a GCNConv that sums the library's own messages."""
    library: Any = sys.modules.get("torch_geometric.nn.conv.gcn_conv")
    if library is None or not isinstance(entry, fx.Node) or not str(entry.target).endswith(".propagate"):
        return False
    owner: Any = resolve(model, str(entry.target).rpartition(".")[0])
    plain = isinstance(owner, library.GCNConv) and type(owner).message is library.GCNConv.message
    return plain and owner.aggr in ("add", "sum") and owner.node_dim == -2 and owner.decomposed_layers == 1


def _reads_parameters(node: fx.Node, model: nn.Module) -> bool:
    """Whether a parameter enters the value of a node."""
    stack, seen = [node], set()
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        if value.target in ENDS or (value.target is getattr and value.args[1] in END_ATTRIBUTES):
            continue  # the number of nodes, not their features
        if value.op in ("get_attr", "call_module"):
            try:
                owner = resolve(model, str(value.target))
            except AttributeError:  # a constant that the front-end keeps
                owner = None
            inside = list(owner.parameters()) if isinstance(owner, nn.Module) else []
            if isinstance(owner, nn.Parameter) or inside:
                return True
        stack += value.all_input_nodes
    return False
