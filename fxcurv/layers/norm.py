"""Scale and shift of normalisation layers: every unit is its own 1 x 2 product with (normalised input, 1).

The normal form has one group per scale entry, so the exact curvature block of a unit is 2 x 2 (1 x 1 without
shift). The normalised input is recomputed from the layer's input: it is not a node of the graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcurv.layers.elements import element_match
from fxcurv.layers.form import Form
from fxcurv.layers.spelling import Match, Operand, Site, is_plain, numbers, spelling
from fxcurv.layers.view import Refused

aten = torch.ops.aten
CHANNELS = ("batch_norm", "group_norm", "instance_norm")
"""Kinds whose units are the channels, axis 1; the others' are the last axes."""


@dataclass(frozen=True)
class NormForm(Form):
    """Scale and shift after a normalisation.

    kind: "layer_norm", "rms_norm" (over the last axes), "batch_norm", "group_norm", "instance_norm" (channels are
        axis 1). eps: as in torch; parts: number of groups that a group norm normalises over.
    running: with running statistics, given as ``aux`` (mean, variance), instead of those of the data.
    rank: number of axes of an input without batch axis, where the operation takes one; 0 where it does not.
    """

    kind: str = "layer_norm"
    eps: float | None = 1e-5
    parts: int = 1
    running: bool = False
    rank: int = 0

    def rows_a(self, x: Tensor, *aux: Tensor) -> Tensor:
        """See :meth:`Form.rows_a`; the normalised input (and 1). aux: running mean and variance if ``running``."""
        x = x.unsqueeze(0) if x.dim() == self.rank else x
        return self._augment(self._rows(self._normalise(x, *aux)).unsqueeze(-1))

    def rows_g(self, g: Tensor) -> Tensor:
        """See :meth:`Form.rows_g`."""
        return self._rows(g).unsqueeze(-1)

    def example_gradients(self, x: Tensor, g: Tensor, *aux: Tensor) -> Tensor:
        """Gradients of single examples, (b, groups, d_in): positions are summed; rows are never built."""
        x = x.unsqueeze(0) if x.dim() == self.rank else x
        rows = self._rows(g)
        shift = rows.sum(1)
        if self.kind == "batch_norm" and x.is_floating_point():
            # The data's layout, few passes: the sum over positions of (x - mean) g, then the division by the deviation.
            data = x.to(g.dtype).reshape(*x.shape[:2], -1)
            mean = aux[0].to(g.dtype) if self.running else data.mean((0, 2))
            data = data - mean.unsqueeze(1)
            count = data.shape[0] * data.shape[2]
            variance = aux[1] if self.running else torch.linalg.vector_norm(data, dim=2).square().sum(0) / count
            products = data.mul_(g.reshape(data.shape)).sum(2)
            scale = products * torch.rsqrt(variance.to(g.dtype) + (self.eps or 0.0)) * self.scale
        else:
            scale = (self._rows(self._normalise(x, *aux)) * rows).sum(1) * self.scale
        return torch.stack([scale, shift], -1) if self.bias else scale.unsqueeze(-1)

    def _normalise(self, x: Tensor, *aux: Tensor) -> Tensor:
        if self.kind == "layer_norm":
            return F.layer_norm(x, self.weight_shape, eps=self.eps or 0.0)
        if self.kind == "rms_norm":
            return F.rms_norm(x, self.weight_shape, eps=self.eps)
        if self.kind == "group_norm":
            return F.group_norm(x, self.parts, eps=self.eps or 0.0)
        if not self.running:
            if self.kind == "instance_norm":
                return F.instance_norm(x, eps=self.eps or 0.0)
            return F.batch_norm(x, None, None, training=True, eps=self.eps or 0.0)
        mean, variance = (stat.reshape(-1, *(1,) * (x.dim() - 2)) for stat in aux)
        return (x - mean) * torch.rsqrt(variance + (self.eps or 0.0))

    def _rows(self, tensor: Tensor) -> Tensor:
        if self.kind in CHANNELS:
            tensor = tensor.unsqueeze(0) if tensor.dim() == self.rank else tensor
            return tensor.reshape(tensor.shape[0], self.groups, -1).transpose(1, 2)
        lead = tensor.shape[: tensor.dim() - len(self.weight_shape)]
        return tensor.reshape(*(lead[:1] or (1,)), math.prod(lead[1:]), self.groups)

    @property
    def unitwise(self) -> bool:
        """A unit's block is at most 2 x 2."""
        return True

    @property
    def tag(self) -> str:
        """See :attr:`Form.tag`."""
        shape = "x".join(map(str, self.weight_shape))
        return f"{self.kind}[{shape} {self.eps} {self.parts}{' running' if self.running else ''}]{self._constant}"


