"""Reductions that need no rows: the same statistics straight from a layer's input and output gradient.

Rows are the definition; for some forms building them costs more than the statistic. Patches of a convolution overlap
and their Gram hardly needs them, one-hot rows of an embedding are read as indices, a count looks at
shapes only. Each entry is exact and declines (returns ``None``) where it does not apply.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxcurv.kernels.aten.operation import patch_gram
from fxcurv.kernels.aten.patches import positions_gram
from fxcurv.layers.bags import BagForm
from fxcurv.layers.conv import ConvForm
from fxcurv.layers.elements import ElementForm
from fxcurv.layers.embedding import EmbeddingForm
from fxcurv.layers.form import Form
from fxcurv.layers.norm import NormForm
from fxcurv.layers.recurrence.products import is_sequence
from fxcurv.layers.tap import reduction

Aux = tuple[Tensor, ...]


@reduction("count(a)")
def count_rows(form: Form, x: Tensor, g: Tensor, aux: Aux, states: Aux) -> Tensor | None:
    """Number of rows, from the shape of the output gradient's rows; only those that exist of unequal sequences."""
    if isinstance(form, EmbeddingForm):
        return form.valid(x).sum().to(g.dtype)
    if is_sequence(form) and aux:
        return aux[0].sum().to(g.dtype)
    rows = form.rows_g(g)
    return torch.full((), float(rows.shape[0] * rows.shape[1]), dtype=g.dtype, device=g.device)


@reduction("gram(a)", "triton")
def generated_gram_of_patches(form: Form, x: Tensor, g: Tensor, aux: Aux, states: Aux) -> Tensor | None:
    """Patch Gram of a convolution on a GPU, by a generated kernel that reads the image itself."""
    if not isinstance(form, ConvForm) or not x.is_cuda:
        return None
    from fxcurv.kernels.triton.conv_gram import conv_gram  # only a machine with Triton has this backend

    return conv_gram(x, form)


@reduction("gram(a)", "aten")
def gram_of_patches(form: Form, x: Tensor, g: Tensor, aux: Aux, states: Aux) -> Tensor | None:
    """Patch Gram of a convolution on the CPU, by the cheapest of several forms; elsewhere by patches."""
    return patch_gram(x, form) if isinstance(form, ConvForm) else None


@reduction("gram(g)", "aten")
def gram_of_positions(form: Form, x: Tensor, g: Tensor, aux: Aux, states: Aux) -> Tensor | None:
    """Output-gradient Gram of a convolution, straight from (b, C, positions)."""
    if not isinstance(form, ConvForm):
        return None
    columns = form.batched(g).flatten(2)
    if form.groups > 1:
        columns = columns.unflatten(1, (form.groups, form.d_out))
        return torch.matmul(columns, columns.mT).sum(0)
    return torch.bmm(columns, columns.mT).sum(0) if torch.compiler.is_compiling() else positions_gram(columns)


@reduction("diag_gram(a)")
def token_counts(form: Form, x: Tensor, g: Tensor, aux: Aux, states: Aux) -> Tensor | None:
    """Diagonal of an embedding's input Gram: how often each index occurs."""
    if isinstance(form, BagForm) and torch.compiler.is_compiling():
        return None
    return form.input_counts(x, g.dtype, *aux) if isinstance(form, (EmbeddingForm, BagForm)) else None


@reduction("weighted_diag_gram(a, g)")
def token_weights(form: Form, x: Tensor, g: Tensor, aux: Aux, states: Aux) -> Tensor | None:
    """Squared lengths of an embedding's output gradients, added up by index."""
    if not isinstance(form, EmbeddingForm):
        return None
    return form.weighted_counts(x, form.used_rows_g(x, g).square().sum((2, 3)))


@reduction("weighted_gram(g, a)")
def gram_of_lookups(form: Form, x: Tensor, g: Tensor, aux: Aux, states: Aux) -> Tensor | None:
    """Output-gradient Gram of an embedding, whose one-hot rows are all of one length."""
    if not isinstance(form, EmbeddingForm):
        return None
    rows = form.used_rows_g(x, g).reshape(-1, form.d_out)
    return rows.mT @ rows * form.scale**2


