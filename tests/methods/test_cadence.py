"""Statistics and factorisations at their own periods, against a re-implementation with dense matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcurv.errors import FxcurvError
from tests.methods.nets import Attention, convnet, mlp
from tests.methods.oracle import Step, accumulate, corrected, example_gradients, kron, step, transform

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore:fisher='ggn' runs")]

DAMPING = 0.05


def streams(net: nn.Module, steps: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(6, 3), torch.randint(0, 3, (6,))) for _ in range(steps)]


def take(model: Any, x: Tensor, y: Tensor) -> Step:
    return accumulate(model, [(x, lambda f: F.cross_entropy(f, y), {})])


@pytest.mark.parametrize("scheme", ["pi", "eigenvalue"])
@pytest.mark.parametrize("factors, solve", [(1, 3), (2, 3), (3, 2), (2, 1)])
def test_kfac_keeps_stale_factorisations(factors: int, solve: int, scheme: str) -> None:
    net = mlp(3, 4, 3)
    options: dict[str, Any] = {
        "loss": "cross_entropy",
        "fisher": "empirical",
        "damping": DAMPING,
        "damping_scheme": scheme,
    }
    model = transform(net, "kfac", torch.randn(6, 3), ema=0.6, factor_every=factors, solve_every=solve, **options)
    current: dict[str, Tensor] = {}
    frozen: dict[str, Tensor] = {}
    updates = 0
    for k, (x, y) in enumerate(streams(net, 7)):
        if k % factors == 0:
            fresh = step(net, "kfac", x, lambda f, y=y: F.cross_entropy(f, y), **options).factors("0")
            old = min(updates / (updates + 1), 0.6)
            current = {p: (1 - old) * fresh[p] + (old * current[p] if current else 0.0) for p in "AG"}
            updates += 1
        if k % solve == 0:
            frozen = current
        taken = take(model, x, y)
        assert (taken.info.statistics, taken.info.refresh) == (k % factors == 0, k % solve == 0)
        gradient, direction = taken.pair("0")
        a, g = frozen["A"], frozen["G"]
        if scheme == "pi":
            pi = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
            root = DAMPING**0.5
            matrix = torch.kron(g + root / pi * torch.eye(len(g)), a + root * pi * torch.eye(len(a)))
        else:
            matrix = torch.kron(g, a) + DAMPING * torch.eye(gradient.numel())
        torch.testing.assert_close(direction.flatten(), torch.linalg.solve(matrix, gradient.flatten()))
        for part, value in current.items():
            torch.testing.assert_close(model.factors("0")[part], value)


@pytest.mark.parametrize("factors, solve", [(1, 4), (2, 3), (2, 4)])
def test_ekfac_measures_between_refreshes(factors: int, solve: int) -> None:
    net = mlp(3, 4, 3)
    model = transform(
        net, "ekfac", torch.randn(6, 3), loss="cross_entropy", fisher="empirical", damping=DAMPING, ema=0.6,
        factor_every=factors, solve_every=solve,
    )  # fmt: skip
    second, updates = torch.zeros(0), 0
    for k, (x, y) in enumerate(streams(net, 9)):
        rows = example_gradients(net, "0", x, lambda f, n, y=y: F.cross_entropy(f, y[n : n + 1]))
        taken = take(model, x, y)
        found = taken.factors("0")
        basis = torch.kron(found["QG"], found["QA"])
        if k % solve == 0:
            second, updates = (basis.T @ kron(found) @ basis).diagonal(), 1
            torch.testing.assert_close(basis.T @ kron(found) @ basis, torch.diag(second), atol=1e-12, rtol=0)
        elif k % factors == 0:
            old = min(updates / (updates + 1), 0.6)
            second = old * second + (1 - old) * (rows @ basis).square().mean(0)
            updates += 1
        torch.testing.assert_close(found["S"].flatten(), second)
        gradient, direction = taken.pair("0")
        matrix = corrected(found) + DAMPING * torch.eye(gradient.numel())
        torch.testing.assert_close(direction.flatten(), torch.linalg.solve(matrix, gradient.flatten()))


@pytest.mark.parametrize("scheme", ["pi", "eigenvalue"])
def test_projections_that_share_an_input_are_solved_with_their_own_outputs(scheme: str) -> None:
    net, x, y = Attention(), torch.randn(5, 4, 3), torch.randint(0, 3, (5, 4))
    taken = step(
        net, "kfac", x, lambda f: F.cross_entropy(f, y), loss="cross_entropy", damping=DAMPING, damping_scheme=scheme
    )
    rows = torch.cat([x, torch.ones(5, 4, 1)], 2).flatten(0, 1)
    for name in "qkv":
        a, g = (taken.factors(name)[part] for part in "AG")
        torch.testing.assert_close(a, rows.T @ rows / 20)
        gradient, direction = taken.pair(name)
        if scheme == "pi":
            pi, root = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt(), DAMPING**0.5
            matrix = torch.kron(g + root / pi * torch.eye(len(g)), a + root * pi * torch.eye(len(a)))
        else:
            matrix = torch.kron(g, a) + DAMPING * torch.eye(gradient.numel())
        torch.testing.assert_close(direction.flatten(), torch.linalg.solve(matrix, gradient.flatten()))


ROWS = {
    "mlp": lambda: (mlp(3, 4, 3), torch.randn(6, 3), torch.randint(0, 3, (6,))),
    "tokens": lambda: (Attention(), torch.randn(6, 4, 3), torch.randint(0, 3, (6, 4))),
    "conv": lambda: (convnet(2), torch.randn(6, 2, 5, 5), torch.randint(0, 3, (6,))),
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("fisher", ["mc", "ggn", "empirical"])
@pytest.mark.parametrize(
    "method, sharing", [("kfac", "expand"), ("kfac", "reduce"), ("ekfac", "expand"), ("diag", "expand")]
)
def test_reductions_in_the_taps_equal_those_of_kept_rows(kind: str, fisher: str, method: str, sharing: str) -> None:
    """With the pass ``sink`` off the rows themselves arrive; the numbers are the same."""
    net, x, y = ROWS[kind]()
    options: dict[str, Any] = {"loss": "cross_entropy", "fisher": fisher, "sharing": sharing, "damping": DAMPING}
    models = [transform(net, method, x, disable=off, **options) for off in ((), ("sink",))]
    for refresh in (True, False):
        taken = []
        for model in models:
            model.due(refresh=refresh)
            parts = [(x[p], y[p]) for p in (slice(0, 4), slice(4, 6))]
            taken.append(
                accumulate(
                    model, [(a, lambda f, b=b: F.cross_entropy(f, b) * (b.numel() / y.numel()), {}) for a, b in parts]
                )
            )
        for name, direction in taken[0].direction.items():
            torch.testing.assert_close(taken[1].direction[name], direction)


@pytest.mark.parametrize("fuel", [1, 2, 3, 4])
def test_some_statistics_reduced_and_some_kept(fuel: int) -> None:
    """A Gram of inputs arrives once a batch, their kept rows once a column: sums and counts must not be mixed."""
    net, x, y = ROWS["mlp"]()
    whole, part = (
        take(transform(net, "kfac", x, loss="cross_entropy", fisher="ggn", fuel=limit), x, y) for limit in (None, fuel)
    )
    for name in ("0", "2"):
        for side, value in whole.factors(name).items():
            torch.testing.assert_close(part.factors(name)[side], value)


def test_micro_batches_of_different_lengths() -> None:
    """Sequences of four and of two tokens: every factor divides by the rows and terms that were there."""
    net = Attention()
    long, short = (torch.randn(3, n, 3) for n in (4, 2))
    y_long, y_short = torch.randint(0, 3, (3, 4)), torch.randint(0, 3, (3, 2))
    model = transform(net, "kfac", long, loss="cross_entropy", fisher="empirical")
    taken = accumulate(
        model,
        [
            (long, lambda f: F.cross_entropy(f, y_long) * 12 / 18, {}),
            (short, lambda f: F.cross_entropy(f, y_short) * 6 / 18, {}),
        ],
    )
    assert taken.info.terms == 18
    rows = torch.cat([torch.cat([x, torch.ones(*x.shape[:2], 1)], 2).flatten(0, 1) for x in (long, short)])
    torch.testing.assert_close(taken.factors("q")["A"], rows.T @ rows / 18)
    alone = [
        step(net, "kfac", x, lambda f, y=y: F.cross_entropy(f, y), loss="cross_entropy", fisher="empirical").factors(
            "v"
        )["G"]
        for x, y in ((long, y_long), (short, y_short))
    ]
    torch.testing.assert_close(taken.factors("v")["G"], (12 * alone[0] + 6 * alone[1]) / 18)


class TwoResolutions(nn.Module):
    """A convolution used twice, with fewer positions in its second use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(2, 2, 3), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(torch.tanh(self.conv(x)))).mean(2))


