"""SINGD in its K-FAC-like, dense form: factors of the inverse, updated by products instead of a decomposition.

Statistics and the update of the preconditioner are one thing there, with one period, so its column "with statistics" is
also its column "refresh".
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from singd.optim.optimizer import SINGD
from torch import Tensor, nn
from workloads import Workload

from peer_adapters.side import DAMPING, EMA, LR, Cadence, Factors, Side, elements, products, require_products


class Singd(Side):
    """Linear and convolution layers under SINGD, everything else under SGD."""

    note = "singd: no decomposition; statistics and its update of the inverse are one, done every step"

    def __init__(self, work: Workload, net: nn.Module, cadence: Cadence) -> None:
        require_products(net)
        self.work, self.net, self.layers = work, net, products(net)
        covered = [p for module in self.layers.values() for p in module.parameters()]
        held = {id(p) for p in covered}
        others = [p for p in net.parameters() if id(p) not in held]
        self.singd = SINGD(
            net,
            params=covered,
            lr=LR,
            momentum=0.0,
            damping=DAMPING,
            alpha1=0.0,
            T=cadence.statistics,
            loss_average="batch" if work.terms == len(work.inputs) else "batch+sequence",
            lr_cov=1 - EMA,
            kfac_like=True,
            normalize_lr_cov=True,
            warn_unsupported=False,
        )
        self.optimizers = [self.singd] + ([torch.optim.SGD(others, lr=LR)] if others else [])
        self.first: Factors = {}

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.work.function(self.net(self.work.inputs), self.work.targets).backward()
        if self.singd.steps == 0:  # the inverse factors are still the identity: these are the batch's factors
            h = self.singd
            self.first = {n: (h.H_Ks[n].to_dense().clone(), h.H_Cs[n].to_dense().clone()) for n in self.layers}
        for optimizer in self.optimizers:
            optimizer.step()

    def state(self) -> Iterable[Tensor]:
        tables = (self.singd.Ks, self.singd.Cs, self.singd.m_Ks, self.singd.m_Cs)
        return [t for table in tables for matrix in table.values() for t in vars(matrix).values() if torch.is_tensor(t)]

    def factors(self) -> Factors:
        return self.first

    def covered(self) -> int:
        return elements(self.layers.values())


build = Singd
