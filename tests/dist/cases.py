"""Trainings that must come out the same on one rank and on several, and how one rank takes part in them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import fxcurv
from fxcurv.losses import CrossEntropy
from tests.dist.nets import NETS

ROWS, STEPS = 12, 4
RAGGED = {1: (12,), 2: (5, 7), 4: (2, 5, 1, 4)}
EMPTY = {1: (12,), 2: (12, 0), 4: (4, 0, 8, 0)}


@dataclass(frozen=True)
class Case:
    """net: a key of ``NETS``. micro: micro-batches a step. sizes: rows by rank for each world size, equal without it.
    ddp: options of the wrapper, ``None`` to average gradients by hand, weighted by the batches. plain: the user calls
    loss.backward(). summed: the loss is a sum. optimizer: fxcurv's own, with the options ``rule``. ignored: some
    targets do not count."""

    net: str = "mlp"
    method: str = "kfac"
    options: dict[str, Any] = field(default_factory=dict)
    micro: int = 1
    sizes: dict[int, tuple[int, ...]] | None = None
    ddp: dict[str, Any] | None = field(default_factory=dict)
    plain: bool = False
    summed: bool = False
    optimizer: bool = False
    ignored: bool = False
    rule: dict[str, Any] = field(default_factory=dict)


OFTEN: dict[str, Any] = {"solve_every": 2, "damping": 1e-2}
CASES: dict[str, Case] = {
    **{f"{net}-mc": Case(net, options={**OFTEN, "fisher": "mc"}) for net in NETS},
    **{f"{net}-empirical": Case(net, options={**OFTEN, "fisher": "empirical"}) for net in NETS},
    "mlp-ggn": Case(options={**OFTEN, "fisher": "ggn"}),
    "attention-ggn": Case("attention", options={**OFTEN, "fisher": "ggn"}),
    "attention-signs": Case("attention", options={**OFTEN, "fisher": "ggn_signs"}),
    "mlp-samples": Case(options={**OFTEN, "fisher": "mc", "fisher_samples": 3, "factor_every": 2}),
    "reduce": Case("conv", options={**OFTEN, "sharing": "reduce", "fisher": "empirical"}),
    "plain": Case(options={**OFTEN, "fisher": "empirical"}, plain=True),
    "micro-mc": Case("conv", options={**OFTEN, "fisher": "mc"}, micro=2),
    "micro-empirical": Case(options={**OFTEN, "fisher": "empirical"}, micro=3),
    "micro-plain": Case(options={**OFTEN, "fisher": "empirical"}, micro=2, plain=True),
    "deep-micro": Case("deep", options={**OFTEN, "fisher": "empirical"}, micro=2, plain=True),
    "deep-ragged": Case("deep", options={**OFTEN, "fisher": "empirical"}, sizes=RAGGED, ddp=None),
    "ragged-mc": Case(options={**OFTEN, "fisher": "mc"}, sizes=RAGGED, ddp=None),
    "ragged-empirical": Case(options={**OFTEN, "fisher": "empirical"}, sizes=RAGGED, ddp=None),
    "ragged-ignored": Case(options={**OFTEN, "fisher": "empirical"}, sizes=RAGGED, ddp=None, ignored=True),
    "empty-mc": Case(options={**OFTEN, "fisher": "mc"}, sizes=EMPTY, ddp=None),
    "empty-empirical": Case("conv", options={**OFTEN, "fisher": "empirical"}, sizes=EMPTY, ddp=None),
    "sum-mc": Case(options={**OFTEN, "fisher": "mc", "factor_every": 2}, summed=True),
    "sum-empirical": Case(options={**OFTEN, "fisher": "empirical"}, summed=True),
    "rows": Case("conv", options={**OFTEN, "fisher": "mc", "disable": ("sink",)}),
    "rows-ragged": Case(
        "tokens", options={**OFTEN, "fisher": "empirical", "disable": ("sink",)}, sizes=RAGGED, ddp=None
    ),
    **{f"ekfac-{net}": Case(net, "ekfac", {"solve_every": 2}) for net in ("mlp", "deep", "conv", "tokens")},
    **{f"{method}-conv": Case("conv", method) for method in ("foof", "diag", "shampoo", "adam")},
    "ekfac-recurrent": Case("recurrent", "ekfac", {"solve_every": 2, "fisher": "empirical"}),
    "kfac_rnn-recurrent": Case("recurrent", "kfac_rnn"),
    "gnn_ng-graphs": Case("graphs", "gnn_ng"),
    "diag-elements": Case("elements", "diag"),
    "diag-tokens": Case("tokens", "diag", {"fisher": "empirical"}),
    "adahessian": Case(method="adahessian"),
    "adahessian-micro": Case(method="adahessian", micro=2),
    "hessian_free": Case(method="hessian_free", optimizer=True),
    "optimizer": Case(options={**OFTEN, "fisher": "mc"}, optimizer=True),
    "quadratic": Case(
        "conv",
        options={"step": "quadratic", "damping": 1.0},
        optimizer=True,
        rule={"gamma_every": 2, "damping_every": 2},
    ),
    "views": Case("conv", options={**OFTEN, "fisher": "mc"}, ddp={"gradient_as_bucket_view": True}),
    "unused": Case(options={**OFTEN, "fisher": "mc"}, ddp={"find_unused_parameters": True}),
    "static": Case(options={**OFTEN, "fisher": "empirical"}, ddp={"static_graph": True}),
}


def target_shape(outputs: Tensor) -> tuple[int, ...]:
    return (outputs.shape[0], *outputs.shape[2:])


class Training:
    """A case as one of ``world`` ranks; with ``world`` 1 on the global batch."""

    def __init__(self, case: Case, rank: int, world: int) -> None:
        self.case, self.rank, self.world = case, rank, world
        torch.manual_seed(0)
        build, self.draw, self.shape = NETS[case.net]
        net = build()
        training = net.training
        options = dict(case.options)
        reduction, ignore = "sum" if case.summed else "mean", 0 if case.ignored else -100
        loss = CrossEntropy(reduction=reduction, ignore_index=0 if case.ignored else None)
        options["example_inputs"] = (self.draw(4, *self.shape),)
        self.value = partial(F.cross_entropy, reduction=reduction, ignore_index=ignore)
        self.model = fxcurv.transform(net, case.method, loss=loss, **options)
        self.statistics_in_eval = not training
        wrapped = world > 1 and case.ddp is not None
        self.wrapper = DistributedDataParallel(self.model, **case.ddp) if wrapped else self.model
        self.terms = 0.0
        if case.optimizer:
            self.opt: Any = fxcurv.optimizer(self.model, lr=0.1 if case.method == "kfac" else 1.0, **case.rule)
        else:
            self.opt = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def batch(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """This rank's rows of a micro-batch that is the same for every number of ranks."""
        torch.manual_seed(1000 + 10 * step + micro)
        x = self.draw(ROWS, *self.shape)
        with torch.no_grad():
            out = self.model.strip()(x)
        y = torch.randint(0, out.shape[1], target_shape(out))
        sizes = self.case.sizes[self.world] if self.case.sizes else (ROWS // self.world,) * self.world
        return x.split(sizes)[self.rank], y.split(sizes)[self.rank]

    def forward_backward(self, step: int) -> Tensor:
        """The micro-batches of one step, with gradients synchronised by the last one."""
        self.opt.zero_grad()
        if self.statistics_in_eval:
            self.model.due(statistics=True)
        total, self.terms = torch.zeros(()), 0.0
        for micro in range(self.case.micro):
            last = micro == self.case.micro - 1
            quiet = nullcontext() if last or self.wrapper is self.model else self.wrapper.no_sync()
            x, y = self.batch(step, micro)
            with quiet:
                out = self.wrapper(x)
                loss = self.value(out, y) / (1 if self.case.summed else self.case.micro)
                counted = y != 0 if self.case.ignored else torch.ones_like(y)
                self.terms += float(counted.sum())
                if torch.is_grad_enabled():
                    if self.case.plain:
                        loss.backward()
                    else:
                        self.model.backward(loss, out, targets=y if self.case.ignored else None)
            total = total + loss.detach()
        if self.wrapper is self.model and self.world > 1:
            self.average()
        return total

    def average(self) -> None:
        """The gradient of the mean over all ranks' terms, for batches of different sizes."""
        terms = torch.tensor(self.terms)
        dist.all_reduce(terms)
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad * (self.terms / terms)
            dist.all_reduce(p.grad)

    def step(self, number: int) -> fxcurv.StepInfo:
        """One step of the training."""
        if self.case.optimizer:
            self.opt.step(partial(self.forward_backward, number))
            return self.opt.info  # type: ignore[no-any-return]
        self.forward_backward(number)
        info = self.model.precondition_()
        self.opt.step()
        return info


def run(case: Case, rank: int, world: int) -> dict[str, Tensor]:
    """Train; the model's whole state after it, and what the steps reported."""
    training = Training(case, rank, world)
    infos = [training.step(number) for number in range(STEPS)]
    result = {key: value.clone() for key, value in training.model.state_dict().items()}
    result["info.terms"] = torch.tensor([info.terms for info in infos])
    result["info.kl_scale"] = torch.tensor([info.kl_scale or 0.0 for info in infos])
    result["info.refresh"] = torch.tensor([float(info.refresh) for info in infos])
    assert not any(info.fallback or info.kept or info.repaired for info in infos)
    return result
