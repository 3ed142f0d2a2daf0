"""The inverse of one and of two Kronecker products against dense matrices, and what keeps it positive definite."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcurv
from fxcurv.runtime.module import CurvatureModule
from tests.methods.oracle import accumulate, step, transform
from tests.methods.test_ekfac import Case, case

pytestmark = pytest.mark.usefixtures("float64")

KINDS = ("linear", "conv", "grouped conv", "tokens")
METHODS = ("kpsvd", "deflation", "lanczos", "kfac_corrected")
TWO = METHODS[1:]


def taken(c: Case, method: str, **options: Any) -> tuple[list[dict[str, Tensor]], Tensor, Tensor]:
    """Factors by group, and the gradient and direction of every group, of one step on the empirical Fisher."""
    options = {"loss": "cross_entropy", "fisher": "empirical", "share": 1.0, **options}
    done = step(c.net, method, c.x, c.loss, **options)
    factors = done.factors(c.name)
    apart = [{k: v[i] if c.groups > 1 else v for k, v in factors.items()} for i in range(c.groups)]
    return apart, *done.pair(c.name, c.groups)


def first_term(factors: dict[str, Tensor], root: float, pi: float = 1.0) -> tuple[Tensor, Tensor]:
    """Damped A and G."""
    A, G = factors["A"], factors["G"]
    return A + pi * root * torch.eye(len(A)), G + root / pi * torch.eye(len(G))


def generalised(D: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """(s, K) with C K = D K diag(s), K^T D K = I, by a Cholesky factor: not how the package does it."""
    L = torch.linalg.cholesky(D)
    inner = torch.linalg.solve_triangular(L, torch.linalg.solve_triangular(L, C, upper=False).T, upper=False)
    s, E = torch.linalg.eigh((inner + inner.T) / 2)
    return s, torch.linalg.solve_triangular(L.T, E, upper=True)


@pytest.mark.parametrize("scheme", ["sqrt", "pi"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_direction_solves_with_the_fitted_sum(kind: str, method: str, scheme: str) -> None:
    damping = 0.3
    parts, gradient, direction = taken(case(kind), method, damping=damping, damping_scheme=scheme)
    for factors, v, u in zip(parts, gradient, direction, strict=True):
        pi = 1.0
        if scheme == "pi":
            pi = float((factors["A"].diagonal().mean() / factors["G"].diagonal().mean()).sqrt())
        A, G = first_term(factors, damping**0.5, pi)
        matrix = torch.kron(G, A)
        if method != "kpsvd":
            second = torch.kron(factors["G2"], factors["A2"])
            assert second.norm() > 1e-3 * torch.kron(factors["G"], factors["A"]).norm()
            s_a, s_g = generalised(A, factors["A2"])[0], generalised(G, factors["G2"])[0]
            assert 1 + torch.outer(s_g, s_a).min() > 0.1  # no safeguard is at work here
            matrix = matrix + second
        torch.testing.assert_close(u.flatten(), torch.linalg.solve(matrix, v.flatten()), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("safeguard", ["floor", "absolute", "drop"])
@pytest.mark.parametrize("method", TWO)
def test_safeguards_keep_an_indefinite_sum_positive(method: str, safeguard: str) -> None:
    c, damping, floor = case("linear", 1), 1e-8, 0.35
    options = {"damping": damping, "safeguard": safeguard, "floor": floor}
    ((factors,), (v,), (u,)) = taken(c, method, **options)
    A, G = first_term(factors, damping**0.5)
    (s_a, K_a), (s_g, K_g) = generalised(A, factors["A2"]), generalised(G, factors["G2"])
    x = torch.outer(s_g, s_a)
    assert (1 + x).min() < floor and (1 + x).max() > 1
    if safeguard == "floor":
        middle = (1 + x).clamp(min=floor)
    elif safeguard == "absolute":
        middle = 1 + torch.outer(s_g.abs(), s_a.abs())
    else:
        middle = torch.where(1 + x < floor, torch.ones_like(x), 1 + x)
    expected = K_g @ ((K_g.T @ v @ K_a) / middle) @ K_a.T
    torch.testing.assert_close(u, expected, rtol=1e-5, atol=1e-7 * float(expected.abs().max()))
    assert float((u * v).sum()) > 0


@pytest.mark.parametrize("method", METHODS)
def test_strong_damping_gives_the_gradient(method: str) -> None:
    c = case("conv")
    done = step(c.net, method, c.x, c.loss, loss="cross_entropy", fisher="empirical", damping=1e12)
    for name, gradient in done.gradient.items():
        torch.testing.assert_close(done.direction[name] * 1e12, gradient, rtol=1e-4, atol=1e-9)


class Sometimes(nn.Module):
    """A second branch that some calls leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor, both: bool = True) -> Tensor:
        return self.first(x) + self.second(x) if both else self.first(x)


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_is_not_reached_keeps_its_states(method: str) -> None:
    x, y, found = torch.randn(8, 4), torch.randint(0, 3, (8,)), []
    model = transform(Sometimes(), method, x, loss="cross_entropy", fisher="empirical", factor_every=1)
    for both in (True, False):
        model.zero_grad()
        outputs = model(x + both, both)
        model.backward(F.cross_entropy(outputs, y), outputs)
        info = model.precondition_()
        assert not info.fallback and not info.repaired
        found.append([model.factors(name) for name in ("first", "second")])
    for part, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][part], value, rtol=0, atol=0)
        assert (found[1][0][part] - found[0][0][part]).norm() > 1e-3 * value.norm()


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_are_one_batch(method: str) -> None:
    c = case("conv")
    options = {"loss": "cross_entropy", "fisher": "empirical", "damping": 0.1, "share": 0.5}
    whole, parts = (transform(copy.deepcopy(c.net), method, c.x, **options) for _ in range(2))
    loss = [lambda f, y=y: F.cross_entropy(f, y) for y in (c.y, c.y[:2], c.y[2:])]
    one = accumulate(whole, [(c.x, loss[0], {})])
    two = accumulate(parts, [(c.x[:2], lambda f: loss[1](f) / 2, {}), (c.x[2:], lambda f: loss[2](f) / 2, {})])
    for name, direction in one.direction.items():
        torch.testing.assert_close(two.direction[name], direction, rtol=1e-7, atol=1e-10)


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1, groups=2), nn.Tanh(),
        nn.Flatten(), nn.Linear(54, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(),
        nn.Linear(6, 3),
    )  # fmt: skip


