"""Embedding bags: a linear layer on rows that count the indices of a bag.

A row holds, for each index, the sum of the factors with which it enters the bag's output (1, one over the size of the
bag, or the weight of the sample). Rows exist for tests and oracles only. Their second moment is kept as its diagonal,
like that of an embedding; what the indices of one bag have in common is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcurv.layers.embedding import Entries, of_table, refuse_options
from fxcurv.layers.form import Form
from fxcurv.layers.norm import first_result
from fxcurv.layers.spelling import Match, Operand, Site, spelling
from fxcurv.layers.view import Refused

aten = torch.ops.aten
MODES = ("sum", "mean", "max")  # in the order in which ATen numbers them


@dataclass(frozen=True)
class BagForm(Form):
    """Sums or means of rows of a table. x: integers (bags, size), or all bags in a row (n,) with their offsets.

    aux: the offsets where ``offsets``, then weights shaped like x where ``weighted``. mode: "sum" or "mean".
    last: the offsets end with the total number of indices. padding_idx: an index that no bag counts, or ``None``.
    """

    mode: str = "mean"
    offsets: bool = False
    last: bool = False
    weighted: bool = False
    padding_idx: int | None = None

    def rows_a(self, x: Tensor, *aux: Tensor) -> Tensor:
        """See :meth:`Form.rows_a`; memory grows with the vocabulary, see :meth:`input_counts`."""
        dtype = aux[-1].dtype if self.weighted else torch.get_default_dtype()
        bags, bag, tokens, factors = self._lookups(x, dtype, *aux)
        rows = factors.new_zeros(bags * self.d_in).index_add_(0, bag * self.d_in + tokens, factors * self.scale)
        return rows.view(bags, 1, 1, self.d_in)

    def rows_g(self, g: Tensor) -> Tensor:
        """See :meth:`Form.rows_g`; g (bags, embedding_dim)."""
        return g.reshape(-1, 1, 1, self.d_out)

    def entries(self, x: Tensor, dtype: torch.dtype, *aux: Tensor) -> Entries:
        """Every lookup that carries gradient; see :class:`~fxcurv.layers.embedding.Entries`."""
        _, bag, tokens, factors = self._lookups(x, dtype, *aux)
        keep = factors != 0
        return Entries(bag[keep], bag[keep], tokens[keep], factors[keep] * self.scale)

    def input_counts(self, x: Tensor, dtype: torch.dtype = torch.float32, *aux: Tensor) -> Tensor:
        """Diagonal of the input Gram, shape (num_embeddings,)."""
        examples, _, tokens, factors = self.entries(x, dtype, *aux)
        found, place = torch.unique(examples * self.d_in + tokens, return_inverse=True)
        sums = torch.zeros(len(found), dtype=dtype, device=x.device).index_add_(0, place, factors)
        counts = torch.zeros(self.d_in, dtype=dtype, device=x.device)
        return counts.index_add_(0, found % self.d_in, sums.square())

    def product(self, x: Tensor, g: Tensor, *aux: Tensor) -> Tensor:
        """See :meth:`Form.product`; adds rows by index."""
        _, bag, tokens, factors = self._lookups(x, g.dtype, *aux)
        rows = g.reshape(-1, self.d_out)[bag] * (factors * self.scale).unsqueeze(1)
        return g.new_zeros(self.d_in, self.d_out).index_add_(0, tokens, rows).t().unsqueeze(0)

    def _lookups(self, x: Tensor, dtype: torch.dtype, *aux: Tensor) -> tuple[int, Tensor, Tensor, Tensor]:
        """Number of bags, and for each index its bag, itself and its factor (0 for padding)."""
        tokens = x.reshape(-1).long()
        if self.offsets:
            starts = aux[0][:-1] if self.last else aux[0]
            bags = starts.shape[0]
            places = torch.arange(tokens.shape[0], device=x.device)
            bag = torch.searchsorted(starts.to(places.dtype), places, right=True) - 1
        else:
            bags = x.shape[0]
            bag = torch.arange(bags, device=x.device).unsqueeze(1).expand_as(x).reshape(-1)
        factors = aux[-1].reshape(-1).to(dtype) if self.weighted else torch.ones_like(tokens, dtype=dtype)
        if self.padding_idx is not None:
            factors = factors * (tokens != self.padding_idx)
        if self.mode == "mean":
            sizes = factors.new_zeros(bags).index_add_(0, bag, factors)
            factors = factors / sizes.clamp(min=1)[bag]
        return bags, bag, tokens, factors

    @property
    def diagonal_input(self) -> bool:
        """Only the diagonal is kept."""
        return True

    @property
    def tag(self) -> str:
        """See :attr:`Form.tag`."""
        options = (self.d_in, self.mode, self.offsets, self.last, self.weighted, self.padding_idx)
        return f"bag[{' '.join(map(str, options))}]"


def _match(
    at: Site,
    x: Any,
    weight: Operand,
    offsets: Any,
    mode: Any,
    samples: Any,
    last: Any,
    padding_idx: Any,
    options: tuple[Any, Any, Any],
    y: fx.Node | None = None,
) -> Match:
    """``options``: max_norm, scale_grad_by_freq, sparse."""
    refuse_options(*options)
    mode = MODES[mode] if isinstance(mode, int) else mode
    if mode not in ("sum", "mean"):
        raise Refused(f"is the table of an embedding bag with mode '{mode}', which is no linear product")
    if at.operand(samples) is not None:
        raise Refused("meets weights of an embedding bag that are a parameter themselves")
    form = BagForm(
        **of_table(weight.view, padding_idx),
        mode=mode,
        offsets=offsets is not None,
        last=bool(last),
        weighted=samples is not None,
    )
    aux = tuple(at.data(node) for node in (offsets, samples) if node is not None)
    return Match("embedding_bag", form, at.data(x), y or at.node, weight, None, aux)


@spelling(nn.EmbeddingBag)
def _module(at: Site, input: Any, offsets: Any = None, per_sample_weights: Any = None) -> Match:
    module, weight = at.module, at.own("weight")
    if weight is None:
        raise Refused("belongs to an embedding bag without table")
    options = (module.max_norm, module.scale_grad_by_freq, module.sparse)
    last, padding = module.include_last_offset, module.padding_idx
    return _match(at, input, weight, offsets, module.mode, per_sample_weights, last, padding, options)


@spelling(F.embedding_bag)
def _function(
    at: Site,
    input: Any,
    weight: Any,
    offsets: Any = None,
    max_norm: Any = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: Any = None,
) -> Match:
    options, operand = (max_norm, scale_grad_by_freq, sparse), at.weight(weight)
    return _match(at, input, operand, offsets, mode, per_sample_weights, include_last_offset, padding_idx, options)


@spelling(aten.embedding_bag.default, aten.embedding_bag.padding_idx)
@spelling(aten._embedding_bag.default, aten._embedding_bag_forward_only.default)
def _aten(
    at: Site,
    weight: Any,
    indices: Any,
    offsets: Any,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: Any = None,
) -> Match:
    options, operand = (None, scale_grad_by_freq, sparse), at.weight(weight)
    padding = None if padding_idx is None or padding_idx < 0 and at.node.target is not _PADDED else padding_idx
    y = first_result(at)
    return _match(at, indices, operand, offsets, mode, per_sample_weights, include_last_offset, padding, options, y)


_PADDED = aten.embedding_bag.padding_idx  # the overload in which a negative index counts from the end
