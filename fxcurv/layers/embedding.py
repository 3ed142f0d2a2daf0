"""Embeddings: a linear layer on one-hot rows, whose input second moment is diagonal.

The normal-form weight is (1, embedding_dim, num_embeddings), the transpose of the stored table. One-hot rows
exist for tests and oracles only; everything that needs the input reads the indices instead. A padding index
has an all-zero row, which takes its positions out of the weight's gradient and of the input counts. The
gradient rows of these positions are *not* zeroed, since they are read without the indices: whoever averages
over rows weighs them with :meth:`EmbeddingForm.valid`.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcurv.layers.form import Form
from fxcurv.layers.spelling import Match, Operand, Site, spelling
from fxcurv.layers.view import Refused, View

aten = torch.ops.aten


class Entries(NamedTuple):
    """Lookups of a table, one an element of each tensor.

    examples: to which example it belongs; rows: index of its output-gradient row; tokens: index in the table; factors:
    with which the entry of the table enters the output.
    """

    examples: Tensor
    rows: Tensor
    tokens: Tensor
    factors: Tensor


@dataclass(frozen=True)
class EmbeddingForm(Form):
    """Rows of a table by index. x: integers (b, ...), all axes but the first are positions.

    padding_idx: the index whose row gets no gradient, or ``None``. tail: number of axes of one entry of the table.
    signed: indices may count from the end.
    """

    padding_idx: int | None = None
    tail: int = 1
    signed: bool = False

    def rows_a(self, x: Tensor, *aux: Tensor) -> Tensor:
        """One-hot rows in the default dtype; memory grows with the vocabulary, see :meth:`input_counts`."""
        rows = F.one_hot(self._indices(x), self.d_in) * self.valid(x).view(*x.shape, 1)
        return self._augment(rows.to(torch.get_default_dtype()).reshape(*_lead(x.shape), 1, self.d_in))

    def rows_g(self, g: Tensor) -> Tensor:
        """See :meth:`Form.rows_g`; g (b, ..., *entry), rows of padding included."""
        return g.reshape(*_lead(g.shape[: g.dim() - self.tail]), 1, self.d_out)

    def used_rows_g(self, x: Tensor, g: Tensor) -> Tensor:
        """See :meth:`Form.used_rows_g`."""
        rows = self.rows_g(g)
        return rows if self.padding_idx is None else rows * self.valid(x)[..., None, None].to(rows.dtype)

    def valid(self, x: Tensor) -> Tensor:
        """Whether a position carries gradient, shape (b, s), bool."""
        keep = torch.ones_like(x, dtype=torch.bool) if self.padding_idx is None else x != self.padding_idx
        return keep.reshape(_lead(x.shape))

    def entries(self, x: Tensor, dtype: torch.dtype, *aux: Tensor) -> Entries:
        """Every lookup that carries gradient."""
        keep = self.valid(x)
        tokens, flat = self._indices(x).reshape(keep.shape), keep.reshape(-1)
        examples = torch.arange(keep.shape[0], device=x.device).unsqueeze(1).expand_as(keep)[keep]
        factors = torch.full_like(examples, self.scale, dtype=dtype)
        return Entries(examples, flat.nonzero().squeeze(1), tokens[keep], factors)

    def input_counts(self, x: Tensor, dtype: torch.dtype = torch.float32, *aux: Tensor) -> Tensor:
        """Diagonal of the input Gram, shape (num_embeddings,): how often each index occurs, times ``scale`` squared."""
        return self.weighted_counts(x, self.valid(x).to(dtype))

    def weighted_counts(self, x: Tensor, weights: Tensor) -> Tensor:
        """The same of rows with a weight each, (b, s), 0 where a position carries no gradient."""
        counts = torch.zeros(self.d_in, dtype=weights.dtype, device=x.device)
        return counts.scatter_add_(0, self._indices(x).reshape(-1), weights.reshape(-1) * self.scale**2)

    def product(self, x: Tensor, g: Tensor, *aux: Tensor) -> Tensor:
        """See :meth:`Form.product`; adds rows by index instead of multiplying by one-hot rows."""
        rows = self.rows_g(g).reshape(-1, self.d_out) * (self.valid(x).reshape(-1, 1) * self.scale).to(g.dtype)
        table = g.new_zeros(self.d_in, self.d_out).index_add_(0, self._indices(x).reshape(-1), rows)
        return table.t().reshape(1, self.d_out, self.d_in)

    def _indices(self, x: Tensor) -> Tensor:
        return x.long() % self.d_in if self.signed else x.long()

    @property
    def diagonal_input(self) -> bool:
        """One-hot rows never overlap."""
        return True

    @property
    def tag(self) -> str:
        """See :attr:`Form.tag`."""
        return f"one_hot[{self.d_in} {self.padding_idx}]"


def _lead(shape: tuple[int, ...]) -> tuple[int, int]:
    """(b, s) of index axes: the first, and the product of the others."""
    return (shape[0] if shape else 1), math.prod(shape[1:])


def refuse_options(max_norm: Any, by_frequency: Any, sparse: Any) -> None:
    """Options under which the gradient is not that of a product; each refusal says what to do."""
    for used, option, remedy in (
        (max_norm is not None, "max_norm", "clip the table's rows outside the forward"),
        (by_frequency, "scale_grad_by_freq", "turn it off"),
        (sparse, "sparse gradients", "set sparse=False"),
    ):
        if used:
            raise Refused(
                f"is the table of an embedding with {option}, whose gradient is not that of a product: {remedy}, "
                "or keep the plain gradient"
            )


def of_table(view: View, padding_idx: Any = None) -> dict[str, Any]:
    """Fields of the form of a table (vocabulary, *entry): entries are outputs. A negative index counts from the end."""
    vocabulary, *entry = view.shape
    if padding_idx is not None and padding_idx < 0:
        padding_idx += vocabulary
    return {
        "groups": 1,
        "d_out": math.prod(entry),
        "d_in": vocabulary,
        "bias": False,
        "permutation": view.order((*range(1, 1 + len(entry)), 0)),
        "weight_shape": view.stored,
        "scale": view.scale,
        "padding_idx": padding_idx,
    }


def _match(at: Site, x: Any, weight: Operand, padding_idx: Any, max_norm: Any, by_frequency: Any, sparse: Any) -> Match:
    refuse_options(max_norm, by_frequency, sparse)
    form = EmbeddingForm(**of_table(weight.view, padding_idx))
    return Match("embedding", form, at.data(x), at.node, weight)


@spelling(nn.Embedding)
def _module(at: Site, input: Any) -> Match:
    module, weight = at.module, at.own("weight")
    if weight is None:
        raise Refused("belongs to an embedding without table")
    options = (module.padding_idx, module.max_norm, module.scale_grad_by_freq, module.sparse)
    return _match(at, input, weight, *options)


@spelling(F.embedding)
def _function(
    at: Site,
    input: Any,
    weight: Any,
    padding_idx: Any = None,
    max_norm: Any = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Match:
    return _match(at, input, at.weight(weight), padding_idx, max_norm, scale_grad_by_freq, sparse)


@spelling(aten.embedding.default)
def _aten(
    at: Site, weight: Any, indices: Any, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Match:
    padding = None if padding_idx < 0 else padding_idx
    return _match(at, indices, at.weight(weight), padding, None, scale_grad_by_freq, sparse)


def _lookup(at: Site, table: Any, index: Any) -> Match:
    """``table[index]`` with a tensor of integers, along the first axis: an embedding whose entries may be arrays."""
    weight, dtype = at.weight(table), index.meta.get("dtype") if isinstance(index, fx.Node) else None
    if dtype is None or dtype.is_floating_point or dtype is torch.bool:
        raise Refused("is indexed by what the graph computes")
    form = EmbeddingForm(**of_table(weight.view), tail=weight.view.ndim - 1, signed=True)
    return Match("embedding", form, at.data(index), at.node, weight)


@spelling("__getitem__", operator.getitem)
def _item(at: Site, table: Any, index: Any) -> Match:
    index = index[0] if isinstance(index, (tuple, list)) and len(index) == 1 else index
    return _lookup(at, table, index)


@spelling(aten.index.Tensor)
def _index(at: Site, table: Any, indices: Any) -> Match:
    if len(indices) != 1:
        raise Refused("is indexed along other axes than the first")
    return _lookup(at, table, indices[0])


@spelling("index_select", torch.index_select, aten.index_select.default)
def _index_select(at: Site, input: Any, dim: Any, index: Any) -> Match:
    if dim != 0:
        raise Refused("is indexed along other axes than the first")
    return _lookup(at, input, index)
