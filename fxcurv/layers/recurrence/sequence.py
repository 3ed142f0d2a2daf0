"""Between the user's layout of a sequence and the time-major one of the loops: plain, unbatched and packed sequences.

A packed sequence is padded to (T, B, d) with its sequences in packed order (falling length). Everything here is a pure
function that a graph can call; what a packed sequence holds is read from it when the graph runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fxcurv.errors import FxcurvError
from fxcurv.layers.recurrence.operators import mask_of

aten = torch.ops.aten


def enter(x: Any, batch_first: bool) -> Tensor:
    """The input as contiguous (T, B, d); a sequence without batch axis has B = 1."""
    if isinstance(x, PackedSequence):
        raise FxcurvError(
            "a recurrent layer received a packed sequence where the captured graph shows a tensor; pack it in the "
            "model's forward with pack_padded_sequence right before the layer, or pass it as an argument of the model."
        )
    x = x.unsqueeze(1) if x.dim() == 2 else x.transpose(0, 1) if batch_first else x
    return x.contiguous()  # type: ignore[no-any-return]


def leave(out: Tensor, x: Tensor, batch_first: bool) -> Tensor:
    """The outputs (T, B, d) in the layout of the input ``x``."""
    return out.squeeze(1) if x.dim() == 2 else out.transpose(0, 1) if batch_first else out


def enter_packed(packed: PackedSequence) -> Tensor:
    """The data of a packed sequence as (T, B, d) with zeros where no step exists."""
    return pad(packed.data, packed.batch_sizes)


def leave_packed(out: Tensor, packed: PackedSequence) -> PackedSequence:
    """The outputs (T, B, d) packed like the input."""
    return PackedSequence(pack(out, packed.batch_sizes), *packed[1:])


def sizes_of(packed: PackedSequence) -> Tensor:
    """Number of sequences that run at each step, (T,), on the host."""
    return packed.batch_sizes


def steps_of(x: Tensor, batch_sizes: Tensor) -> Tensor:
    """Which (step, sequence) of a padded x (T, B, d) exists, (T, B), bool."""
    return mask_of(batch_sizes, x.shape[1], x.device)


def initial(x: Tensor, hx: Tensor | None, index: int, size: int, packed: PackedSequence | None = None) -> Tensor:
    """The initial state (B, size) of one layer and direction; x (T, B, d) is the sequence, hx the user's argument."""
    batch = x.shape[1]
    if hx is None:
        return x.new_zeros(batch, size)
    state = (hx.unsqueeze(1) if hx.dim() == 2 else hx)[index]
    if tuple(state.shape) != (batch, size):
        raise FxcurvError(
            f"an initial state of a recurrent layer has shape {tuple(hx.shape)}, which does not fit {batch} sequences "
            f"with states of size {size}; pass one of shape (layers * directions, {batch}, {size})."
        )
    order = None if packed is None else packed.sorted_indices
    return state.to(x.dtype) if order is None else state.index_select(0, order).to(x.dtype)


def final(states: Sequence[Tensor], x: Any) -> Tensor:
    """Last states (layers * directions, B, size) in the order and with the axes that the user's input has."""
    if isinstance(x, PackedSequence):
        stacked = torch.stack(tuple(states))
        return stacked if x.unsorted_indices is None else stacked.index_select(1, x.unsorted_indices)
    stacked = torch.stack(tuple(states))
    return stacked.squeeze(1) if x.dim() == 2 else stacked


def before(hs: Tensor) -> Tensor:
    """The states (T, B, R) that the steps start from, of all states (T + 1, B, R)."""
    return hs[:-1]


def after(hs: Tensor) -> Tensor:
    """The states (T, B, R) that the steps end with, of all states (T + 1, B, R)."""
    return hs[1:]


def reverse(x: Tensor, batch_sizes: Tensor | None) -> Tensor:
    """(T, B, d) with time reversed within each sequence; its own inverse."""
    if batch_sizes is None:
        return x.flip(0)
    mask = mask_of(batch_sizes, x.shape[1], x.device)
    step = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    index = torch.where(mask, mask.sum(0) - 1 - step, step)
    return x.gather(0, index.unsqueeze(-1).expand_as(x))


def dropout(x: Tensor, p: float, batch_sizes: Tensor | None) -> Tensor:
    """Dropout between layers with the draws of the original: over (T, B, d), or over the packed data."""
    if batch_sizes is None:
        return F.dropout(x, p)
    return pad(F.dropout(pack(x, batch_sizes), p), batch_sizes)


def shown(hs: Tensor) -> Tensor:
    """Outputs (T, B, R) from all states (T + 1, B, R); what lies at steps that do not exist is never read.

    A copy, so that an in-place operation on the output does not change what the backward reads.
    """
    return hs[1:].clone()


def features(state: Tensor) -> int:
    """Size of a state's last axis."""
    return state.shape[-1]


def pad(data: Tensor, batch_sizes: Tensor) -> Tensor:
    """Packed data (sum of lengths, d) as (T, B, d) with zeros where no step exists."""
    padded: Tensor = aten._pad_packed_sequence.default(data, batch_sizes, False, 0.0, batch_sizes.shape[0])[0]
    return padded


def pack(x: Tensor, batch_sizes: Tensor) -> Tensor:
    """(T, B, d) as packed data (sum of lengths, d)."""
    lengths = mask_of(batch_sizes, x.shape[1], batch_sizes.device).sum(0)
    data: Tensor = aten._pack_padded_sequence.default(x, lengths, False)[0]
    return data
