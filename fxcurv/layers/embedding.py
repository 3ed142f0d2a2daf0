"""Embeddings: a linear layer on one-hot rows, whose input second moment is diagonal.

The normal-form weight is (1, embedding_dim, num_embeddings), the transpose of the stored table. One-hot rows
exist for tests and oracles only; everything that needs the input reads the indices instead. A padding index
has an all-zero row, which takes its positions out of the weight's gradient and of the input counts. The
gradient rows of these positions are *not* zeroed, since they are read without the indices: whoever averages
over rows weighs them with :meth:`EmbeddingForm.valid`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcurv.layers.form import Form
from fxcurv.layers.spelling import Match, Operand, Site, spelling
from fxcurv.layers.view import Refused

aten = torch.ops.aten


@dataclass(frozen=True)
class EmbeddingForm(Form):
    """Rows of a table by index. x: integers (b, ...), all axes but the first are positions.

    padding_idx: the index whose row gets no gradient, or ``None``.
    """

    padding_idx: int | None = None

    def rows_a(self, x: Tensor, *aux: Tensor) -> Tensor:
        """One-hot rows in the default dtype; memory grows with the vocabulary, see :meth:`input_counts`."""
        rows = F.one_hot(x.long(), self.d_in) * self.valid(x).view(*x.shape, 1)
        return self._augment(rows.to(torch.get_default_dtype()).reshape(*_lead(x.shape), 1, self.d_in))

    def rows_g(self, g: Tensor) -> Tensor:
        """See :meth:`Form.rows_g`; g (b, ..., embedding_dim), rows of padding included."""
        return g.reshape(*_lead(g.shape[:-1]), 1, self.d_out)

    def used_rows_g(self, x: Tensor, g: Tensor) -> Tensor:
        """See :meth:`Form.used_rows_g`."""
        rows = self.rows_g(g)
        return rows if self.padding_idx is None else rows * self.valid(x)[..., None, None].to(rows.dtype)

    def valid(self, x: Tensor) -> Tensor:
        """Whether a position carries gradient, shape (b, s), bool."""
        keep = torch.ones_like(x, dtype=torch.bool) if self.padding_idx is None else x != self.padding_idx
        return keep.reshape(_lead(x.shape))

    def input_counts(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Diagonal of the input Gram, shape (num_embeddings,): how often each index occurs, times ``scale`` squared."""
        weights = self.valid(x).reshape(-1).to(dtype) * self.scale**2
        return torch.zeros(self.d_in, dtype=dtype, device=x.device).scatter_add_(0, x.reshape(-1).long(), weights)

    def product(self, x: Tensor, g: Tensor, *aux: Tensor) -> Tensor:
        """See :meth:`Form.product`; adds rows by index instead of multiplying by one-hot rows."""
        rows = self.rows_g(g).reshape(-1, self.d_out) * (self.valid(x).reshape(-1, 1) * self.scale).to(g.dtype)
        table = g.new_zeros(self.d_in, self.d_out).index_add_(0, x.reshape(-1).long(), rows)
        return table.t().reshape(1, self.d_out, self.d_in)

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


def _match(at: Site, x: Any, weight: Operand, padding_idx: Any, max_norm: Any, by_frequency: Any, sparse: Any) -> Match:
    if max_norm is not None or by_frequency or sparse:
        option = "max_norm" if max_norm is not None else "scale_grad_by_freq" if by_frequency else "sparse"
        raise Refused(f"is the table of an embedding with {option}, whose gradient is not that of a product")
    vocabulary, size = weight.view.shape
    if padding_idx is not None and padding_idx < 0:
        padding_idx += vocabulary
    form = EmbeddingForm(
        groups=1,
        d_out=size,
        d_in=vocabulary,
        bias=False,
        permutation=weight.view.order((1, 0)),
        weight_shape=weight.view.stored,
        scale=weight.view.scale,
        padding_idx=padding_idx,
    )
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
