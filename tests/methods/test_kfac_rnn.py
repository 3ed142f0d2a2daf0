"""Recurrent K-FAC against dense sums over time: each option inverts the matrix it says it inverts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcurv.errors import FxcurvError
from fxcurv.methods import kfac_rnn
from tests.methods.oracle import accumulate, transform
from tests.methods.oracle import step as take_step
from tests.passes.programs import build, compiled, facts, keys, linear

pytestmark = pytest.mark.usefixtures("float64")

BATCH, STEPS = 4, 6
DAMPING = 0.02


class Smoothed(nn.Module):
    """Linear maps on every step, a mixture over time between them: output gradients are correlated too."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4, bias=bias), nn.Linear(4, 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(mixed(self.first(x)))


def mixed(x: Tensor) -> Tensor:
    """A running sum over time, and each feature's neighbour one step before."""
    h = torch.tanh(x)
    return h.cumsum(1) / 4 + F.pad(h[:, :-1].roll(1, 2), (0, 0, 1, 0))


class Grouped(nn.Module):
    """Two groups with a matrix each, on every step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("btgi,goi->btgo", x, self.weight).flatten(2).cumsum(1)


def sequences(batch: int = BATCH, steps: int = STEPS, width: int = 3) -> Tensor:
    """Correlated in time."""
    return torch.randn(batch, steps, width).cumsum(1) * 0.7


def targets(batch: int = BATCH, steps: int = STEPS, width: int = 2) -> Tensor:
    return torch.randn(batch, steps, width)


def step(net: nn.Module, x: Tensor, user: Any, **options: Any) -> Any:
    return take_step(net, "kfac_rnn", x, user, damping=DAMPING, **options)


def damped(factors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A and G of one group with the factored damping, written out."""
    A, G = factors["A"], factors["G"]
    pi = ((A.trace() / len(A)) / (G.trace() / len(G))).sqrt()
    return A + pi * DAMPING**0.5 * torch.eye(len(A)), G + DAMPING**0.5 / pi * torch.eye(len(G))


def covariances(factors: dict[str, Tensor], lags: int, symmetric: bool = False) -> list[Tensor]:
    """V_d = Psi^d V_0 in the order of ``[W b].flatten()``, d < ``lags``, with Psi = V_1 V_0^-1."""
    A, G = damped(factors)
    A1, G1 = factors["A1"], factors["G1"]
    if symmetric:
        A1, G1 = (A1 + A1.T) / 2, (G1 + G1.T) / 2
    transition = torch.kron(G1 @ torch.linalg.inv(G), A1 @ torch.linalg.inv(A))
    found = [torch.kron(G, A)]
    while len(found) < lags:
        found.append(transition @ found[-1])
    return found


def summed(V: list[Tensor], weights: list[float]) -> Tensor:
    """w_0 V_0 + sum over d > 0 of w_d (V_d + V_d^T)."""
    total = weights[0] * V[0]
    for covariance, weight in zip(V[1:], weights[1:], strict=True):
        total = total + weight * (covariance + covariance.T)
    return total