@pytest.mark.parametrize("method", ["kfac", "diag", "ekfac"])
def test_uses_with_different_numbers_of_positions(method: str) -> None:
    """They add up in the taps; as kept rows they cannot, which is one clear error."""
    net, x, y = TwoResolutions(), torch.randn(6, 2, 8), torch.randint(0, 3, (6,))
    taken = take(transform(net, method, x, loss="cross_entropy", fisher="empirical"), x, y)
    first = net.conv(x).detach().requires_grad_()
    inner = torch.tanh(first).detach().requires_grad_()
    second = net.conv(inner).detach().requires_grad_()
    (g2,) = torch.autograd.grad(F.cross_entropy(net.head(torch.tanh(second).mean(2)), y, reduction="sum"), second)
    (back,) = torch.autograd.grad(net.conv(inner), inner, g2)
    g1 = back * (1 - inner.detach().square())
    patches = [
        torch.cat([h.unfold(2, 3, 1).transpose(1, 2).flatten(2), torch.ones(6, h.shape[2] - 2, 1)], 2)
        for h in (x, inner.detach())
    ]
    if method == "diag":
        grads = [torch.einsum("bop,bpi->boi", g, a) for g, a in zip((g1, g2), patches, strict=True)]
        expected = {"D": sum(v.square().mean(0) for v in grads)}
    else:
        rows = torch.cat([a.flatten(0, 1) for a in patches])
        expected = {"A": rows.T @ rows / 60, "G": sum(torch.einsum("bop,bqp->oq", g, g) for g in (g1, g2)) / 6}
    for part, value in expected.items():
        torch.testing.assert_close(taken.factors("conv")[part], value)
    with pytest.raises(FxcurvError, match="4 and 6 positions"):
        take(transform(net, method, x, loss="cross_entropy", fisher="empirical", disable=("sink",)), x, y)
