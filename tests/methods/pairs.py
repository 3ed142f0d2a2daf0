"""Rows of layers by hooks and autograd: what the statistics of (example, position) pairs are compared with.

Inputs are what a module was called with (patches of a convolution by ``unfold``), output gradients those of the summed
loss of single examples. Nothing here is fxcurv's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]


def pairs(net: nn.Module, name: str, x: Tensor, total: Callable[[Tensor], Tensor]) -> Pair:
    """(a, g) of a layer, (n, positions, groups, d_in) and (n, positions, groups, d_out), uses of one module in a row.

    total: the sum of the losses of the examples, of the network's output.
    """
    module = net.get_submodule(name)
    calls: list[Pair] = []
    handle = module.register_forward_hook(lambda _, args, out: calls.append((args[0], out)))
    value = total(net(x))
    handle.remove()
    grads = torch.autograd.grad(value, [out for _, out in calls])
    rows = [rows_of(module, given.detach(), grad) for (given, _), grad in zip(calls, grads, strict=True)]
    return torch.cat([a for a, _ in rows]), torch.cat([g for _, g in rows])


def rows_of(module: nn.Module, x: Tensor, g: Tensor) -> Pair:
    """Rows of one call of a convolution, an embedding or a linear layer."""
    groups = getattr(module, "groups", 1)
    if isinstance(module, nn.Conv2d):
        patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
        a, g = patches.transpose(1, 2), g.flatten(2).transpose(1, 2)
    elif isinstance(module, nn.Embedding):
        a = F.one_hot(x, module.num_embeddings).to(g.dtype)
        if module.padding_idx is not None:
            a[x == module.padding_idx] = 0
            g = g * (x != module.padding_idx)[..., None]
    else:
        a = x
    a, g = (rows.reshape(x.shape[0], -1, groups, rows.shape[-1] // groups) for rows in (a, g))
    if getattr(module, "bias", None) is not None:
        a = torch.cat([a, a.new_ones(*a.shape[:3], 1)], 3)
    return a, g


def blocks(a: Tensor, g: Tensor, terms: int) -> Tensor:
    """sum over pairs of vec(g a^T) vec(g a^T)^T / terms, row-major, (groups, d_out d_in, d_out d_in): pair by pair."""
    found = a.new_zeros(a.shape[2], a.shape[3] * g.shape[3], a.shape[3] * g.shape[3])
    for n in range(a.shape[0]):
        for t in range(a.shape[1]):
            for k in range(a.shape[2]):
                vector = torch.outer(g[n, t, k], a[n, t, k]).flatten()
                found[k] += torch.outer(vector, vector) / terms
    return found
