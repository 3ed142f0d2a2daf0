"""A linear product whose weight gradient is never formed: the rows that it is the product of are kept instead.

``keep_rows`` computes the layer with its weight detached, so the backward pass leaves the product with the weight
gradient out, and hands over the input and the output gradient as the gradients of two slots (see
:mod:`fxcurv.layers.tap`): pure, exact under accumulation and activation checkpointing, and an input that was changed in
place since is an error of autograd's, as it is for the weight gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

LINEAR = (F.linear, torch.ops.aten.linear.default)
"""Functions whose weight gradient can be left out, beside calls of ``nn.Linear``."""


def linear_arguments(y: fx.Node) -> tuple[Any, Any, Any]:
    """(input, weight, bias) of a call of one of LINEAR, however they are passed."""
    given = {**dict(zip(("input", "weight", "bias"), y.args, strict=False)), **y.kwargs}
    return given["input"], given["weight"], given.get("bias")


Keep = Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(layer, x, y) -> the slots of x and of y's gradient."""


class Kept(torch.autograd.Function):
    """``Kept.apply(y, x, slot_x, slot_dy) -> y``."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, slot_x: Tensor, slot_dy: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return y.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        wanted = _asked_for(ctx)
        # Detached: a tensor of its own on the same memory, which a slot can take over without a copy.
        return (dy, None, x.detach(), dy.detach()) if wanted else (dy, None, None, None)


def _asked_for(ctx: Any) -> bool:
    """Whether the running pass is the one for gradients: a curvature pass asks for the slots of statistics alone."""
    node = ctx.next_functions[-1][0]
    try:
        return node is not None and torch._C._will_engine_execute_node(node)
    except RuntimeError:  # the user runs autograd.grad on the model: nobody asks for a slot
        return False


class KeptLinear:
    """One layer's product, callable from a graph: ``(keep, x, weight, bias) -> y``, or with an ``nn.Linear``."""

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self.__name__ = "kept_linear"

    def __call__(self, keep: Keep | None, x: Tensor, layer: Tensor | nn.Linear, bias: Tensor | None = None) -> Tensor:
        """The product; without ``keep`` an ordinary one."""
        weight: Tensor
        if isinstance(layer, nn.Linear):
            if keep is None or any(value for name, value in vars(layer).items() if name.endswith("_hooks")):
                return layer(x)  # type: ignore[no-any-return]
            weight, bias = layer.weight, layer.bias
        else:
            weight = layer
        if keep is None:
            return F.linear(x, weight, bias)
        y = F.linear(x, weight.detach(), bias)
        return Kept.apply(y, x, *keep(self.layer, x, y))  # type: ignore[no-any-return]
