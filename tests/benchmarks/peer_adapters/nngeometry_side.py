"""NNGeometry: Kronecker blocks of per-example losses, whose Fisher is the empirical one.

It differentiates a function of its own with respect to the inputs alone, so the training gradient is another forward
and backward. Averages, inverses and the product are the comparison's own (lean.py): its inverse is a plain LU.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from nngeometry.backend import TorchHooksJacobianBackend
from nngeometry.layercollection import LayerCollection
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from workloads import Workload

from peer_adapters.lean import Lean
from peer_adapters.side import LR, Cadence, Factors, Side, elements, products, require_products


class Whole(DataLoader):  # type: ignore[type-arg]
    """A loader that gives its whole data set as one batch without collating it from single examples."""

    def __iter__(self):  # type: ignore[no-untyped-def]
        yield self.dataset.tensors


class NNGeometry(Side):
    """Linear and convolution layers, weight and bias jointly."""

    note = "nngeometry: statistics need a forward and backward of their own; average, inverse and product added here"

    def __init__(self, work: Workload, net: nn.Module, cadence: Cadence) -> None:
        require_products(net)
        if not work.inputs.is_floating_point():
            raise NotImplementedError("it differentiates with respect to the inputs, which are whole numbers here")
        self.work, self.net, self.cadence = work, net, cadence
        self.layers = products(net)
        collection = LayerCollection()
        for name, module in self.layers.items():
            collection.add_layer(name, LayerCollection._module_to_layer(module))
        self.backend = TorchHooksJacobianBackend(net, self.losses, layer_collection=collection)
        inputs = work.inputs.clone()
        self.examples = Whole(TensorDataset(inputs, work.targets), batch_size=len(inputs))
        self.lean = Lean(self.layers)
        self.optimizer = torch.optim.SGD(net.parameters(), lr=LR)
        self.steps = 0

    def losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of every example (N, 1)."""
        outputs = self.net(inputs)
        if self.work.loss == "mse":
            return (outputs - targets).square().mean(1, keepdim=True)
        return nn.functional.cross_entropy(outputs, targets, reduction="none")[:, None]

    def step(self) -> None:
        self.optimizer.zero_grad()
        if self.steps % self.cadence.statistics == 0:
            self.lean.average(self.backend.get_kfac_blocks(self.examples))
        if self.steps % self.cadence.refresh == 0:
            self.lean.refresh()
        self.work.function(self.net(self.work.inputs), self.work.targets).backward()
        self.lean.apply()
        self.optimizer.step()
        self.steps += 1

    def state(self) -> Iterable[Tensor]:
        return self.lean.state()

    def factors(self) -> Factors:
        return self.lean.running

    def covered(self) -> int:
        return elements(self.layers.values())


build = NNGeometry