def norm_match(
    at: Site,
    x: Any,
    shape: tuple[int, ...],
    weight: Operand | None,
    bias: Operand | None,
    y: fx.Node | None = None,
    aux: tuple[fx.Node, ...] = (),
    **fields: Any,
) -> Match:
    scale = 1.0
    if bias is not None and bias.trainable and (weight is None or not weight.trainable):
        return _shift(bias, y or at.node, fields["kind"], fields.get("rank", 0))
    if weight is not None:
        if not is_plain(weight.view) or math.prod(weight.view.shape) != math.prod(shape):
            raise Refused("scales a normalisation in an order that is not its own")
        shape, scale = weight.view.stored, weight.view.scale
        if fields["kind"] in ("layer_norm", "rms_norm") and shape != weight.view.shape:
            raise Refused("is the scale of a normalisation after a reshape")
    form = NormForm(
        groups=math.prod(shape),
        d_out=1,
        d_in=1,
        bias=False,
        permutation=tuple(range(len(shape))),
        weight_shape=shape,
        scale=scale,
        **fields,
    )
    return Match(fields["kind"], form, at.data(x), y or at.node, weight, bias, aux)


def _shift(bias: Operand, y: fx.Node, kind: str, rank: int) -> Match:
    """A norm whose shift alone is trained: a shift of its output."""
    if rank:  # with or without batch axis, channels have the same place from the right
        return element_match("shift", bias, y, y, view=bias.view.reshape([-1, *(1,) * (rank - 1)]))
    return element_match("shift", bias, y, y, start=1 if kind in CHANNELS else None)


def first_result(at: Site) -> fx.Node:
    """The first result of an operation that returns (output, mean, rstd)."""
    for user in at.node.users:
        if len(user.args) == 2 and user.args[1] == 0:
            return user
    raise Refused("is used by a normalisation whose output is not read")


def operands_of(at: Site, weight: Any, bias: Any, size: int) -> tuple[Operand | None, Operand | None]:
    return at.operand(weight), at.bias(bias, size)


@spelling(nn.LayerNorm)
def _layer_module(at: Site, input: Any) -> Match:
    module = at.module
    return norm_match(
        at, input, tuple(module.normalized_shape), at.own("weight"), at.own("bias"), kind="layer_norm", eps=module.eps
    )


@spelling(nn.RMSNorm)
def _rms_module(at: Site, x: Any) -> Match:
    module = at.module
    return norm_match(at, x, tuple(module.normalized_shape), at.own("weight"), None, kind="rms_norm", eps=module.eps)


@spelling(F.layer_norm, aten.layer_norm.default)
def _layer(
    at: Site,
    input: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Match:
    shape = numbers(normalized_shape, len(normalized_shape))
    return norm_match(at, input, shape, *operands_of(at, weight, bias, math.prod(shape)), kind="layer_norm", eps=eps)


@spelling(torch.native_layer_norm, aten.native_layer_norm.default)
def _native_layer(at: Site, input: Any, normalized_shape: Any, weight: Any, bias: Any, eps: float) -> Match:
    shape = numbers(normalized_shape, len(normalized_shape))
    operands = operands_of(at, weight, bias, math.prod(shape))
    return norm_match(at, input, shape, *operands, y=first_result(at), kind="layer_norm", eps=eps)


@spelling(F.rms_norm, torch.rms_norm, aten.rms_norm.default)
def _rms(at: Site, input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Match:
    shape = numbers(normalized_shape, len(normalized_shape))
    return norm_match(at, input, shape, at.operand(weight), None, kind="rms_norm", eps=eps)


@spelling(nn.GroupNorm)
def _group_module(at: Site, input: Any) -> Match:
    module = at.module
    operands = (at.own("weight"), at.own("bias"))
    return norm_match(
        at, input, (module.num_channels,), *operands, kind="group_norm", eps=module.eps, parts=module.num_groups
    )


@spelling(F.group_norm, aten.group_norm.default)
def _group(
    at: Site,
    input: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Match:
    channels = channels_of(at, weight, bias)
    operands = operands_of(at, weight, bias, channels)
    return norm_match(at, input, (channels,), *operands, kind="group_norm", eps=eps, parts=num_groups)


@spelling(torch.native_group_norm, aten.native_group_norm.default)
def _native_group(
    at: Site, input: Any, weight: Any, bias: Any, N: Any, C: int, HxW: Any, group: int, eps: float
) -> Match:
    operands = operands_of(at, weight, bias, C)
    return norm_match(at, input, (C,), *operands, y=first_result(at), kind="group_norm", eps=eps, parts=group)


def channels_of(at: Site, weight: Any, bias: Any) -> int:
    operand = at.operand(weight) or at.operand(bias)
    if operand is None:
        raise Refused(
            "is normalised before its product (a standardised weight): it keeps its plain gradient, or standardise the "
            "stored weight after each step instead"
        )
    return math.prod(operand.view.shape)
