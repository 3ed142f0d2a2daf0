"""The patch Gram as one operation of the dispatcher, ``fxcurv::patch_gram``.

It chooses its form by sizes and keeps tables of sines, which is nothing to trace: a compiler, a fake tensor or any
other dispatch mode sees one operation and its shape. A plain step calls ``conv_gram`` directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcurv.kernels.aten.geometry import Convolution
from fxcurv.kernels.aten.patches import conv_gram

_LIBRARY = torch.library.Library("fxcurv", "FRAGMENT")
_LIBRARY.define(
    "patch_gram(Tensor x, int groups, int inputs, bool bias, float scale, int[] kernel, int[] stride, int[] dilation, "
    "int[] pads, str mode) -> Tensor"
)


@dataclass(frozen=True)
class _Geometry:
    """A convolution as the operation's arguments describe it."""

    groups: int
    inputs: int
    bias: bool
    scale: float
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    mode: str

    @property
    def d_in(self) -> int:
        return self.inputs + self.bias


def patch_gram(x: Tensor, form: Convolution) -> Tensor:
    """``conv_gram`` of a convolution's input, as one operation where a compiler or a dispatch mode looks on."""
    if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0:
        return conv_gram(x, form)
    pads = [side for pair in form.pads for side in pair]
    sizes = (list(form.kernel), list(form.stride), list(form.dilation), pads)
    operation = torch.ops.fxcurv.patch_gram.default
    return operation(x, form.groups, form.inputs, form.bias, form.scale, *sizes, form.mode)  # type: ignore[no-any-return]


def _run(
    x: Tensor,
    groups: int,
    inputs: int,
    bias: bool,
    scale: float,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    pads: Sequence[int],
    mode: str,
) -> Tensor:
    pairs = tuple(zip(pads[::2], pads[1::2], strict=True))
    sizes = (tuple(kernel), tuple(stride), tuple(dilation), pairs)
    return conv_gram(x, _Geometry(groups, inputs, bias, scale, *sizes, mode))


def _shape(x: Tensor, groups: int, inputs: int, bias: bool, *_: object) -> Tensor:
    d = inputs + bias
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((d, d) if groups == 1 else (groups, d, d), dtype=dtype)


_LIBRARY.impl("patch_gram", _run, "CompositeExplicitAutograd")
torch.library.register_fake("fxcurv::patch_gram", _shape, lib=_LIBRARY)
