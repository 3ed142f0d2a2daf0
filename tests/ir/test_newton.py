"""Roots by matrix products against eigendecompositions, and how they fail."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS
from fxcurv.ir.types import Psd

root_of, orthogonal = OPS["newton_root"], OPS["newton_schulz"]


def spectrum(d: int, condition: float) -> tuple[Tensor, Tensor]:
    """A matrix with log-uniform eigenvalues between 1 / condition and 1, and its basis."""
    values = torch.logspace(-math.log10(condition), 0, d, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]
    return (basis * values) @ basis.mT, basis


def exact(A: Tensor, root: int, epsilon: float) -> Tensor:
    values, vectors = torch.linalg.eigh(A)
    return (vectors * (values + epsilon) ** (-1 / root)) @ vectors.mT


@pytest.mark.parametrize("root", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("condition", [10.0, 1e3, 1e6])
def test_a_root_is_that_of_the_eigenvalues(root: int, condition: float) -> None:
    A, _ = spectrum(24, condition)
    found = root_of(A, root, torch.tensor(1e-6, dtype=torch.float64), 60)
    expected = exact(A, root, 1e-6)
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert torch.equal(found, found.mT)


@pytest.mark.parametrize(("condition", "steps", "error"), [(10.0, 7, 2e-6), (1e3, 11, 1e-5), (1e6, 18, 2e-3)])
def test_steps_and_errors_in_single_precision(condition: float, steps: int, error: float) -> None:
    """d = 64, root 4, ridge 1e-6: as many steps as published for the iteration, two more at most."""
    A, _ = spectrum(64, condition)
    found = root_of(A.float(), 4, torch.tensor(1e-6), steps + 2).double()
    expected = exact(A, 4, 1e-6)
    assert float((found - expected).norm() / expected.norm()) < error
    assert root_of(A.float(), 4, torch.tensor(1e-6), steps - 5).isnan().all()


def test_each_matrix_of_a_batch_stops_by_itself() -> None:
    good, _ = spectrum(6, 10.0)
    bad = torch.full((6, 6), math.nan, dtype=torch.float64)
    indefinite = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, -0.5], dtype=torch.float64))
    found = root_of(torch.stack([good, bad, indefinite, 4 * torch.eye(6, dtype=torch.float64)]), 2, 0.0, 40)
    torch.testing.assert_close(found[0], exact(good, 2, 0.0), rtol=1e-6, atol=1e-6)
    assert found[1].isnan().all() and found[2].isnan().all()
    torch.testing.assert_close(found[3], torch.eye(6, dtype=torch.float64) / 2, rtol=1e-6, atol=1e-7)


def test_wrong_literals_are_refused() -> None:
    for root, steps in ((0, 10), (2, 0)):
        with pytest.raises(FxcurvError, match="at least 1"):
            OPS["newton_root"].infer(Psd((3, 3)), root, 0.1, steps)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
def test_newton_schulz_keeps_directions_and_levels_singular_values(shape: tuple[int, int]) -> None:
    V = torch.randn(*shape, dtype=torch.float64)
    left, values, right = torch.linalg.svd(V, full_matrices=False)
    assert values[0] > 2 * values[-1]
    mapped = left.mT @ orthogonal(V, 5) @ right.mT
    assert float((mapped - torch.diag(mapped.diagonal())).abs().max()) < 1e-9
    assert float(mapped.diagonal().min()) > 0.6 and float(mapped.diagonal().max()) < 1.25


def test_newton_schulz_is_the_published_polynomial() -> None:
    values = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    x = values / values.norm()
    for _ in range(3):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    torch.testing.assert_close(orthogonal(torch.diag(values), 3), torch.diag(x))
    assert not orthogonal(torch.zeros(3, 4, dtype=torch.float64), 5).any()