def check_solves(matrix: Tensor, taken: Any, name: str) -> None:
    gradient, direction = taken.pair(name)
    torch.testing.assert_close(matrix @ direction.reshape(-1), gradient.reshape(-1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fisher", ["mc", "ggn", "empirical"])
def test_option_1_solves_the_sum_over_one_sequence(bias: bool, fisher: str) -> None:
    net, x, y = Smoothed(bias), sequences(), targets()
    taken = step(net, x, lambda f: F.mse_loss(f, y), loss="mse", fisher=fisher, temporal="symmetric")
    for name in ("first", "second"):
        V = covariances(taken.factors(name), STEPS, symmetric=True)
        check_solves(summed(V, [1 - d / STEPS for d in range(STEPS)]), taken, name)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fisher", ["mc", "ggn", "empirical"])
def test_option_2_solves_the_sum_over_all_lags(bias: bool, fisher: str) -> None:
    net, x, y = Smoothed(bias), sequences(), targets()
    taken = step(net, x, lambda f: F.mse_loss(f, y), loss="mse", fisher=fisher)
    for name in ("first", "second"):
        V = covariances(taken.factors(name), 600)
        assert V[-1].norm() < 1e-13 * V[0].norm()
        check_solves(summed(V, [1.0] * len(V)), taken, name)


def test_option_2_needs_no_symmetry_and_option_1_makes_it() -> None:
    """The lag factors really are not symmetric here, and the options really differ from K-FAC and from each other."""
    x, y = sequences(), targets()
    found = {}
    for temporal in ("independent", "symmetric", "stationary"):
        torch.manual_seed(1)
        taken = step(Smoothed(), x, lambda f: F.mse_loss(f, y), loss="mse", fisher="empirical", temporal=temporal)
        found[temporal] = taken.pair("first")[1]
        if temporal != "independent":
            factors = taken.factors("first")
            assert (factors["A1"] - factors["A1"].T).norm() > 0.05 * factors["A1"].norm()
            assert (factors["G1"] - factors["G1"].T).norm() > 0.05 * factors["G1"].norm()
    names = list(found)
    for one, other in zip(names, names[1:] + names[:1], strict=True):
        assert (found[one] - found[other]).norm() > 0.02 * found[one].norm()


def test_groups_are_chains_of_their_own() -> None:
    x, y = torch.randn(BATCH, STEPS, 2, 2).cumsum(1), torch.randn(BATCH, STEPS, 6)
    for temporal in ("symmetric", "stationary"):
        taken = step(Grouped(), x, lambda f: F.mse_loss(f, y), loss="mse", fisher="ggn", temporal=temporal)
        (name,) = (layer.name for layer in taken.model.layers)
        factors = taken.factors(name)
        assert factors["A1"].shape == (2, 2, 2) and factors["G1"].shape == (2, 3, 3)
        for k in range(2):
            one = {part: value[k] for part, value in factors.items()}
            V = covariances(one, STEPS if temporal == "symmetric" else 600, temporal == "symmetric")
            weights = [1 - d / STEPS for d in range(STEPS)] if temporal == "symmetric" else [1.0] * len(V)
            gradient, direction = taken.gradient["weight"][k], taken.direction["weight"][k]
            torch.testing.assert_close(summed(V, weights) @ direction.reshape(-1), gradient.reshape(-1))


def kfac_direction(net: nn.Module, x: Tensor, user: Any, **options: Any) -> dict[str, Tensor]:
    return take_step(net, "kfac", x, user, damping=DAMPING, **options).direction


@pytest.mark.parametrize("temporal", ["independent", "symmetric", "stationary"])
def test_without_correlation_all_options_are_kfac(temporal: str) -> None:
    """Every other input is zero and every other output is masked: A1 = G1 = 0."""
    net, x = nn.Linear(3, 2, bias=False), torch.randn(BATCH, STEPS, 3)
    x[:, ::2] = 0
    mask = (torch.arange(STEPS) % 2 == 0).expand(BATCH, STEPS).unsqueeze(-1)
    y = targets()
    options = {"loss": "mse", "fisher": "ggn", "backward": {"mask": mask}}

    def user(f: Tensor) -> Tensor:
        return (f - y).square()[mask.expand_as(f)].mean()

    taken = step(net, x, user, temporal=temporal, **options)
    if temporal != "independent":
        factors = taken.factors(taken.model.layers[0].name)
        assert not factors["A1"].any() and not factors["G1"].any() and factors["A"].any() and factors["G"].any()
    torch.testing.assert_close(taken.direction, kfac_direction(net, x, user, **options))


@pytest.mark.parametrize("temporal", ["independent", "symmetric", "stationary"])
@pytest.mark.parametrize("shape", [(7, 3), (7, 1, 3)])
def test_one_step_is_kfac(temporal: str, shape: tuple[int, ...]) -> None:
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(shape)
    y = torch.randn(*shape[:-1], 2)

    def user(f: Tensor) -> Tensor:
        return F.mse_loss(f, y)

    taken = step(net, x, user, loss="mse", fisher="mc", temporal=temporal)
    torch.testing.assert_close(taken.direction, kfac_direction(net, x, user, loss="mse", fisher="mc"))


class Looped(nn.Module):
    """A cell in a Python loop: one product for the inputs of all steps, one for the state at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.state, self.head = nn.Linear(3, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        driven, h, states = self.inputs(x), x.new_zeros(x.shape[0], 4), []
        for t in range(STEPS):
            h = torch.tanh(driven[:, t] + self.state(h))
            states.append(h)
        return self.head(torch.stack(states, 1))


class Elman(nn.Module):
    """torch's own recurrent layer and a head on every step; (batch, time) or (time, batch) by ``batch_first``."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.memory, self.head = nn.RNN(3, 4, batch_first=batch_first), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.memory(x)[0])


def elman_rows(net: Elman, x: Tensor, user: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs with the constant and gradients of the user's scalar, (batch, time, d), by a loop written out."""
    cell, h, before, pre, after = net.memory, torch.zeros(len(x), 4), [], [], []
    for t in range(x.shape[1]):
        before.append(h)
        pre.append(x[:, t] @ cell.weight_ih_l0.T + cell.bias_ih_l0 + h @ cell.weight_hh_l0.T + cell.bias_hh_l0)
        h = torch.tanh(pre[-1])
        after.append(h)
    outputs = net.head(torch.stack(after, 1))
    *steps, last = torch.autograd.grad(user(outputs), [*pre, outputs])
    g, ones = torch.stack(steps, 1), torch.ones(*x.shape[:2], 1)
    return {
        "memory.weight_ih_l0": (torch.cat([x, ones], 2), g),
        "memory.weight_hh_l0": (torch.cat([torch.stack(before, 1), ones], 2).detach(), g),
        "head": (torch.cat([torch.stack(after, 1), ones], 2).detach(), last),
    }


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_recurrent_layer_of_torch_is_measured_in_time_order(batch_first: bool) -> None:
    net, x, y = Elman(batch_first), sequences(), targets()

    def user(f: Tensor) -> Tensor:
        return F.mse_loss(f if batch_first else f.transpose(0, 1), y)

    given = x if batch_first else x.transpose(0, 1).contiguous()
    taken = step(net, given, user, loss="mse", fisher="empirical")
    slots, terms = BATCH * STEPS, y.numel()
    rows = elman_rows(net, x, lambda f: F.mse_loss(f, y))
    if not batch_first:
        del rows["head"]  # a linear layer's first axis is the example: here it takes time for that
    for name, (a, g) in rows.items():
        expected = {
            "A": torch.einsum("bti,btj->ij", a, a) / slots,
            "G": torch.einsum("bti,btj->ij", g, g) * terms,
            "A1": torch.einsum("bti,btj->ij", a[:, 1:], a[:, :-1]) / slots,
            "G1": torch.einsum("bti,btj->ij", g[:, 1:], g[:, :-1]) * terms,
        }
        torch.testing.assert_close(taken.factors(name), expected)
        weight, bias = (name, name.replace("weight", "bias")) if name != "head" else ("head.weight", "head.bias")
        gradient, direction = (
            torch.cat([part[weight], part[bias][:, None]], 1).reshape(-1) for part in (taken.gradient, taken.direction)
        )
        torch.testing.assert_close(gradient, torch.einsum("bto,bti->oi", g, a).reshape(-1))
        V = covariances(expected, 600)
        torch.testing.assert_close(summed(V, [1.0] * len(V)) @ direction, gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_gated_layers_are_chains(cell: type[nn.RNNBase]) -> None:
    """All gates of a layer are one output side; every lag factor is there, and each step descends."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory, self.head = cell(3, 4, num_layers=2, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.memory(x)[0])

    net, x, y = Gated(), sequences(), targets()
    taken = step(net, x, lambda f: F.mse_loss(f, y), loss="mse", fisher="mc")
    chained = {layer.name for layer in taken.model.layers if "A1" in taken.factors(layer.name)}
    assert {f"memory.weight_{side}_l{k}" for side in ("ih", "hh") for k in range(2)} <= chained and "head" in chained
    assert all(bool(torch.isfinite(direction).all()) for direction in taken.direction.values())
    total = sum(float((taken.gradient[n] * taken.direction[n]).sum()) for n in taken.gradient)
    assert total > 0


def test_a_weight_in_a_loop_is_kfac_and_says_so() -> None:
    net, x, y = Looped(), sequences(), targets()

    def user(f: Tensor) -> Tensor:
        return F.mse_loss(f, y)

    taken = step(net, x, user, loss="mse", fisher="mc")
    assert "A1" in taken.factors("inputs") and "A1" in taken.factors("head") and "A1" not in taken.factors("state")
    (row,) = (row for row in taken.model.report().rows if row.parameter == "state.weight")
    assert f"one weight used {STEPS} times" in row.reason
    plain = kfac_direction(net, x, user, loss="mse", fisher="mc")
    torch.testing.assert_close(taken.direction["state.weight"], plain["state.weight"])
    assert not torch.allclose(taken.direction["inputs.weight"], plain["inputs.weight"], rtol=0.05)


def test_convolutions_and_embeddings_are_kfac() -> None:
    net = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Conv1d(6, 3, 2), nn.Flatten(), nn.Linear(9, 2))
    x, y = torch.randint(5, (7, 6)), torch.randn(7, 2)

    def user(f: Tensor) -> Tensor:
        return F.mse_loss(f, y)

    taken = step(net, x, user, loss="mse", fisher="mc")
    assert all("A1" not in taken.factors(name) for name in ("0", "1", "2"))
    torch.testing.assert_close(taken.direction, kfac_direction(net, x, user, loss="mse", fisher="mc"))


def test_a_factor_beyond_the_limit_is_kfac() -> None:
    net, x, y = Smoothed(), sequences(), targets()

    def user(f: Tensor) -> Tensor:
        return F.mse_loss(f, y)

    options = {"loss": "mse", "fisher": "mc", "max_factor_dim": 4}
    taken = step(net, x, user, **options)
    assert "A1" in taken.factors("first") and "A1" not in taken.factors("second")
    plain = kfac_direction(net, x, user, **options)
    torch.testing.assert_close(taken.direction["second.weight"], plain["second.weight"])


def explicit_factors(net: Smoothed, x: Tensor, loss: Any) -> dict[str, dict[str, Tensor]]:
    """The four factors of the empirical Fisher by plain autograd; ``loss`` is the mean over B T terms of 2 numbers."""
    first = net.first(x)
    hidden = mixed(first)
    second = net.second(hidden)
    grads = torch.autograd.grad(loss(second), [first, second])
    slots, terms = x.shape[0] * x.shape[1], second.numel()
    found = {}
    for name, a, g in (("first", x, grads[0]), ("second", hidden.detach(), grads[1])):
        a, g = torch.cat([a, torch.ones(*a.shape[:2], 1)], 2), g * terms
        parts = {"A": 0.0, "A1": 0.0, "G": 0.0, "G1": 0.0}
        for n in range(x.shape[0]):
            for t in range(x.shape[1]):
                parts["A"] = parts["A"] + torch.outer(a[n, t], a[n, t]) / slots
                parts["G"] = parts["G"] + torch.outer(g[n, t], g[n, t]) / terms
                if t:
                    parts["A1"] = parts["A1"] + torch.outer(a[n, t], a[n, t - 1]) / slots
                    parts["G1"] = parts["G1"] + torch.outer(g[n, t], g[n, t - 1]) / terms
        found[name] = parts
    return found


def test_statistics_are_the_explicit_sums() -> None:
    net, x, y = Smoothed(), sequences(), targets()

    def user(f: Tensor) -> Tensor:
        return F.mse_loss(f, y)

    taken = step(net, x, user, loss="mse", fisher="empirical")
    for name, parts in explicit_factors(net, x, user).items():
        torch.testing.assert_close(taken.factors(name), parts)  # type: ignore[arg-type]


def test_the_transition_has_norm_below_one() -> None:
    """Whatever the data: the normaliser counts all steps. A constant input comes closest."""
    for x in (sequences(), torch.ones(2, 40, 3), torch.randn(1, 2, 3)):
        net, y = Smoothed(), torch.randn(*x.shape[:2], 2)
        taken = step(net, x, lambda f, y=y: F.mse_loss(f, y), loss="mse", fisher="mc")
        for name in ("first", "second"):
            factors = taken.factors(name)
            for C0, C1 in zip(damped(factors), (factors["A1"], factors["G1"]), strict=True):
                e, Q = torch.linalg.eigh(C0)
                half = Q @ torch.diag(e.rsqrt()) @ Q.T
                assert torch.linalg.matrix_norm(half @ C1 @ half, 2) < 1
        assert all(bool(torch.isfinite(d).all()) for d in taken.direction.values())


@pytest.mark.parametrize("temporal", ["symmetric", "stationary"])
def test_gradient_accumulation(temporal: str) -> None:
    """Two micro-batches are the whole batch, exactly, for exact columns."""
    net, x, y = Smoothed(), sequences(), targets()
    whole = step(net, x, lambda f: F.mse_loss(f, y), loss="mse", fisher="ggn", temporal=temporal)
    model = transform(net, "kfac_rnn", x, loss="mse", fisher="ggn", temporal=temporal, damping=DAMPING)
    halves = [(x[h], lambda f, h=h: F.mse_loss(f, y[h]) / 2, {}) for h in (slice(0, 2), slice(2, 4))]
    parts = accumulate(model, halves)
    torch.testing.assert_close(parts.factors("first"), whole.factors("first"))
    torch.testing.assert_close(parts.direction, whole.direction)


def test_all_four_factors_age_alike() -> None:
    net, y = Smoothed(), targets()
    model = transform(net, "kfac_rnn", sequences(), loss="mse", fisher="empirical", ema=0.75)
    expected: dict[str, Tensor] = {}
    for k in range(3):
        x = sequences()

        def user(f: Tensor) -> Tensor:
            return F.mse_loss(f, y)

        now = explicit_factors(net, x, user)["first"]
        accumulate(model, [(x, user, {})])
        old = min(k / (k + 1), 0.75)
        expected = {part: old * expected.get(part, 0.0) + (1 - old) * now[part] for part in now}
    torch.testing.assert_close(model.factors("first"), expected)


def test_lengths_are_tracked() -> None:
    """Batches of 6 and 3 steps: the mean length of the second step is that of the average of both."""
    net = Smoothed()
    model = transform(net, "kfac_rnn", sequences(), loss="mse", fisher="mc", temporal="symmetric", ema=0.75)
    for steps, expected in ((6, 6.0), (3, 4.5)):
        y = targets(steps=steps)
        accumulate(model, [(sequences(steps=steps), lambda f, y=y: F.mse_loss(f, y), {})])
        assert float(model.state_dict()["curvature.first.T"]) == expected


def test_layers_that_read_one_input_share_its_statistics() -> None:
    program = build("kfac_rnn", facts(linear("q", 2, 3), linear("k", 2, 3, "q")), temporal="symmetric")
    c = compiled(program, "sink,share,simplify,cadence,guard")
    assert c.program is not None
    stats = {key for (key,) in keys(c.program.inputs(), "stat")}
    assert {key for key in stats if "lagged" in key} == {f"lagged_gram({rows})" for rows in ("q.a", "q.g", "k.g")}
    assert "examples(q.a)" in stats
    assert not any(key.endswith((".a", ".g")) for key in stats)  # no rows are kept
    assert {("q.A1", "k.A1"), ("q.T", "k.T"), ("q.G1",), ("k.G1",)} <= keys(c.program.outputs(), "state")


@pytest.mark.parametrize(("temporal", "products"), [("symmetric", 4), ("stationary", 8)])
def test_between_refreshes_a_step_is_products_alone(temporal: str, products: int) -> None:
    c = compiled(build("kfac_rnn", facts(linear("q", 2, 3)), temporal=temporal, factor_every=2))
    assert c.lowered is not None
    source = c.lowered.slice(set()).source
    assert 2 * (source.count("sides_apply_reference(") + source.count("sides_apply_transposed_reference(")) == products
    assert "modes" not in source and "gain_" not in source and "stat_" not in source


def test_four_factors_are_those_of_kfac_and_two_more() -> None:
    net, x, y = Smoothed(), sequences(), targets()
    ours, theirs = (
        take_step(net, method, x, lambda f: F.mse_loss(f, y), loss="mse", fisher="ggn")
        for method in ("kfac_rnn", "kfac")
    )
    for name in ("first", "second"):
        mine = ours.factors(name)
        assert list(mine) == ["A", "G", "A1", "G1"]
        torch.testing.assert_close({part: mine[part] for part in "AG"}, theirs.factors(name))


def test_wrong_settings() -> None:
    with pytest.raises(FxcurvError, match="temporal='later' is unknown"):
        kfac_rnn(temporal="later")
    with pytest.raises(FxcurvError, match="sharing='reduce'"):
        kfac_rnn(sharing="reduce")
    assert kfac_rnn(sharing="reduce", temporal="independent").sharing == "reduce"
