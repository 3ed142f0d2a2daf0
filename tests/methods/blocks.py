"""Fisher blocks written out, and their best sums of Kronecker products: oracles of the methods that fit them."""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.methods.test_ekfac import Case


def layer_rows(c: Case) -> tuple[Tensor, Tensor]:
    """Rows of a layer, (examples, positions, features): inputs (1 last for the bias), gradients of the summed loss.

    By hooks on the user's own module, one example in the network at a time; convolutions by ``unfold``.
    """
    layer = c.net.get_submodule(c.name)
    rows_a, rows_g = [], []
    for n in range(len(c.x)):
        seen: list[tuple[Tensor, Tensor]] = []
        hook = layer.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append((inputs[0], output)))
        loss = F.cross_entropy(c.net(c.x[n : n + 1]), c.y[n : n + 1], reduction="sum")
        hook.remove()
        ((x, out),) = seen
        (g,) = torch.autograd.grad(loss, out)
        if isinstance(layer, nn.Conv2d):
            x = F.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride).mT
            g = g.flatten(2).mT
        rows_a.append(F.pad(x.reshape(-1, x.shape[-1]), (0, 1), value=1.0).detach())
        rows_g.append(g.reshape(-1, g.shape[-1]))
    return torch.stack(rows_a), torch.stack(rows_g)


def windowed(a: Tensor, g: Tensor, terms: float, window: int, hard: bool = False) -> Tensor:
    """The block of the mean loss in the order of ``[W b].flatten()``, positions paired up to a distance."""
    size = a.shape[2] * g.shape[2]
    total = torch.zeros(size, size)
    for n, t, u in product(range(a.shape[0]), range(a.shape[1]), range(a.shape[1])):
        if abs(t - u) <= window:
            k = 1.0 if hard else 1 - abs(t - u) / (window + 1)
            left, right = torch.outer(g[n, t], a[n, t]).flatten(), torch.outer(g[n, u], a[n, u]).flatten()
            total += k * torch.outer(left, right) / terms
    return total


def rearranged(block: Tensor, d_out: int) -> Tensor:
    """Z (d_in^2, d_out^2) of a block whose output index comes first."""
    d_in = len(block) // d_out
    return block.reshape(d_out, d_in, d_out, d_in).permute(1, 3, 0, 2).reshape(d_in**2, d_out**2)


def symmetric_part(block: Tensor, d_out: int) -> Tensor:
    """Z between symmetric matrices: pairs of positions also make products of two skew-symmetric ones."""
    d_in = len(block) // d_out
    Z = rearranged(block, d_out).reshape(d_in, d_in, -1)
    return (Z + Z.transpose(0, 1)).reshape(d_in**2, d_out**2) / 2


def best(block: Tensor, d_out: int, rank: int) -> Tensor:
    """The sum of ``rank`` products of symmetric matrices nearest to a block, as a matrix in the block's order."""
    U, sigma, Vh = torch.linalg.svd(symmetric_part(block, d_out), full_matrices=False)
    Z = (U[:, :rank] * sigma[:rank]) @ Vh[:rank]
    d_in = len(block) // d_out
    return Z.reshape(d_in, d_in, d_out, d_out).permute(2, 0, 3, 1).reshape(block.shape)


def tkfac(block: Tensor, d_out: int) -> Tensor:
    """TKFAC's product: both partial traces of the block, over its trace."""
    d_in = len(block) // d_out
    parts = block.reshape(d_out, d_in, d_out, d_in)
    inputs, outputs = torch.einsum("oioj->ij", parts), torch.einsum("oipi->op", parts)
    return torch.kron(outputs, inputs) / block.trace()
