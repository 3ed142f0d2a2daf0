"""fxcurv itself: every parameter is covered, embeddings and norms too, which the peers leave to SGD."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from workloads import Workload

import fxcurv
from peer_adapters.side import DAMPING, EMA, LR, Cadence, Factors, Side


class Fxcurv(Side):
    """K-FAC of fxcurv; a sampled Fisher runs a second backward pass for its statistics."""

    def __init__(self, work: Workload, net: nn.Module, cadence: Cadence, **options: object) -> None:
        self.work = work
        settings = {"fisher": "empirical", "kl_clip": None, "damping": DAMPING, "ema": EMA, **options}
        self.model = fxcurv.transform(
            net,
            "kfac",
            example_inputs=(work.inputs,),
            loss=work.loss,
            factor_every=cadence.statistics,
            solve_every=cadence.refresh,
            **settings,
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR)

    def step(self) -> None:
        self.optimizer.zero_grad()
        outputs = self.work.rows(self.model(self.work.inputs))
        self.model.backward(self.work.function(outputs, self.work.targets), outputs)
        self.model.precondition_()
        self.optimizer.step()

    def state(self) -> Iterable[Tensor]:
        return [t for key, t in self.model.state_dict().items() if key.startswith("curvature.")]

    def factors(self) -> Factors:
        found = {layer.name: self.model.factors(layer.name) for layer in self.model.layers}
        return {name: (f["A"], f["G"]) for name, f in found.items() if "A" in f and "G" in f}

    def covered(self) -> int:
        left = {name for name, _ in self.model.uncovered}
        return sum(p.numel() for name, p in self.model.named_parameters() if p.requires_grad and name not in left)


build = Fxcurv
