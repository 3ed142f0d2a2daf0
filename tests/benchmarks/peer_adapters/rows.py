"""Rows of every linear and convolution layer of a plain model by module hooks: the comparison's own oracle.

A layer's A is the mean of a a^T over its input rows (1 appended where there is a bias), its G is the sum of g g^T over
the positions of a term, averaged over the N loss terms, g the gradient of one term's loss. That is fxcurv's convention.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workloads import LoopTagger, Tagger, Workload

from peer_adapters.side import Factors, products

FUSED = {"ih": "lstm.weight_ih_l0", "hh": "lstm.weight_hh_l0", "head": "head"}
"""Names of the looped LSTM's layers in the fused one."""


@dataclass
class Rows:
    """What a layer saw in one batch.

    a: input rows (n, d_in). g: rows of the gradient of the batch's loss at the output (n, d_out). uses: calls of the
    module. image: the input of a convolution (N, C, H, W). source: which tensor the rows came from.
    """

    module: nn.Module
    a: list[Tensor] = field(default_factory=list)
    g: list[Tensor] = field(default_factory=list)
    image: Tensor | None = None
    source: int = 0

    @property
    def uses(self) -> int:
        return len(self.a)

    def joined(self) -> tuple[Tensor, Tensor]:
        """All rows of both sides. A module called repeatedly sees its last call's gradient first."""
        return torch.cat(self.a), torch.cat(self.g[::-1])


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """Rows (n, d_in) of a module's input, patches for a convolution, with the bias's coordinate."""
    if isinstance(module, nn.Conv2d):
        patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]
        rows = patches.transpose(1, 2).flatten(0, 1)
    else:
        rows = x.flatten(0, -2)
    return rows if module.bias is None else torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


def output_rows(module: nn.Module, g: Tensor) -> Tensor:
    """Rows (n, d_out) of a gradient at a module's output."""
    return g.flatten(2).transpose(1, 2).flatten(0, 1) if isinstance(module, nn.Conv2d) else g.flatten(0, -2)


def observe(work: Workload, net: nn.Module) -> dict[str, Rows]:
    """Rows of all products of a model in one batch; of an LSTM, those of its loop."""
    if isinstance(net, Tagger):
        loop = LoopTagger(net.lstm.input_size).to(work.inputs.dtype)
        loop.load(net)
        return {FUSED[name]: rows for name, rows in observe(work, loop).items()}
    found = {name: Rows(module) for name, module in products(net).items()}
    handles = []
    for rows in found.values():

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, rows: Rows = rows) -> None:
            x = inputs[0].detach()
            rows.a.append(input_rows(module, x))
            rows.image, rows.source = (x if isinstance(module, nn.Conv2d) else None), x.data_ptr()
            output.register_hook(lambda g: rows.g.append(output_rows(module, g)))

        handles.append(rows.module.register_forward_hook(hook))
    work.function(net(work.inputs), work.targets).backward()
    for handle in handles:
        handle.remove()
    return found


def factors(work: Workload, net: nn.Module) -> Factors:
    """A and G of all products, computed from their rows."""
    width = work.targets[0].numel() if work.targets.is_floating_point() else 1  # the loss also averages over these
    result = {}
    for name, rows in observe(work, net).items():
        a, g = rows.joined()
        result[name] = (a.T @ a / len(a), g.T @ g * (work.terms * width))
    return result
