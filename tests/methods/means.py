"""Mean input and mean output-gradient rows of a layer by hooks of torch, for the methods that are made of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.methods.oracle import LossFn


def rows_of(net: nn.Module, name: str, x: Tensor, loss: LossFn, groups: int = 1) -> tuple[Tensor, Tensor]:
    """(inputs with the constant last, gradients of the user's scalar at the outputs): (groups, rows, d) of one layer.

    Linear layers, embeddings-free, and 2-d convolutions; a norm is not looked at.
    """
    module = net.get_submodule(name)
    seen: dict[str, Tensor] = {}

    def note(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen["x"], seen["y"] = inputs[0].detach(), output
        return output

    handle = module.register_forward_hook(note)
    value = loss(net(x))
    handle.remove()
    (g,) = torch.autograd.grad(value, seen["y"])
    if isinstance(module, nn.Conv2d):
        geometry = {"padding": module.padding, "stride": module.stride, "dilation": module.dilation}
        parts = seen["x"].chunk(groups, 1)
        inputs = [F.unfold(part, module.kernel_size, **geometry).transpose(1, 2).flatten(0, 1) for part in parts]
        outputs = [part.flatten(2).transpose(1, 2).flatten(0, 1) for part in g.chunk(groups, 1)]
    else:
        inputs, outputs = [seen["x"].flatten(0, -2)], [g.flatten(0, -2)]
    a = torch.stack([torch.cat([rows, rows.new_ones(len(rows), 1)], 1) for rows in inputs])
    return a, torch.stack(outputs)
