"""Converted factors against each library's definition, computed from the rows of a layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcurv.errors import FxcurvError
from fxcurv.methods.conventions import CONVENTIONS, convert, revert
from tests.methods import oracle

pytestmark = pytest.mark.usefixtures("float64")

N, T = 3, 16


def mean_of(rows: Tensor) -> Tensor:
    """Mean of the outer products of rows (..., d)."""
    rows = rows.flatten(0, -2)
    return rows.T @ rows / len(rows)


def sum_of(rows: Tensor) -> Tensor:
    """Sum of the outer products of rows (..., d)."""
    rows = rows.flatten(0, -2)
    return rows.T @ rows


# a: (N, T, d_in) rows of the input; g: (N, T, d_out) gradients of every example's own loss
DEFINITIONS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "curvlinops": lambda a, g: (mean_of(a), sum_of(g) / N),
    "singd": lambda a, g: (mean_of(a), sum_of(g) / N),
    "asdl": lambda a, g: (mean_of(a), sum_of(g) / N),
    "curvlinops-reduce": lambda a, g: (mean_of(a.mean(1)), mean_of(g.sum(1))),
    "nngeometry": lambda a, g: (sum_of(a) / N, mean_of(g)),
    "kfac-jax": lambda a, g: (mean_of(a), mean_of(g)),
    "kronfluence": lambda a, g: (mean_of(a), mean_of(g)),
    "kfac-pytorch": lambda a, g: (mean_of(a / T), mean_of(g / (N * T))),  # divides rows by T, g is of the mean loss
    "kfac-pytorch-2019": lambda a, g: (mean_of(a) / T, mean_of(g * T)),
    "eva": lambda a, g: (mean_of(a.mean(1)), mean_of(g.mean(1))),
}


def measured(sharing: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Empirical factors of a convolution with 16 positions, and its rows."""
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3))
    x, y = torch.randn(N, 2, 4, 4), torch.tensor([0, 2, 1])
    step = oracle.step(
        net, "kfac", x, lambda out: F.cross_entropy(out, y), loss="cross_entropy", fisher="empirical", sharing=sharing
    )
    a = F.unfold(x, 3, padding=1).transpose(1, 2)
    hidden = net[0](x).detach().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(net[1:](hidden), y, reduction="sum"), hidden)
    return step.factors("0"), torch.cat([a, torch.ones(N, T, 1)], 2), g.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("name", CONVENTIONS)
def test_definition(name: str) -> None:
    factors, a, g = measured(CONVENTIONS[name].sharing)
    theirs = convert(factors, name, terms=N, positions=T)
    for side, expected in zip(("A", "G"), DEFINITIONS[name](a, g), strict=True):
        torch.testing.assert_close(theirs[side], expected)
        torch.testing.assert_close(revert(theirs, name, terms=N, positions=T)[side], factors[side])


def test_what_cannot_be_converted() -> None:
    factors = {"A": torch.eye(2), "G": torch.eye(3)}
    with pytest.raises(FxcurvError, match="no convention 'backpack'; there are curvlinops"):
        convert(factors, "backpack", terms=4)
    with pytest.raises(FxcurvError, match="no factor 'A'"):
        convert({"D": torch.ones(2)}, "asdl", terms=4)