@reduction("weighted_diag_gram(g, a)")
def squares_of_lookups(form: Form, x: Tensor, g: Tensor, aux: Aux, states: Aux) -> Tensor | None:
    """The diagonal of the same."""
    if not isinstance(form, EmbeddingForm):
        return None
    return form.used_rows_g(x, g).square().sum((0, 1, 2)) * form.scale**2


@reduction("row_sum(a)")
def sum_of_rows(form: Form, x: Tensor, g: Tensor, aux: Aux, states: Aux) -> Tensor | None:
    """Sum of a convolution's patches: the patches of the summed image. Of one-hot rows: how often each index occurs."""
    if isinstance(form, EmbeddingForm):
        return form.input_counts(x, g.dtype, *aux) / form.scale
    if not isinstance(form, ConvForm):
        return None
    images = form.batched(x)
    total = form.rows_a(images.sum(0, keepdim=True)).sum((0, 1))
    if form.bias:  # the constant is not part of the image
        total = torch.cat([total[:, :-1], total[:, -1:] * images.shape[0]], 1)
    return total.squeeze(0) if form.groups == 1 else total


@reduction("channel_gram(a, #)")
def gram_of_pixels(form: Form, x: Tensor, g: Tensor, aux: Aux, states: Aux) -> Tensor | None:
    """Channel moments of a convolution's patches, straight from the image."""
    if not isinstance(form, ConvForm):
        return None
    total = form.channel_gram(x)
    return total.squeeze(0) if form.groups == 1 else total


@reduction("grad_square(a, g)")
def squares(form: Form, x: Tensor, g: Tensor, aux: Aux, states: Aux) -> Tensor | None:
    """Squared per-example gradients of an embedding, Mat[embedding_dim, num_embeddings], or of single entries."""
    if isinstance(form, ElementForm):
        return form.example_gradients(x, g, *aux).square().sum(0).unsqueeze(1)
    return _token_squares(form, x, form.rows_g(g), aux) if _by_index(form) else None


@reduction("grad_gram(a, g)")
def unit_blocks(form: Form, x: Tensor, g: Tensor, aux: Aux, states: Aux) -> Tensor | None:
    """The whole block of every entry of an element-wise parameter or of every unit of a norm, Psd[groups; d_in].

    Without rows: positions are summed in the layout of the data, before the (few) coordinates of a unit meet.
    """
    if not isinstance(form, (ElementForm, NormForm)):
        return None
    gradients = form.example_gradients(x, g, *aux)
    return torch.einsum("bgi,bgj->gij", gradients, gradients)


@reduction("second_moment(a, g, $, $)")
def token_moments(form: Form, x: Tensor, g: Tensor, aux: Aux, states: Aux) -> Tensor | None:
    """The same with the output gradient turned into the basis of G; a one-hot input's basis is the identity."""
    if not _by_index(form) or states[0].ndim != 1:
        return None
    basis_a, basis_g = states
    rows = form.rows_g(g)
    rows = rows * basis_g if basis_g.ndim == 1 else rows @ basis_g
    return _token_squares(form, x, rows, aux) * basis_a.square()


def _by_index(form: Form) -> bool:
    # Finding the tokens of each example gives tensors of unknown size, which a compiled graph cannot hold.
    return isinstance(form, (EmbeddingForm, BagForm)) and not torch.compiler.is_compiling()


def _token_squares(form: Form, x: Tensor, rows: Tensor, aux: Aux) -> Tensor:
    """Sum over examples of (sum of ``rows`` over the places where a token occurs in the example)^2, by token."""
    assert isinstance(form, (EmbeddingForm, BagForm))
    entries = form.entries(x, rows.dtype, *aux)
    found, place = torch.unique(entries.examples * form.d_in + entries.tokens, return_inverse=True)
    terms = rows.reshape(-1, form.d_out)[entries.rows] * entries.factors.unsqueeze(1)
    sums = rows.new_zeros(len(found), form.d_out).index_add_(0, place, terms)
    table = rows.new_zeros(form.d_in, form.d_out).index_add_(0, found % form.d_in, sums.square())
    return table.t().contiguous()
