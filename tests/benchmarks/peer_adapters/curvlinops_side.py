"""curvlinops: its K-FAC operator and the operator's inverse, at their fastest.

The operator measures one batch and throws the gradient of that backward pass away; a subclass keeps it, which spares
the library a second forward and backward a step. The average over steps is the comparison's own.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from curvlinops import KFACInverseLinearOperator, KFACLinearOperator
from torch import Tensor, nn
from workloads import Workload

from peer_adapters.side import DAMPING, EMA, LR, Cadence, Factors, Side, elements, products, require_products


class Recording(KFACLinearOperator):
    """K-FAC whose backward pass also leaves the gradients of the loss in the parameters."""

    def _compute_loss_and_backward(self, output: Tensor, y: Tensor) -> None:
        self._loss_func(output, y).backward()


class ClassesSecond(nn.Module):
    """Logits (batch, tokens, classes) as (batch, classes, tokens), where this library wants them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens).transpose(1, 2)


class Curvlinops(Side):
    """Linear and convolution layers, weight and bias jointly."""

    note = "curvlinops: made to keep the gradient of its statistics pass; the average over steps is added here"

    def __init__(self, work: Workload, net: nn.Module, cadence: Cadence) -> None:
        require_products(net)
        self.work, self.net, self.cadence, self.layers = work, net, cadence, products(net)
        self.parameters = [p for module in self.layers.values() for p in module.parameters()]
        self.criterion = {"mse": nn.MSELoss, "cross_entropy": nn.CrossEntropyLoss}[work.loss]()
        self.optimizer = torch.optim.SGD(net.parameters(), lr=LR)
        self.seen = net if work.terms == len(work.inputs) else ClassesSecond(net)
        self.running: list[dict[str, Tensor]] = []
        self.steps = 0

    def measure(self) -> None:
        """Statistics and gradients of the batch, and the average."""
        size = len(self.work.inputs)
        self.operator = Recording(
            self.seen,
            self.criterion,
            self.parameters,
            [(self.work.inputs, self.work.targets)],
            fisher_type="empirical",
            check_deterministic=False,
            separate_weight_and_bias=False,
            num_data=size,
            num_per_example_loss_terms=self.work.terms // size,
        )
        self.operator.compute_kronecker_factors()
        fresh = [self.operator._input_covariances, self.operator._gradient_covariances]
        for old, new in zip(self.running, fresh, strict=False):
            for name, value in new.items():
                old[name].lerp_(value, 1 - EMA)
        self.running = self.running or fresh
        self.operator._input_covariances, self.operator._gradient_covariances = self.running

    def step(self) -> None:
        self.optimizer.zero_grad()
        if self.steps % self.cadence.statistics == 0:
            self.measure()
        else:
            self.work.function(self.net(self.work.inputs), self.work.targets).backward()
        if self.steps % self.cadence.refresh == 0:
            self.inverse = KFACInverseLinearOperator(self.operator, damping=DAMPING, use_heuristic_damping=True)
        gradients = [p.grad for p in self.parameters]
        for p, direction in zip(self.parameters, self.inverse @ gradients, strict=True):
            p.grad.copy_(direction)
        self.optimizer.step()
        self.steps += 1

    def state(self) -> Iterable[Tensor]:
        inverses = [self.inverse._inverse_input_covariances, self.inverse._inverse_gradient_covariances]
        return [t for table in (*self.running, *inverses) for t in table.values()]

    def factors(self) -> Factors:
        a, g = self.running
        return {name.removeprefix("net."): (a[name], g[name]) for name in a}

    def covered(self) -> int:
        return elements(self.layers.values())


build = Curvlinops
