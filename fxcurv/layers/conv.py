"""Convolutions in 1, 2 and 3 dimensions: a linear layer on patches, with positions as sharing axis."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcurv.layers.elements import lone_bias
from fxcurv.layers.form import Form
from fxcurv.layers.spelling import Match, Operand, Site, numbers, spelling
from fxcurv.layers.transposed import transposed_convolution
from fxcurv.layers.view import Refused

aten = torch.ops.aten


@dataclass(frozen=True)
class ConvForm(Form):
    """A convolution (cross-correlation) with weight (C_out, C_in / groups, *kernel), per spatial axis:

    kernel, stride, dilation: as in torch; pads: zeros (or mirrored, ... values) before and after.
    mode: "zeros", "reflect", "replicate" or "circular".
    Input features are channel-major, like ``weight.flatten(1)``. An input without batch axis has b = 1.
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    pads: tuple[tuple[int, int], ...] = ()
    mode: str = "zeros"

    def rows_a(self, x: Tensor, *aux: Tensor) -> Tensor:
        """See :meth:`Form.rows_a`; x (b, C_in, *spatial) or (C_in, *spatial), rows are patches."""
        x = self._padded(x)
        axes = range(len(self.kernel))
        for k in axes:
            reach = self.dilation[k] * (self.kernel[k] - 1) + 1
            x = x.unfold(2 + k, reach, self.stride[k])[..., :: self.dilation[k]]
        batch, channels, *positions = x.shape[: 2 + len(axes)]
        x = x.unflatten(1, (self.groups, channels // self.groups))
        x = x.permute(0, *(3 + k for k in axes), 1, 2, *(3 + len(axes) + k for k in axes))
        return self._augment(x.reshape(batch, math.prod(positions), self.groups, self.inputs))

    def rows_g(self, g: Tensor) -> Tensor:
        """See :meth:`Form.rows_g`; g (b, C_out, *spatial) or (C_out, *spatial)."""
        g = self.batched(g)
        positions = math.prod(g.shape[2:])
        return g.reshape(g.shape[0], self.groups, self.d_out, positions).permute(0, 3, 1, 2)

    @property
    def taps(self) -> int:
        """See :attr:`Form.taps`."""
        return math.prod(self.kernel)

    def channel_gram(self, x: Tensor) -> Tensor:
        """Sum over patches, mean over taps of p p^T, p = [channels; 1], (groups, C + 1, C + 1), without making a patch.

        x: as in :meth:`rows_a`. A pixel counts as often as patches hold it.
        """
        x = self._padded(x)
        counts = torch.ones((), dtype=torch.float64)
        places = zip(x.shape[2:], self.kernel, self.stride, self.dilation, strict=True)
        for size, kernel, stride, dilation in places:
            first = torch.arange(0, size - dilation * (kernel - 1), stride)
            held = (first[:, None] + dilation * torch.arange(kernel)).flatten().bincount(minlength=size)
            counts = counts[..., None] * held
        root = (counts / self.taps).sqrt().to(x).flatten()
        pixels = x.flatten(2).unflatten(1, (self.groups, -1)).transpose(0, 1)  # (groups, b, C, pixels)
        pixels = torch.cat([pixels * self.scale, torch.ones_like(pixels[:, :, :1])], 2) * root
        pixels = pixels.transpose(1, 2).flatten(2)
        return pixels @ pixels.mT

    def _padded(self, x: Tensor) -> Tensor:
        x = self.batched(x)
        pads = [side for pair in reversed(self.pads) for side in pair]
        return F.pad(x, pads, mode="constant" if self.mode == "zeros" else self.mode) if any(pads) else x

    def batched(self, tensor: Tensor) -> Tensor:
        """The tensor with a batch axis."""
        return tensor.unsqueeze(0) if tensor.dim() == len(self.kernel) + 1 else tensor

    @property
    def tag(self) -> str:
        """See :attr:`Form.tag`."""
        geometry = (self.kernel, self.stride, self.dilation, self.pads)
        sizes = " ".join("x".join(str(item).replace(" ", "") for item in sizes) for sizes in geometry)
        return f"patches[{sizes} {self.mode} g{self.groups}]{self._constant}"


def _match(
    at: Site,
    x: Any,
    weight: Operand,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    mode: str = "zeros",
) -> Match:
    """``bias`` is an :class:`Operand`, ``None`` or the node of a bias argument."""
    view = weight.view
    count = view.ndim - 2
    (groups,) = numbers(groups, 1)
    kernel, stride, dilation = view.shape[2:], numbers(stride, count), numbers(dilation, count)
    form = ConvForm(
        groups=groups,
        d_out=view.shape[0] // groups,
        d_in=math.prod(view.shape[1:]),
        bias=False,
        permutation=view.order(range(view.ndim)),
        weight_shape=view.stored,
        scale=view.scale,
        kernel=kernel,
        stride=stride,
        dilation=dilation,
        pads=_pads(padding, kernel, dilation),
        mode=mode,
    )
    bias = at.bias(bias, view.shape[0]) if isinstance(bias, fx.Node) else bias
    out_axes = ((-1 - count, view.shape[0]),)
    return Match(f"conv{count}d", form, at.data(x), at.node, weight, bias, out_axes=out_axes)


def _pads(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding == "same":  # an odd total puts the larger half behind
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((pad, pad) for pad in numbers(padding, len(kernel)))


@spelling(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _module(at: Site, input: Any) -> Match:
    module, bias = at.module, at.own("bias")
    if at.computes("weight"):
        return lone_bias(at, bias, -1 - len(module.kernel_size))
    weight = at.own("weight")
    if type(module)._conv_forward not in (nn.Conv1d._conv_forward, nn.Conv2d._conv_forward, nn.Conv3d._conv_forward):
        raise Refused(f"is used by {type(module).__name__}, which convolves in its own way")
    if weight is None:
        raise Refused("is the bias of a convolution without weight")
    geometry = (module.stride, module.padding, module.dilation, module.groups, module.padding_mode)
    return _match(at, input, weight, bias, *geometry)


@spelling(F.conv1d, F.conv2d, F.conv3d, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
@spelling(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
def _function(
    at: Site,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
) -> Match:
    if at.operand(weight) is None:
        return lone_bias(at, bias, -1 - _DIMENSIONS[at.node.target])
    return _match(at, input, at.weight(weight), bias, stride, padding, dilation, groups)


_DIMENSIONS: dict[Any, int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
_DIMENSIONS |= {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}
_DIMENSIONS |= {aten.conv1d.padding: 1, aten.conv2d.padding: 2, aten.conv3d.padding: 3}


@spelling(aten.convolution.default)
def _convolution(
    at: Site,
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Match:
    if transposed:
        return transposed_convolution(at, input, weight, bias, stride, padding, dilation, output_padding, groups)
    return _match(at, input, at.weight(weight), bias, stride, padding, dilation, groups)
