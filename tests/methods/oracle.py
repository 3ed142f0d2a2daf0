"""Dense curvature by plain autograd, and one step of a transformed model: what the methods' tests compare.

Everything here is computed from the user's own loss, in the row-major order of ``[W b].flatten()`` and without a line
of fxcurv, so an agreement is not an agreement of a thing with itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import fxcurv
from fxcurv.runtime.info import StepInfo
from fxcurv.runtime.module import CurvatureModule

LossFn = Callable[[Tensor], Tensor]


def stored(net: nn.Module, name: str) -> list[str]:
    """Full names of the weight and, where there is one, the bias of a layer."""
    module = net.get_submodule(name) if name else net
    prefix = f"{name}." if name else ""
    return [f"{prefix}{part}" for part in ("weight", "bias") if getattr(module, part, None) is not None]


def joined(tensors: list[Tensor], groups: int = 1) -> Tensor:
    """[W b] as (groups, d_out, d_in) from a weight (or its gradient) and a bias; a norm layer has a unit a group."""
    weight = tensors[0]
    rows = weight.reshape(groups, -1, 1) if weight.ndim == 1 else weight.reshape(groups, weight.shape[0] // groups, -1)
    return rows if len(tensors) == 1 else torch.cat([rows, tensors[1].reshape(groups, -1, 1)], dim=2)


def split(matrix: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Inverse of :func:`joined`."""
    if len(like) == 1:
        return [matrix.reshape(like[0].shape)]
    return [matrix[..., :-1].reshape(like[0].shape), matrix[..., -1].reshape(like[1].shape)]


def as_function(net: nn.Module, name: str, groups: int = 1) -> tuple[Callable[..., Tensor], Tensor]:
    """(f, M) with f(M, x) the network's output as a function of one layer's normal-form weight."""
    parameters = dict(net.named_parameters())
    names = stored(net, name)
    tensors = [parameters[n].detach() for n in names]

    def call(matrix: Tensor, x: Tensor) -> Tensor:
        return functional_call(net, dict(zip(names, split(matrix, tensors), strict=True)), (x,))

    return call, joined(tensors, groups)


def jacobian(net: nn.Module, name: str, x: Tensor, groups: int = 1) -> Tensor:
    """d output / d [W b], shape (outputs of the whole batch, parameters of the layer)."""
    call, matrix = as_function(net, name, groups)
    return jacrev(lambda m: call(m, x).reshape(-1))(matrix).reshape(-1, matrix.numel()).detach()


def output_hessian(outputs: Tensor, loss: LossFn) -> Tensor:
    """Hessian of the user's scalar in the flattened outputs."""
    flat = outputs.detach().reshape(-1)
    return torch.autograd.functional.hessian(lambda f: loss(f.reshape(outputs.shape)), flat)


def ggn(net: nn.Module, name: str, x: Tensor, loss: LossFn, groups: int = 1) -> Tensor:
    """The exact Gauss-Newton block of a layer: J^T H J of the user's scalar."""
    j = jacobian(net, name, x, groups)
    return j.T @ output_hessian(net(x), loss) @ j


def example_gradients(
    net: nn.Module, name: str, x: Tensor, loss: Callable[[Tensor, int], Tensor], groups: int = 1
) -> Tensor:
    """Rows: the gradient of ``loss(output of example n, n)`` in [W b], one example in the network at a time."""
    call, matrix = as_function(net, name, groups)
    rows = []
    for n in range(x.shape[0]):
        free = matrix.clone().requires_grad_()
        rows.append(torch.autograd.grad(loss(call(free, x[n : n + 1]), n), free)[0].reshape(-1))
    return torch.stack(rows)


def kron(factors: dict[str, Tensor]) -> Tensor:
    """kron(G, A); block-diagonal over groups."""
    a, g = factors["A"], factors["G"]
    return torch.kron(g, a) if a.ndim == 2 else torch.block_diag(*(torch.kron(x, y) for x, y in zip(g, a, strict=True)))


def corrected(factors: dict[str, Tensor]) -> Tensor:
    """The matrix of EKFAC: U diag(S) U^T with U = kron(QG, QA)."""
    if factors["QA"].ndim == 3:
        return torch.block_diag(*(corrected({k: v[i] for k, v in factors.items()}) for i in range(len(factors["QA"]))))
    basis = torch.kron(factors["QG"], factors["QA"])
    return basis @ torch.diag(factors["S"].reshape(-1)) @ basis.T


def block_diagonal(matrix: Tensor, groups: int) -> Tensor:
    """A matrix without what couples different groups."""
    size = matrix.shape[0] // groups
    return torch.block_diag(*(matrix[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(groups)))


def relative(x: Tensor, y: Tensor) -> float:
    """Distance of x from y in units of y's norm."""
    return float((x - y).norm() / y.norm())


@dataclass
class Step:
    """A transformed model after one ``precondition_``: the gradient before and the direction after, by parameter."""

    model: CurvatureModule
    gradient: dict[str, Tensor]
    direction: dict[str, Tensor]
    info: StepInfo
    loss: float = field(default=0.0)

    def pair(self, name: str, groups: int = 1) -> tuple[Tensor, Tensor]:
        """Normal-form (gradient, direction) of a layer."""
        names = stored(self.model.strip(), name)
        return tuple(joined([part[n] for n in names], groups) for part in (self.gradient, self.direction))  # type: ignore[return-value]

    def factors(self, name: str) -> dict[str, Tensor]:
        """Shorthand for the model's."""
        return self.model.factors(name)


def transform(net: nn.Module, method: str, x: Tensor, **options: Any) -> CurvatureModule:
    """fxcurv.transform with factors of one batch alone, renewed in every step, and no clipping."""
    kept = {"ema": 0.0, "solve_every": 1, "kl_clip": None}
    known = fxcurv.methods.PUBLISHED[method].defaults
    defaults = {k: v for k, v in kept.items() if k in known}
    return fxcurv.transform(net, method, example_inputs=(x,), **{"proofs": False, **defaults, **options})


def accumulate(model: CurvatureModule, batches: Iterable[tuple[Tensor, LossFn, dict[str, Any]]]) -> Step:
    """One step from one or more micro-batches (input, the user's loss of the output, arguments of ``backward``)."""
    model.zero_grad()
    total = 0.0
    for x, loss, arguments in batches:
        outputs = model(x)
        value = loss(outputs)
        total += value.item()
        if arguments.pop("plain", False):
            value.backward()
        else:
            model.backward(value, outputs, **arguments)
    gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    info = model.precondition_()
    return Step(model, gradient, {n: model.get_parameter(n).grad.clone() for n in gradient}, info, total)


def step(
    net: nn.Module, method: str, x: Tensor, loss_fn: LossFn, *, backward: dict[str, Any] | None = None, **options: Any
) -> Step:
    """Transform and take one step on one batch."""
    return accumulate(transform(net, method, x, **options), [(x, loss_fn, dict(backward or {}))])
