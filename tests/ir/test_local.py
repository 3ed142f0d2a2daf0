"""Local problems: every inner optimizer and activation against autograd on the local loss, written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fxcurv.ir.ops  # noqa: F401  (registers the ops)
from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS
from fxcurv.ir.ops.local import FUNCTIONS, INNER
from fxcurv.ir.types import Mat, Psd, Scalar

INTEGRALS: dict[str, Any] = {
    "identity": lambda s: s.square().sum() / 2,
    "tanh": lambda s: s.cosh().log().sum(),
    "sigmoid": lambda s: F.softplus(s).sum(),
    "relu": lambda s: s.relu().square().sum() / 2,
    "leaky_relu": lambda s: torch.where(s > 0, s.square(), 0.01 * s.square()).sum() / 2,
    "softplus": lambda s: torch.trapezoid(F.softplus(s * t), s * t, dim=0).sum(),
    "softmax": lambda s: s.logsumexp(-1).sum(),
}
"""Convex functions F whose gradients are the activations; that of softplus by quadrature from 0."""
t = torch.linspace(0, 1, 20001, dtype=torch.float64).reshape(-1, 1, 1, 1, 1)


def local_loss(D: Tensor, V: Tensor, rows: Tensor, W: Tensor, gamma: float, proximal: float, activation: str) -> Tensor:
    """sum_i F(W a_i) - y_i . (W a_i) + proximal / 2 |D|^2 at W = W_t - D; the part of y in gamma g is that of V."""
    G = rows.shape[2]
    D, V, W = (x.reshape(G, *x.shape[-2:]) for x in (D, V, W))
    s = torch.einsum("bsgi,goi->bsgo", rows, W - D)
    y = FUNCTIONS[activation](torch.einsum("bsgi,goi->bsgo", rows, W))
    pulled = -(y * s).sum() + gamma * (V * (W - D)).sum()
    return INTEGRALS[activation](s) + pulled + proximal / 2 * D.square().sum()


def optimizers(name: str, rate: float, beta1: float, beta2: float, epsilon: float) -> Any:
    """The torch optimizer of the same steps, for those that torch has."""
    return {
        "sgd": lambda p: torch.optim.SGD(p, rate),
        "momentum": lambda p: torch.optim.SGD(p, rate, momentum=beta1),
        "nesterov": lambda p: torch.optim.SGD(p, rate, momentum=beta1, nesterov=True),
        "adam": lambda p: torch.optim.Adam(p, rate, (beta1, beta2), epsilon),
    }[name]


def problem(activation: str = "tanh", groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """V, rows and W."""
    draw = torch.Generator().manual_seed(3)
    shape = (3, 4) if groups == 1 else (groups, 3, 4)
    make = lambda *size: torch.randn(size, generator=draw, dtype=torch.float64)  # noqa: E731
    return make(*shape), make(4, 2, groups, 4), make(*shape)


NUMBERS = {"gamma": 0.7, "proximal": 0.3, "rate": 0.02, "beta1": 0.6, "beta2": 0.8, "epsilon": 1e-3}


def scalars(updates: float = 0.0, count: float = 8.0) -> list[Tensor]:
    return [torch.tensor(x, dtype=torch.float64) for x in (updates, count, *NUMBERS.values())]


def fresh(optimizer: str, V: Tensor) -> list[Any]:
    """The slots of an optimizer as they start."""
    starts = {"": 0.0, "zeros": torch.zeros_like(V), "ones": torch.ones_like(V)}
    return [starts[INNER[optimizer].first], starts[INNER[optimizer].second]]


def fit(activation: str, optimizer: str, steps: int, groups: int = 1, slots: Any = None, **given: float) -> Any:
    V, rows, W = problem(activation, groups)
    slots = fresh(optimizer, V) if slots is None else slots
    return OPS["fit_matching"](V, rows, W, *slots, *scalars(**given), activation, optimizer, steps)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_the_first_steps_are_those_of_autograd_on_the_matching_loss(activation: str, groups: int) -> None:
    V, rows, W = problem(activation, groups)
    D, steps = torch.zeros_like(V), 3
    for k in range(steps):
        free = D.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(local_loss(free, V, rows, W, 0.7, 0.3, activation), free)
        D = D - 0.02 * max(1 - k / steps, 0.25) * gradient
    found = fit(activation, "sgd", steps, groups)[0]
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if activation == "softplus" else {}
    torch.testing.assert_close(found, D, **tolerance)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "nesterov", "adam"])
def test_the_inner_optimizers_are_those_of_torch(optimizer: str) -> None:
    V, rows, W = problem()
    D = torch.zeros_like(V).requires_grad_()
    reference = optimizers(optimizer, 0.02, 0.6, 0.8, 1e-3)([D])
    slots = fresh(optimizer, V)
    for batch in range(3):  # slots and the count of steps go on, D starts anew
        with torch.no_grad():
            D.zero_()
        reference.zero_grad()
        local_loss(D, V, rows, W, 0.7, 0.3, "tanh").backward()
        reference.step()
        found, *slots = fit("tanh", optimizer, 1, slots=slots, updates=float(batch))
        torch.testing.assert_close(found, D.detach())


def test_rmsprop_and_adagrad_by_hand() -> None:
    V, rows, W = problem()
    for optimizer in ("rmsprop", "adagrad"):
        D, m, v = torch.zeros_like(V), torch.zeros_like(V), torch.ones_like(V) * (optimizer == "rmsprop")
        for k in range(5):
            free = D.clone().requires_grad_()
            (g,) = torch.autograd.grad(local_loss(free, V, rows, W, 0.7, 0.3, "tanh"), free)
            rate = 0.02 * [1, 0.8, 0.6, 0.4, 0.25][k]
            if optimizer == "rmsprop":
                v = 0.8 * v + 0.2 * g * g
                m = 0.6 * m - rate * g / (v + 1e-3) ** 0.5
                D = D + m
            else:
                v = v + g * g
                D = D - rate * g / (v + 1e-3) ** 0.5
        found, first, second = fit("tanh", optimizer, 5)
        torch.testing.assert_close(found, D)
        torch.testing.assert_close(second, v)
        if optimizer == "rmsprop":
            torch.testing.assert_close(first, m)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("optimizer", INNER)
def test_the_squared_loss_needs_only_the_gram(optimizer: str, groups: int) -> None:
    V, rows, W = problem(groups=groups)
    H = OPS["gram"](rows)
    by_rows = fit("identity", optimizer, 4, groups)
    slots = fresh(optimizer, V)
    found = OPS["fit_squared"](V, H, *slots, *scalars(), optimizer, 4)
    torch.testing.assert_close(found, by_rows)
    diagonal = torch.diag_embed(torch.diagonal(H, dim1=-2, dim2=-1))
    one = OPS["fit_squared"](V, diagonal, *slots, *scalars(), optimizer, 4)
    two = OPS["fit_squared"](V, torch.diagonal(H, dim1=-2, dim2=-1), *slots, *scalars(), optimizer, 4)
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("missing", ["rows", "gradient"])
@pytest.mark.parametrize("optimizer", INNER)
def test_without_rows_or_gradient_nothing_moves(optimizer: str, missing: str) -> None:
    V, rows, W = problem()
    slots = [torch.full_like(V, 0.5) if part else 0.0 for part in (INNER[optimizer].first, INNER[optimizer].second)]
    V, count = (V, 0.0) if missing == "rows" else (torch.zeros_like(V), 8.0)
    given = (V, rows, W, *slots, *scalars(count=count), "tanh", optimizer, 3)
    found, first, second = OPS["fit_matching"](*given)
    assert not found.any()
    for new, old in ((first, slots[0]), (second, slots[1])):
        assert torch.equal(new.double(), torch.as_tensor(old).double())


def test_unknown_names_are_refused() -> None:
    V, H = Mat((3, 4)), Psd((4, 4))
    numbers = [0.0] * 8
    with pytest.raises(FxcurvError, match="optimizer='lbfgs' of op 'fit_squared' is unknown; choose one of rmsprop"):
        OPS["fit_squared"].infer(V, H, 0.0, 0.0, *numbers, "lbfgs", 3)
    assert OPS["fit_squared"].infer(V, H, V, 0.0, *numbers, "momentum", 3) == (V, V, Scalar((), torch.float32))