def train(method: str, steps: int = 4, **options: Any) -> CurvatureModule:
    """A model after some steps, two of four with statistics and refresh."""
    torch.manual_seed(0)
    net, x, y = images(), torch.randn(8, 2, 5, 5), torch.randint(3, (8,))
    model = fxcurv.transform(
        net, method, example_inputs=(x,), loss="cross_entropy", factor_every=2, solve_every=2, damping=0.1, **options
    )
    continue_training(model, x, y, steps)
    return model


def continue_training(model: CurvatureModule, x: Tensor, y: Tensor, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        out = model(x)
        model.backward(F.cross_entropy(out, y), out)
        model.precondition_()
        optimizer.step()


@pytest.mark.parametrize("method", METHODS)
def test_passes_and_kernels_change_nothing(method: str) -> None:
    base = list(train(method).parameters())
    for switched in ({"disable": (name,)} for name in ("batch", "fuse", "defer", "sink", "share")):
        for mine, theirs in zip(train(method, **switched).parameters(), base, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)
    for mine, theirs in zip(train(method, backend="reference").parameters(), base, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_training_resumes_bit_for_bit(method: str) -> None:
    """The last solution is a state: a resumed run starts its fits where the first one would."""
    whole, half = train(method, 4), train(method, 2)
    torch.manual_seed(0)
    net, x, y = images(), torch.randn(8, 2, 5, 5), torch.randint(3, (8,))
    resumed = fxcurv.transform(
        net, method, example_inputs=(x,), loss="cross_entropy", factor_every=2, solve_every=2, damping=0.1
    )
    resumed.load_state_dict(half.state_dict())
    continue_training(resumed, x, y, 2)
    for (name, mine), theirs in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("method", METHODS)
def test_float32_and_degenerate_batches_stay_finite(method: str) -> None:
    """One example, a dead unit, equal examples: fits with nothing to find."""
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).float()
    with torch.no_grad():
        net[0].bias[0] = -100.0
    for x in (torch.randn(1, 4), torch.ones(6, 4), torch.zeros(3, 4), torch.randn(8, 4)):
        x, y = x.float(), torch.zeros(len(x), dtype=torch.long)
        done = step(net, method, x, lambda f, y=y: F.cross_entropy(f, y), loss="cross_entropy", damping=1e-3)
        assert not done.info.fallback and not done.info.repaired and not done.info.kept
        assert all(torch.isfinite(direction).all() for direction in done.direction.values())
