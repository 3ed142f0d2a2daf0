"""The part of a layer's curvature that damping outweighs, against eigenvalues of the dense blocks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxcurv.runtime.damped import damped_fractions
from tests.methods.nets import convnet
from tests.methods.oracle import Step, step

pytestmark = pytest.mark.usefixtures("float64")


def taken(method: str, **options: object) -> Step:
    torch.manual_seed(0)
    x, y = torch.randn(4, 2, 5, 5), torch.randint(0, 3, (4,))
    if method != "foof":
        options["loss"] = "cross_entropy"
    return step(convnet(2), method, x, lambda f: F.cross_entropy(f, y), damping=0.003, **options)


@pytest.mark.parametrize("method", ["kfac", "ekfac", "tkfac", "tekfac", "gnn_ng"])
def test_fraction_of_the_eigenvalues_of_the_block(method: str) -> None:
    fixed = {"conv_damping": "fixed"} if method in ("tkfac", "tekfac") else {}
    model = taken(method, **fixed).model
    found, other = damped_fractions(model), damped_fractions(model, 0.0003)
    for name, fraction in found.items():
        values = torch.linalg.eigvalsh(model.block(name))
        assert fraction == float((values < 0.003).double().mean())
        assert other[name] == float((values < 0.0003).double().mean())
    assert set(found) == {"0", "2", "5"} and 0 <= min(found.values()) < max(found.values()) < 1


@pytest.mark.parametrize("method", ["kfac", "ekfac", "tkfac"])
def test_a_strength_of_the_layers_own_counts(method: str) -> None:
    """Relative damping of 1 is the mean eigenvalue of each group."""
    options = {"conv_damping": "fixed"} if method == "tkfac" else {}
    model = taken(method, damping_scheme="relative", **options).model
    model.hyper["damping"] = 1.0
    for name, fraction in damped_fractions(model, None).items():
        block = model.block(name)
        values = torch.linalg.eigvalsh(block if block.ndim == 3 else block[None])
        assert fraction == float((values < 0.003 * values.mean(1, keepdim=True)).double().mean())


def test_layers_of_one_factor_and_norm_layers() -> None:
    model = taken("foof").model
    values = torch.linalg.eigvalsh(model.factors("2")["A"])
    assert damped_fractions(model)["2"] == float((values < 0.003).double().mean())
    net, x, y = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), torch.randn(5, 3), torch.randint(0, 3, (5,))
    model = step(net, "kfac", x, lambda f: F.cross_entropy(f, y), loss="cross_entropy", damping=0.01).model
    values = torch.linalg.eigvalsh(model.factors("1")["F"])
    assert damped_fractions(model)["1"] == float((values < 0.01).double().mean())
