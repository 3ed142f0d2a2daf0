"""BackPACK: Kronecker factors from an extended backward pass.

It has no empirical Fisher: factors come from one sampled label (KFAC), and a convolution's output factor is that of
gradients summed over positions. Averages, inverses and the product are the comparison's own (lean.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from backpack import backpack, extend
from backpack.extensions import KFAC
from torch import Tensor, nn
from workloads import Workload

from peer_adapters.lean import Lean
from peer_adapters.side import LR, Cadence, Factors, Side, elements, products, require_products


class BackPack(Side):
    """Linear and convolution layers; the bias has the output factor alone."""

    note = "backpack: sampled labels (it has no empirical Fisher); average, inverse and product added here"

    def __init__(self, work: Workload, net: nn.Module, cadence: Cadence) -> None:
        require_products(net)
        self.work, self.cadence = work, cadence
        linear = isinstance(net, nn.Sequential) and not any(list(m.children()) for m in net)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.net = extend(net, use_converter=not linear)
            criterion = {"mse": nn.MSELoss, "cross_entropy": nn.CrossEntropyLoss}[work.loss]()
            self.criterion = extend(criterion)
        self.layers = products(self.net)
        self.lean = Lean(self.layers)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=LR)
        self.steps = 0

    def measured(self) -> Factors:
        """The factors that the last backward pass left in the parameters."""
        found = {}
        for name, module in self.layers.items():
            g, a = module.weight.kfac
            found[name] = (a, g)
            for p in module.parameters():
                del p.kfac
        return found

    def step(self) -> None:
        self.optimizer.zero_grad()
        if self.steps % self.cadence.statistics == 0:
            with backpack(KFAC(mc_samples=1)):
                self.criterion(self.net(self.work.inputs), self.work.targets).backward()
            self.lean.average(self.measured())
        else:
            self.work.function(self.net(self.work.inputs), self.work.targets).backward()
        if self.steps % self.cadence.refresh == 0:
            self.lean.refresh()
        self.lean.apply()
        self.optimizer.step()
        self.steps += 1

    def state(self) -> Iterable[Tensor]:
        return self.lean.state()

    def factors(self) -> Factors:
        return self.lean.running

    def covered(self) -> int:
        return elements(self.layers.values())


build = BackPack
