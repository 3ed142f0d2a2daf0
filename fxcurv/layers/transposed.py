"""Transposed convolutions in 1, 2 and 3 dimensions: a linear layer on patches of the input with zeros between pixels.

A transposed convolution of stride s is the convolution of stride 1, with the mirrored kernel, of the input into which
s - 1 zeros have been put between neighbouring pixels. Positions are then output pixels, so that the bias is a
homogeneous coordinate as in every other layer. A patch holds zeros where no input pixel lies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcurv.layers.elements import lone_bias
from fxcurv.layers.form import Form
from fxcurv.layers.spelling import Match, Operand, Site, is_plain, numbers, spelling
from fxcurv.layers.view import Refused

aten = torch.ops.aten


@dataclass(frozen=True)
class TransposedForm(Form):
    """A transposed convolution with weight (C_in, C_out / groups, *kernel), per spatial axis:

    kernel, stride, dilation, padding: as in torch; extra: torch's output padding, ``None`` where the graph computes the
        output's size. The output is then the auxiliary operand, of which only the shape is read.
    Input features are channel-major. An input without batch axis has b = 1.
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    extra: tuple[int, ...] | None = ()

    def rows_a(self, x: Tensor, *aux: Tensor) -> Tensor:
        """See :meth:`Form.rows_a`; x (b, C_in, *spatial) or (C_in, *spatial)."""
        x = self._spread(self._batched(x), aux[0].shape if aux else ())
        count = len(self.kernel)
        for k in range(count):
            reach = self.dilation[k] * (self.kernel[k] - 1) + 1
            x = x.unfold(2 + k, reach, 1)[..., :: self.dilation[k]]
        batch, channels, *positions = x.shape[: 2 + count]
        x = x.flip(list(range(2 + count, 2 + 2 * count)))  # the kernel meets its patch mirrored
        x = x.unflatten(1, (self.groups, channels // self.groups))
        x = x.permute(0, *(3 + k for k in range(count)), 1, 2, *(3 + count + k for k in range(count)))
        return self._augment(x.reshape(batch, math.prod(positions), self.groups, self.inputs))

    def rows_g(self, g: Tensor) -> Tensor:
        """See :meth:`Form.rows_g`; g (b, C_out, *spatial) or (C_out, *spatial)."""
        g = self._batched(g)
        return g.reshape(g.shape[0], self.groups, self.d_out, math.prod(g.shape[2:])).permute(0, 3, 1, 2)

    def kept(self, x: Tensor, *aux: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`Form.kept`."""
        return (x, *(output.new_empty(()).expand(output.shape) for output in aux))

    def _spread(self, x: Tensor, output: Sequence[int]) -> Tensor:
        """Zeros between the pixels of each spatial axis, and around them or cut away so that patches fit."""
        for k, stride in enumerate(self.stride):
            if stride > 1:
                axis = 2 + k
                wide = x.new_zeros(*x.shape[: axis + 1], stride, *x.shape[axis + 1 :])
                wide.select(axis + 1, 0).copy_(x)
                x = wide.flatten(axis, axis + 1).narrow(axis, 0, (x.shape[axis] - 1) * stride + 1)
        reaches = [d * (k - 1) for k, d in zip(self.kernel, self.dilation, strict=True)]
        sizes = output[-len(self.kernel) :]
        sides: list[int] = []
        for k, (reach, pad) in reversed(list(enumerate(zip(reaches, self.padding, strict=True)))):
            left = reach - pad
            right = left + self.extra[k] if self.extra is not None else sizes[k] + pad - x.shape[2 + k]
            sides += [left, right]
        return F.pad(x, sides)

    def _batched(self, tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(0) if tensor.dim() == len(self.kernel) + 1 else tensor

    @property
    def tag(self) -> str:
        """See :attr:`Form.tag`."""
        geometry = (self.kernel, self.stride, self.dilation, self.padding, self.extra or ("?",))
        sizes = " ".join("x".join(map(str, item)) for item in geometry)
        return f"spread[{sizes} g{self.groups}]{self._constant}"


def _match(
    at: Site,
    x: Any,
    weight: Operand,
    bias: Any,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: Any,
    dilation: Any,
) -> Match:
    """``bias`` is an :class:`Operand`, ``None`` or the node of a bias argument."""
    view = weight.view
    count = view.ndim - 2
    (groups,) = numbers(groups, 1)
    inputs, width, *kernel = view.shape
    stored, permutation = view.stored, (0, 2, 1, *range(3, 3 + count))
    if groups == 1:
        permutation = view.order((1, 0, *range(2, 2 + count)))
    elif is_plain(view):
        stored = (groups, inputs // groups, width, *kernel)
    else:
        raise Refused("is the permuted weight of a transposed convolution with groups")
    form = TransposedForm(
        groups=groups,
        d_out=width,
        d_in=inputs // groups * math.prod(kernel),
        bias=False,
        permutation=permutation,
        weight_shape=stored,
        scale=view.scale,
        kernel=tuple(kernel),
        stride=numbers(stride, count),
        dilation=numbers(dilation, count),
        padding=numbers(padding, count),
        extra=None if output_padding is None else numbers(output_padding, count),
    )
    bias = at.bias(bias, groups * width) if isinstance(bias, fx.Node) else bias
    out_axes = ((-1 - count, groups * width),)
    aux = (at.node,) if form.extra is None else ()
    return Match(f"conv_transpose{count}d", form, at.data(x), at.node, weight, bias, aux, out_axes)


@spelling(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _module(at: Site, input: Any, output_size: Any = None) -> Match:
    module, bias = at.module, at.own("bias")
    if at.computes("weight"):
        return lone_bias(at, bias, -1 - len(module.kernel_size))
    weight = at.own("weight")
    if weight is None:
        raise Refused("is the bias of a convolution without weight")
    extra = module.output_padding if output_size is None else None
    return _match(at, input, weight, bias, module.stride, module.padding, extra, module.groups, module.dilation)


@spelling(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
@spelling(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def _function(
    at: Site,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: Any = 1,
    dilation: Any = 1,
) -> Match:
    if not _static(output_padding):
        output_padding = None
    if at.operand(weight) is None:
        return lone_bias(at, bias, -1 - _DIMENSIONS[at.node.target])
    return _match(at, input, at.weight(weight), bias, stride, padding, output_padding, groups, dilation)


_DIMENSIONS: dict[Any, int] = {F.conv_transpose1d: 1, F.conv_transpose2d: 2, F.conv_transpose3d: 3}
_DIMENSIONS |= {aten.conv_transpose1d.default: 1, aten.conv_transpose2d.input: 2, aten.conv_transpose3d.input: 3}


def _static(value: Any) -> bool:
    """Whether sizes are numbers rather than values that the graph computes."""
    return isinstance(value, int) or all(isinstance(item, int) for item in value)


def transposed_convolution(
    at: Site,
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    output_padding: Any,
    groups: Any,
) -> Match:
    """``aten.convolution`` with ``transposed``."""
    return _match(at, input, at.weight(weight), bias, stride, padding, output_padding, groups, dilation)
