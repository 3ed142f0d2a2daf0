"""Small models and one training step, shared by the run-time tests."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcurv


def mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """5-7-6-3 with tanh."""
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def batch(n: int = 12, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs (n, 5) and labels of 3 classes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, dtype=dtype, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def step(model: Any, x: Tensor, y: Tensor, lr: float | None = 0.1) -> fxcurv.StepInfo:
    """Forward, model.backward, precondition_, plain descent (none for lr=None)."""
    model.zero_grad()
    out = model(x)
    model.backward(F.cross_entropy(out, y), out)
    info = model.precondition_()
    if lr is not None:
        descend(model, lr)
    return info


def make(method: str = "kfac", **options: Any) -> Any:
    """A transformed copy of one network."""
    torch.manual_seed(0)
    return fxcurv.transform(mlp(), method, loss="cross_entropy", **options)


def grads(model: nn.Module) -> list[Tensor]:
    """Copies of the gradients that are there."""
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def plain_gradient(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Gradients of the loss itself, from a copy of the model."""
    twin = copy.deepcopy(model)
    twin.zero_grad()
    F.cross_entropy(twin(x), y).backward()
    return grads(twin)


@torch.no_grad()
def descend(model: nn.Module, lr: float = 0.1) -> None:
    """p <- p - lr grad."""
    for p in model.parameters():
        if p.grad is not None:
            p -= lr * p.grad


def states(model: Any) -> dict[str, Tensor]:
    """A copy of the curvature entries of the state dict."""
    return {k: v.clone() for k, v in model.state_dict().items() if "curvature." in k}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal keys and equal bits."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
