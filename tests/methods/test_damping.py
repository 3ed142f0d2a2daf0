"""The preconditioned gradient against dense solves: every damping scheme, norm layers, the KL clip."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.methods.nets import convnet, mlp
from tests.methods.oracle import Step, block_diagonal, example_gradients, ggn, step

pytestmark = pytest.mark.usefixtures("float64")

DAMPING = 0.03


def expected(taken: Step, name: str, groups: int, scheme: str) -> Tensor:
    """The direction of a layer by dense inverses of its reported factors."""
    gradient, _ = taken.pair(name, groups)
    factors = {k: v if groups > 1 else v[None] for k, v in taken.factors(name).items() if k in "AG"}
    parts = []
    for a, g, v in zip(factors["A"], factors["G"], gradient, strict=True):
        eye_a, eye_g = torch.eye(len(a)), torch.eye(len(g))
        if scheme == "eigenvalue":
            matrix = torch.kron(g, a) + DAMPING * torch.eye(v.numel())
        else:
            pi = math.sqrt((a.trace() / len(a)) / (g.trace() / len(g))) if scheme == "pi" else 1.0
            root = math.sqrt(DAMPING)
            matrix = torch.kron(g + root / pi * eye_g, a + root * pi * eye_a)
        parts.append(torch.linalg.solve(matrix, v.flatten()).reshape(v.shape))
    return torch.stack(parts)


@pytest.mark.parametrize("scheme", ["pi", "sqrt", "eigenvalue"])
@pytest.mark.parametrize("groups", [1, 2])
def test_direction_is_the_dense_solve(scheme: str, groups: int) -> None:
    net, x, y = convnet(groups), torch.randn(4, 2, 5, 5), torch.randint(0, 3, (4,))
    taken = step(
        net, "kfac", x, lambda f: F.cross_entropy(f, y), loss="cross_entropy", damping=DAMPING, damping_scheme=scheme
    )
    for name, size in (("0", groups), ("2", 1), ("5", 1)):
        torch.testing.assert_close(taken.pair(name, size)[1], expected(taken, name, size, scheme))


def test_eigenvalue_damping_is_exact_newton_where_the_block_is() -> None:
    """A linear model with square loss: one damped Gauss-Newton step, with the true matrix."""
    net, x, y = nn.Sequential(nn.Linear(3, 2)), torch.randn(8, 3), torch.randn(8, 2)

    def user(f: Tensor) -> Tensor:
        return F.mse_loss(f, y)

    taken = step(net, "kfac", x, user, loss="mse", fisher="ggn", damping=1e-3, damping_scheme="eigenvalue")
    gradient, direction = taken.pair("0")
    matrix = ggn(net, "0", x, user) + 1e-3 * torch.eye(8)
    torch.testing.assert_close(direction.flatten(), torch.linalg.solve(matrix, gradient.flatten()))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", ["layer", "group", "batch"])
@pytest.mark.parametrize("fisher", ["empirical", "ggn"])
@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_units_of_norm_layers_keep_their_exact_blocks(norm: str, fisher: str, method: str, bias: bool) -> None:
    layer: nn.Module = {
        "layer": lambda: nn.LayerNorm(4, bias=bias),
        "group": lambda: nn.GroupNorm(2, 4),
        "batch": lambda: nn.BatchNorm1d(4),
    }[norm]()
    if norm != "layer" and not bias:
        layer.bias = None
    if norm == "batch":
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2.0)
        layer.eval()  # frozen statistics: examples do not interact
    net = nn.Sequential(nn.Linear(3, 4), layer, nn.Tanh(), nn.Linear(4, 3))
    with torch.no_grad():
        layer.weight.normal_()
    x, y = torch.randn(5, 3), torch.randint(0, 3, (5,))

    def user(f: Tensor) -> Tensor:
        return F.cross_entropy(f, y)

    taken = step(net, method, x, user, loss="cross_entropy", fisher=fisher, damping=DAMPING)
    if fisher == "ggn":
        dense = ggn(net, "1", x, user, 4)
    else:
        rows = example_gradients(net, "1", x, lambda f, n: F.cross_entropy(f, y[n : n + 1]), 4)
        dense = rows.T @ rows / 5
    dense = block_diagonal(dense, 4)
    torch.testing.assert_close(torch.block_diag(*taken.factors("1")["F"]), dense)
    gradient, direction = taken.pair("1", 4)
    solved = torch.linalg.solve(dense + DAMPING * torch.eye(len(dense)), gradient.flatten())
    torch.testing.assert_close(direction.flatten(), solved)


def test_norm_over_positions_sums_before_the_product() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3))
    x, y = torch.randn(4, 5, 3), torch.randint(0, 3, (4,))
    taken = step(net, "kfac", x, lambda f: F.cross_entropy(f, y), loss="cross_entropy", fisher="empirical")
    rows = example_gradients(net, "1", x, lambda f, n: F.cross_entropy(f, y[n : n + 1]), 4)
    torch.testing.assert_close(torch.block_diag(*taken.factors("1")["F"]), block_diagonal(rows.T @ rows / 4, 4))


@pytest.mark.parametrize("clip, active", [(1e-4, True), (1e6, False)])
@pytest.mark.parametrize("method", ["kfac", "ekfac", "diag"])
def test_kl_clip_scales_all_layers_alike(method: str, clip: float, active: bool) -> None:
    net, x, y = mlp(3, 4, 3), torch.randn(6, 3), torch.randint(0, 3, (6,))

    def taken(value: float | None) -> Step:
        return step(net, method, x, lambda f: F.cross_entropy(f, y), loss="cross_entropy", kl_clip=value, lr=0.2)

    free, clipped = taken(None), taken(clip)
    size = sum(float((free.direction[n] * free.gradient[n]).sum()) for n in free.gradient)
    factor = min(1.0, math.sqrt(clip / (0.2**2 * size)))
    assert (factor < 1) == active
    assert free.info.kl_scale is None
    assert clipped.info.kl_scale == pytest.approx(factor, rel=1e-9)
    for name, direction in free.direction.items():
        torch.testing.assert_close(clipped.direction[name], factor * direction)
