"""asdfghjkl (ASDL): its K-FAC gradient maker, which runs forward and backward by itself.

Its loss is a sum inside (it asks the loss function for ``reduction="sum"``), its average weighs the new value. It marks
ranges for a GPU profiler wherever it works, which a build of PyTorch without CUDA refuses: these marks are taken out.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
import torch.cuda.nvtx
from asdl import FISHER_EMP, KfacGradientMaker, PreconditioningConfig
from torch import Tensor, nn
from workloads import Workload

from peer_adapters.side import DAMPING, EMA, LR, Cadence, Factors, Side, elements, products, require_products

if torch.version.cuda is None:
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_: 0


class Asdl(Side):
    """Linear and convolution layers; the bias has the output factor alone."""

    note = "asdl: biases are preconditioned by G alone; embeddings and norms are left to SGD"

    def __init__(self, work: Workload, net: nn.Module, cadence: Cadence) -> None:
        require_products(net)
        self.work, self.net, self.layers = work, net, products(net)
        others = [m for m in net.modules() if not list(m.children()) and m not in self.layers.values()]
        config = PreconditioningConfig(
            data_size=work.terms,
            damping=DAMPING,
            ema_decay=1 - EMA,
            curvature_upd_interval=cadence.statistics,
            preconditioner_upd_interval=cadence.refresh,
            ignore_modules=others,
        )
        self.optimizer = torch.optim.SGD(net.parameters(), lr=LR)
        self.steps = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of every container module
            self.maker = KfacGradientMaker(net, config, fisher_type=FISHER_EMP)

    def step(self) -> None:
        self.optimizer.zero_grad()
        outputs = self.maker.setup_model_call(self.net, self.work.inputs)
        self.maker.setup_loss_call(self.work.function, outputs, self.work.targets)
        self.maker.forward_and_backward()
        self.optimizer.step()
        self.steps += 1

    def state(self) -> Iterable[Tensor]:
        krons = [m.fisher.kron for m in self.layers.values()]
        return [t for k in krons for t in (k.A, k.B, k.A_inv, k.B_inv)]

    def factors(self) -> Factors:
        """Without the bias coordinate; the average starts from zero, which is undone here."""
        weight = 1 - EMA**self.steps
        return {name: (m.fisher.kron.A / weight, m.fisher.kron.B / weight) for name, m in self.layers.items()}

    def covered(self) -> int:
        return elements(self.layers.values())


build = Asdl
