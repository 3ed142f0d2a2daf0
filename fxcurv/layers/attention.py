"""Attention modules as visible products: ``nn.MultiheadAttention`` and ``F.multi_head_attention_forward``.

Query, key and value projections are products of their own, on data brought to (B, T, features): one with the whole
fused weight where all three read the same tensor, else with its parts. What lies between them and the output projection
has no weights and stays one node, :func:`attend`. It repeats torch's operations, shapes and order of random draws, so
that values agree to rounding and dropout draws the same masks. The ``export`` front-end decomposes these modules by
itself; see :mod:`fxcurv.layers.exported`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcurv.errors import FxcurvError
from fxcurv.layers.expose import Exposure, exposes
from fxcurv.layers.view import Refused


def examples_first(x: Tensor, batch_first: bool) -> Tensor:
    """(B, T, features) from the layout of the module, or from (T, features) without batch."""
    if x.dim() == 2:
        return x.unsqueeze(0)
    return x if batch_first else x.transpose(0, 1)


def as_module(y: Tensor, query: Tensor, weights: Tensor | None, batch_first: bool) -> tuple[Tensor, Tensor | None]:
    """The module's results from the output (B, T, E): layout in memory as torch has it, for dropout that follows."""
    if query.dim() == 2:
        return y.squeeze(0), weights
    y = y.transpose(0, 1).contiguous()
    return (y.transpose(0, 1) if batch_first else y), weights


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    heads: int,
    dropout: float,
    need_weights: bool,
    average: bool,
    is_causal: bool,
    zero: bool,
    more: int,
) -> tuple[Tensor, Tensor | None]:
    """Attention between projected q (B, T, E) and k, v (B, S, E): the output (B, T, E) and the weights if asked for.

    query: the module's own input, for its rank and dtype. zero: whether a key and value of zeros is added. more: how
    many keys were added behind those that the masks know.
    """
    (b, t, e), batched = q.shape, query.dim() == 3
    if key_padding_mask is not None and not batched:
        key_padding_mask = key_padding_mask.unsqueeze(0)
    key_padding_mask = _additive(key_padding_mask, query.dtype)
    if is_causal and key_padding_mask is None and not need_weights:
        attn_mask = None
    else:
        attn_mask = _additive(attn_mask, query.dtype)
        is_causal = is_causal and key_padding_mask is None
    q, k, v = (x.reshape(b, -1, heads, e // heads).transpose(1, 2) for x in (q, k, v))
    if attn_mask is not None:
        attn_mask = _fitting(attn_mask, b * heads, t, k.shape[2] - more)
    if zero:
        k, v = (torch.cat([x, x.new_zeros(b, heads, 1, e // heads)], dim=2) for x in (k, v))
    s, more = k.shape[2], more + zero
    if attn_mask is not None and more:
        attn_mask = F.pad(attn_mask, (0, more))
    if key_padding_mask is not None:
        padding = F.pad(key_padding_mask, (0, more)) if more else key_padding_mask
        padding = padding.view(b, 1, 1, s).expand(-1, heads, -1, -1).reshape(b * heads, 1, s)
        attn_mask = padding if attn_mask is None else attn_mask + padding
    weights = None
    if need_weights:
        q, k, v = (x.reshape(b * heads, -1, e // heads) for x in (q, k, v))
        q = q * math.sqrt(1.0 / float(e // heads))
        scores = torch.bmm(q, k.mT) if attn_mask is None else torch.baddbmm(attn_mask, q, k.mT)
        weights = F.softmax(scores, dim=-1)
        weights = F.dropout(weights, dropout) if dropout > 0.0 else weights
        out = torch.bmm(weights, v).view(b, heads, t, -1)
        weights = weights.view(b, heads, t, s)
        weights = weights.mean(1) if average else weights
        weights = weights if batched else weights.squeeze(0)
    else:
        if attn_mask is not None:
            attn_mask = attn_mask.unsqueeze(0) if attn_mask.shape[0] == 1 else attn_mask.view(b, heads, -1, s)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal)
    return out.transpose(1, 2).reshape(b, t, e), weights


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask that is added to the scores: a boolean one says where not to look."""
    if mask is None or mask.is_floating_point():
        return mask
    if mask.dtype is not torch.bool:
        raise FxcurvError(f"an attention mask has dtype {mask.dtype}; pass a boolean or a floating-point mask.")
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)


def _fitting(mask: Tensor, stack: int, t: int, s: int) -> Tensor:
    """A mask with three axes, the first 1 or ``stack`` (examples times heads)."""
    wanted = {2: (t, s), 3: (stack, t, s)}.get(mask.dim())
    if tuple(mask.shape) != wanted:
        raise FxcurvError(f"attn_mask has shape {tuple(mask.shape)}; it must be {(t, s)} or {(stack, t, s)}.")
    return mask.unsqueeze(0) if mask.dim() == 2 else mask


@exposes(nn.MultiheadAttention)
def _module(
    at: Exposure,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any = None,
    need_weights: Any = True,
    attn_mask: Any = None,
    average_attn_weights: Any = True,
    is_causal: Any = False,
) -> fx.Node:
    module = at.module
    fused = at.own("in_proj_weight")
    weights = fused if fused is not None else tuple(at.own(f"{role}_proj_weight") for role in "qkv")
    projections = _Parts(weights, at.own("in_proj_bias"), module.embed_dim)
    extra = (at.own("bias_k"), at.own("bias_v"))
    dropout = module.dropout if module.training else 0.0
    settings = (module.num_heads, dropout, need_weights, average_attn_weights, is_causal, module.add_zero_attn)
    masks = (attn_mask, key_padding_mask)
    inputs, last = (query, key, value), (at.own("out_proj.weight"), at.own("out_proj.bias"))
    return _expose(at, inputs, projections, extra, last, masks, settings, module.batch_first)


@exposes(F.multi_head_attention_forward)
def _function(
    at: Exposure,
    query: Any,
    key: Any,
    value: Any,
    embed_dim_to_check: Any,
    num_heads: Any,
    in_proj_weight: Any,
    in_proj_bias: Any,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: Any,
    dropout_p: Any,
    out_proj_weight: Any,
    out_proj_bias: Any,
    training: Any = True,
    key_padding_mask: Any = None,
    need_weights: Any = True,
    attn_mask: Any = None,
    use_separate_proj_weight: Any = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    static_k: Any = None,
    static_v: Any = None,
    average_attn_weights: Any = True,
    is_causal: Any = False,
) -> fx.Node:
    if static_k is not None or static_v is not None:
        raise Refused("is used by an attention function with static keys or values, which makes its weights idle")
    if not isinstance(training, bool) or not isinstance(use_separate_proj_weight, bool):
        raise Refused("is used by an attention function whose mode the graph computes")
    separate = (q_proj_weight, k_proj_weight, v_proj_weight)
    size = embed_dim_to_check if isinstance(embed_dim_to_check, int) else None
    projections = _Parts(separate if use_separate_proj_weight else in_proj_weight, in_proj_bias, size)
    settings = (
        num_heads, dropout_p if training else 0.0, need_weights, average_attn_weights, is_causal, add_zero_attn,
    )  # fmt: skip
    last, masks = (out_proj_weight, out_proj_bias), (attn_mask, key_padding_mask)
    return _expose(at, (query, key, value), projections, (bias_k, bias_v), last, masks, settings, False)


class _Parts:
    """Weights and biases of the three projections; a fused weight is used whole where it can be.

    weights: the fused weight or three separate ones; bias: of all three, ``None`` without; size: outputs of each,
    ``None`` where the graph computes it.
    """

    def __init__(self, weights: Any, bias: Any, size: int | None) -> None:
        self.weights, self.bias, self.size = weights, bias, size

    def project(self, at: Exposure, data: list[fx.Node]) -> list[fx.Node]:
        """q, k and v from the three inputs, (B, T, features) each."""
        if isinstance(self.weights, fx.Node):
            if data[0] is data[1] is data[2]:
                both = at.call(F.linear, data[0], self.weights, self.bias)
                return at.items(at.call(torch.chunk, both, 3, -1), 3)
            if data[1] is data[2] and self.size is not None:
                pair = [self._slice(at, tensor) for tensor in (self.weights, self.bias)]
                query, both = (
                    at.call(F.linear, x, *parts) for x, parts in zip(data[:2], zip(*pair, strict=True), strict=True)
                )
                return [query, *at.items(at.call(torch.chunk, both, 2, -1), 2)]
        weights = self._thirds(at, self.weights)
        biases = self._thirds(at, self.bias)
        return [at.call(F.linear, x, w, b) for x, w, b in zip(data, weights, biases, strict=True)]

    def _slice(self, at: Exposure, tensor: fx.Node | None) -> tuple[fx.Node | None, fx.Node | None]:
        """The query's part and the part of key and value together."""
        if tensor is None:
            return None, None
        size = self.size or 0
        return at.call(torch.narrow, tensor, 0, 0, size), at.call(torch.narrow, tensor, 0, size, 2 * size)

    def _thirds(self, at: Exposure, tensor: Any) -> list[Any]:
        if tensor is None:
            return [None] * 3
        if isinstance(tensor, tuple):
            return list(tensor)
        if tensor.target is torch.cat and len(tensor.args) == 1 and len(tensor.args[0]) == 3:
            return list(tensor.args[0])  # three biases joined for the call alone
        return at.items(at.call(torch.chunk, tensor, 3), 3)


def _expose(
    at: Exposure,
    inputs: tuple[Any, Any, Any],
    projections: _Parts,
    extra: tuple[Any, Any],
    last: tuple[Any, Any],
    masks: tuple[Any, Any],
    settings: tuple[Any, ...],
    batch_first: bool,
) -> fx.Node:
    """The nodes of one attention: projections, keys and values of ``extra``, :func:`attend`, output projection."""
    is_causal = settings[4]
    if not all(isinstance(node, fx.Node) for node in inputs) or (is_causal is True and masks[0] is None):
        raise Refused("belongs to an attention with arguments that are not understood")
    turned = {node: at.call(examples_first, node, batch_first) for node in dict.fromkeys(inputs)}
    q, k, v = projections.project(at, [turned[node] for node in inputs])
    if extra[0] is not None:
        examples = at.graph.call_method("size", (q, 0))
        more = [at.graph.call_method("expand", (bias, examples, -1, -1)) for bias in extra]
        k, v = (at.call(torch.cat, [x, bias], 1) for x, bias in zip((k, v), more, strict=True))
    query = inputs[0]
    attended = at.call(attend, q, k, v, query, *masks, *settings, int(extra[0] is not None))
    out, weights = at.items(attended, 2)
    return at.call(as_module, at.call(F.linear, out, *last), query, weights, batch_first)
