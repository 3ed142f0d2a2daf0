"""Rank-one curvature against dense inverses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxcurv.ir.op import OPS

update, stabilize = OPS["rank1_update"], OPS["stabilize"]
apply, right_apply = OPS["rank1_apply"], OPS["rank1_right_apply"]


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99])
def test_fifty_exact_updates_are_the_dense_inverse(gamma: float) -> None:
    factor = torch.eye(6, dtype=torch.float64)
    inverse = factor.clone()
    for _ in range(50):
        v = torch.randn(6, dtype=torch.float64)
        factor = gamma * factor + (1 - gamma) * torch.outer(v, v)
        inverse = update(inverse, v, number(gamma))
        assert torch.equal(inverse, inverse.mT)
    torch.testing.assert_close(inverse, torch.linalg.inv(factor), rtol=1e-8, atol=1e-8)


def test_printed_and_exact_move_along_the_vector_in_opposite_directions() -> None:
    """From the identity and a unit vector, gamma = 0.9: 1.013 and 0.9 printed, 1.0 and 1.111 exact."""
    v = torch.zeros(4, dtype=torch.float64)
    v[1] = 1.0
    along, across = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for k, printed in enumerate((True, False)):
        result = update(torch.eye(4, dtype=torch.float64), v, number(0.9), printed)
        along[k], across[k] = result[1, 1], result[0, 0]
    torch.testing.assert_close(along, torch.tensor([0.9 + 0.1 / (0.81 * 1.09), 1.0], dtype=torch.float64))
    torch.testing.assert_close(across, torch.tensor([0.9, 1 / 0.9], dtype=torch.float64))


@pytest.mark.parametrize(("gamma", "distance"), [(0.95, 0.09), (0.9, 0.18), (0.5, 0.76)])
def test_how_far_printed_is_from_exact(gamma: float, distance: float) -> None:
    v = torch.nn.functional.normalize(torch.randn(10, dtype=torch.float64), dim=0)
    printed, exact = (update(torch.eye(10, dtype=torch.float64), v, number(gamma), form) for form in (True, False))
    assert float((printed - exact).norm() / exact.norm()) == pytest.approx(distance, abs=0.005)


def test_printed_stays_positive_definite() -> None:
    inverse = torch.eye(5, dtype=torch.float64)
    for k in range(30):
        inverse = update(inverse, torch.randn(5, dtype=torch.float64) * 3.0 ** (k % 3 - 1), number(0.9), True)
        assert float(torch.linalg.eigvalsh(inverse).min()) > 0


def test_only_matrices_above_the_limit_are_stabilized() -> None:
    small, large = torch.eye(3, dtype=torch.float64), torch.diag(torch.tensor([1.0, -9.0, 2.0], dtype=torch.float64))
    result = stabilize(torch.stack([small, large]), number(4.0), number(0.9))
    torch.testing.assert_close(result[0], small, rtol=0, atol=0)
    torch.testing.assert_close(result[1], 0.9 * large + 0.1 * torch.eye(3, dtype=torch.float64))


def dense(V: Tensor, a: Tensor, g: Tensor, damping: float) -> Tensor:
    """(kron(g g^T, a a^T) + damping I)^-1 vec(V), vec row-major."""
    curvature = torch.kron(torch.outer(g, g), torch.outer(a, a))
    return torch.linalg.solve(curvature + damping * torch.eye(V.numel(), dtype=V.dtype), V.flatten()).view(V.shape)


@pytest.mark.parametrize(("o", "i"), [(3, 4), (1, 5), (4, 1)])
def test_eva_is_the_dense_inverse(o: int, i: int) -> None:
    V, a, g = (torch.randn(*shape, dtype=torch.float64) for shape in ((o, i), (i,), (o,)))
    torch.testing.assert_close(apply(V, a, g, number(0.3)), dense(V, a, g, 0.3))


def test_eva_of_one_example_is_its_damped_natural_gradient() -> None:
    a, g = torch.randn(4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    V = torch.outer(g, a)
    expected = V / (0.2 + a.square().sum() * g.square().sum())
    torch.testing.assert_close(apply(V, a, g, number(0.2)), expected)
    torch.testing.assert_close(apply(V, a, torch.zeros_like(g), number(0.2)), V / 0.2)


def test_eva_f_is_the_damped_inverse_of_one_side() -> None:
    V, a = torch.randn(3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    inverse = torch.linalg.inv(torch.outer(a, a) + 0.3 * torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(right_apply(V, a, number(0.3)), V @ inverse)
