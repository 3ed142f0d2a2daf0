"""TKFAC against the explicit sum over (example, position) pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import FxcurvError
from tests.methods.nets import Attention, convnet, mlp
from tests.methods.oracle import Step, accumulate, ggn, step, transform
from tests.methods.pairs import blocks, pairs

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore:fisher='ggn' runs")]

DAMPING = 0.02


@dataclass
class Case:
    """A network, a batch with class targets, and a layer with its groups."""

    net: nn.Module
    x: Tensor
    y: Tensor
    name: str
    groups: int = 1

    def loss(self, f: Tensor) -> Tensor:
        return F.cross_entropy(f, self.y)

    def pairs(self) -> tuple[Tensor, Tensor]:
        return pairs(self.net, self.name, self.x, lambda f: F.cross_entropy(f, self.y, reduction="sum"))

    def fisher(self) -> Tensor:
        """(groups, d, d), positions uncorrelated."""
        return blocks(*self.pairs(), self.y.numel())

    def step(self, **options: Any) -> Step:
        options = {"method": "tkfac", "fisher": "empirical", "damping": DAMPING, **options}
        return step(self.net, options.pop("method"), self.x, self.loss, loss="cross_entropy", **options)

    def dense(self, part: Tensor) -> Tensor:
        """A factor or block as (groups, d, d), one that is kept as its diagonal spread out."""
        part = part if part.ndim == (3 if self.groups > 1 else 2) else torch.diag_embed(part)
        return part if self.groups > 1 else part[None]

    def factors(self, taken: Step) -> dict[str, Tensor]:
        return {side: self.dense(part) for side, part in taken.factors(self.name).items() if side in "AG"}


def case(kind: str, seed: int = 0) -> Case:
    torch.manual_seed(seed)
    images, labels = torch.randn(4, 2, 5, 5), torch.randint(0, 3, (4,))
    if kind == "linear":
        return Case(mlp(4, 5, 3), torch.randn(7, 4), torch.randint(0, 3, (7,)), "0")
    if kind == "no bias":
        net = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3))
        return Case(net, torch.randn(7, 4), torch.randint(0, 3, (7,)), "0")
    if kind == "conv":
        return Case(convnet(), images, labels, "0")
    if kind == "strided conv":
        return Case(convnet(), images, labels, "2")
    if kind == "grouped conv":
        return Case(convnet(groups=2), images, labels, "0", 2)
    if kind == "tokens":
        return Case(Attention(), torch.randn(5, 4, 3), torch.randint(0, 3, (5, 4)), "k")
    net = nn.Sequential(nn.Embedding(7, 3, padding_idx=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    return Case(net, torch.randint(0, 7, (6, 4)), torch.randint(0, 3, (6,)), "0")


KINDS = ("linear", "no bias", "conv", "strided conv", "grouped conv", "tokens", "embedding")


def total(block: Tensor) -> Tensor:
    return block.diagonal(dim1=-2, dim2=-1).sum()


def traced(fisher: Tensor, d_out: int) -> tuple[Tensor, Tensor]:
    """(N_A, N_G): the blocks with their output, or input, index traced out."""
    table = fisher.reshape(len(fisher), d_out, -1, d_out, fisher.shape[-1] // d_out)
    return torch.einsum("goioj->gij", table), torch.einsum("goipi->gop", table)


@pytest.mark.parametrize("kind", KINDS)
def test_trace_and_partial_traces_are_those_of_the_fisher(kind: str) -> None:
    c = case(kind)
    taken, fisher = c.step(), c.fisher()
    factors = c.factors(taken)
    d_out = factors["G"].shape[-1]
    inputs, outputs = traced(fisher, d_out)
    torch.testing.assert_close(factors["A"], inputs)
    torch.testing.assert_close(factors["G"], outputs)
    block = c.dense(taken.model.block(c.name))
    torch.testing.assert_close(block.diagonal(dim1=1, dim2=2).sum(1), fisher.diagonal(dim1=1, dim2=2).sum(1))
    for mine, exact in zip(traced(block, d_out), (inputs, outputs), strict=True):
        torch.testing.assert_close(mine, exact)
    if kind != "embedding":  # there one-hot rows are all of one length
        kfac = c.dense(c.step(method="kfac").model.block(c.name))
        assert abs(float(total(kfac) / total(fisher)) - 1) > 1e-6


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_input_factor_is_half_an_iteration_of_the_power_method_on_the_rearranged_block(kind: str) -> None:
    """R(F) vec(I) = vec(N_A), R the rearrangement in which kron(G, A) is vec(A) vec(G)^T."""
    c = case(kind)
    factors = c.step().factors(c.name)
    d_out, d_in = len(factors["G"]), len(factors["A"])
    rearranged = c.fisher()[0].reshape(d_out, d_in, d_out, d_in).permute(1, 3, 0, 2).reshape(d_in**2, d_out**2)
    torch.testing.assert_close((rearranged @ torch.eye(d_out).flatten()).reshape(d_in, d_in), factors["A"])


def damped(taken: Step, c: Case, strength: Tensor) -> tuple[Tensor, Tensor]:
    """Direction of a layer by either form of the factored damping; strength: lambda of each group."""
    factors = c.factors(taken)
    gradient, _ = taken.pair(c.name, c.groups)
    if isinstance(c.net.get_submodule(c.name), nn.Embedding):
        gradient = taken.gradient[f"{c.name}.weight"].T[None]
    first, second = [], []
    for a, g, v, strong in zip(factors["A"], factors["G"], gradient, strength, strict=True):
        delta, eye_a, eye_g = a.trace(), torch.eye(len(a)), torch.eye(len(g))
        root = strong.sqrt()
        phi, psi = a / delta.sqrt() + root * eye_a, g / delta.sqrt() + root * eye_g
        first.append(torch.linalg.solve(torch.kron(psi, phi), v.flatten()).reshape(v.shape))
        root = (strong / delta).sqrt()
        phi, psi = a / delta + root * eye_a, g / delta + root * eye_g
        second.append(torch.linalg.solve(torch.kron(psi, phi), v.flatten()).reshape(v.shape) / delta)
    return torch.stack(first), torch.stack(second)


def taken_direction(taken: Step, c: Case) -> Tensor:
    if isinstance(c.net.get_submodule(c.name), nn.Embedding):
        return taken.direction[f"{c.name}.weight"].T[None]
    return taken.pair(c.name, c.groups)[1]


@pytest.mark.parametrize("kind", KINDS)
def test_direction_is_the_dense_solve_in_both_forms(kind: str) -> None:
    c = case(kind)
    taken = c.step(conv_damping="fixed")
    first, second = damped(taken, c, torch.full((c.groups,), DAMPING))
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(taken_direction(taken, c), first)


@pytest.mark.parametrize("floor", [1e-9, 50.0])
@pytest.mark.parametrize("groups", [1, 2])
def test_damping_of_convolutions_is_the_mean_eigenvalue_and_dense_layers_keep_pace(groups: int, floor: float) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4, 2, 5, 5), torch.randint(0, 3, (4,))
    cases = [Case(convnet(groups), x, y, "0", groups)]
    cases += [Case(cases[0].net, x, y, "2"), Case(cases[0].net, x, y, "5")]
    taken = cases[0].step(trace_floor=floor)
    strengths = []
    for c in cases[:2]:
        fisher = c.fisher()
        trace = fisher.diagonal(dim1=1, dim2=2).sum(1).clamp(min=floor)
        strengths.append(trace / fisher.shape[-1])
    for c, strength in zip(cases[:2], strengths, strict=True):
        torch.testing.assert_close(taken_direction(taken, c), damped(taken, c, strength)[0])
    largest = torch.cat(strengths).max()
    torch.testing.assert_close(taken_direction(taken, cases[2]), damped(taken, cases[2], DAMPING * largest[None])[0])


def test_a_dense_layer_before_convolutions_follows_them_too() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3))
    c = Case(net, torch.randn(4, 2, 5, 5), torch.randint(0, 3, (4,)), "0")
    taken = c.step()
    fisher = Case(net, c.x, c.y, "2").fisher()[0]
    strength = DAMPING * fisher.trace() / len(fisher)
    torch.testing.assert_close(taken_direction(taken, c), damped(taken, c, strength[None])[0])


def test_rows_of_one_length_give_kfac() -> None:
    """|a| and |g| constant, hence independent: the same block, and the same direction under damping of the whole."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 3, bias=False)), F.normalize(torch.randn(6, 4)) * 1.7
    y = (net(x) - F.normalize(torch.randn(6, 3))).detach()

    def user(f: Tensor) -> Tensor:
        return F.mse_loss(f, y)

    both = [
        step(net, method, x, user, loss="mse", fisher="empirical", damping=0.1, damping_scheme="eigenvalue")
        for method in ("kfac", "tkfac")
    ]
    torch.testing.assert_close(both[0].model.block("0"), both[1].model.block("0"))
    torch.testing.assert_close(both[0].direction["0.weight"], both[1].direction["0.weight"])


@pytest.mark.parametrize("fisher", ["empirical", "ggn"])
def test_one_datum_is_exact(fisher: str) -> None:
    """One pair is one Kronecker product; with exact columns too, since all of them share the input."""
    torch.manual_seed(1)
    c = Case(mlp(4, 5, 3), torch.randn(1, 4), torch.randint(0, 3, (1,)), "0")
    exact = c.fisher()[0] if fisher == "empirical" else ggn(c.net, "0", c.x, c.loss)
    torch.testing.assert_close(c.step(fisher=fisher).model.block("0"), exact)


def test_trace_of_exact_columns_is_that_of_the_gauss_newton_block() -> None:
    c = case("linear")
    torch.testing.assert_close(c.step(fisher="ggn").model.block("0").trace(), ggn(c.net, "0", c.x, c.loss).trace())


def test_averages_are_of_what_is_not_normalised() -> None:
    """Two batches of very different scale: N_A and N_G average, and delta is the trace of the averages."""
    torch.manual_seed(0)
    net = mlp(3, 4, 3)
    cases = [Case(net, torch.randn(6, 3) * size, torch.randint(0, 3, (6,)), "0") for size in (1.0, 9.0, 0.1)]
    model = transform(net, "tkfac", cases[0].x, loss="cross_entropy", fisher="empirical", ema=0.6, damping=DAMPING)
    expected: list[Tensor] = []
    for k, c in enumerate(cases):
        taken = accumulate(model, [(c.x, c.loss, {})])
        new = [part[0] for part in traced(c.fisher(), 4)]
        old = min(k / (k + 1), 0.6)
        expected = [old * was + (1 - old) * now for was, now in zip(expected, new, strict=True)] if k else new
        for side, value in zip("AG", expected, strict=True):
            torch.testing.assert_close(model.factors("0")[side], value)
    torch.testing.assert_close(model.block("0").trace(), expected[0].trace())
    torch.testing.assert_close(taken_direction(taken, cases[-1]), damped(taken, cases[-1], torch.tensor([DAMPING]))[0])


def test_micro_batches_add_up() -> None:
    c = case("conv")
    whole = c.step()
    model = transform(c.net, "tkfac", c.x, loss="cross_entropy", fisher="empirical", damping=DAMPING)
    pieces = accumulate(
        model,
        [
            (c.x[part], lambda f, part=part: F.cross_entropy(f, c.y[part], reduction="sum") / len(c.y), {})
            for part in (slice(0, 1), slice(1, 4))
        ],
    )
    for name, direction in whole.direction.items():
        torch.testing.assert_close(pieces.direction[name], direction)


def test_reduced_sharing_has_one_pair_an_example() -> None:
    c = case("tokens")
    a, g = c.pairs()
    reduced = blocks(a.mean(1, keepdim=True), g.sum(1, keepdim=True), c.y.numel())
    taken = c.step(sharing="reduce")
    inputs, outputs = traced(reduced, 3)
    torch.testing.assert_close(taken.factors("k")["A"], inputs[0])
    torch.testing.assert_close(taken.factors("k")["G"], outputs[0])


@pytest.mark.parametrize("kind", ["linear", "grouped conv"])
def test_wide_factors_are_kept_as_diagonals(kind: str) -> None:
    c = case(kind)
    wide = c.step(max_factor_dim=4, conv_damping="fixed")
    whole = c.step()
    for side in "AG":
        full, kept = c.factors(whole)[side], c.factors(wide)[side]
        if full.shape[-1] > 4:
            torch.testing.assert_close(kept, torch.diag_embed(full.diagonal(dim1=-2, dim2=-1)))
    torch.testing.assert_close(taken_direction(wide, c), damped(wide, c, torch.full((c.groups,), DAMPING))[0])


class Tied(nn.Module):
    """A language model whose head is its table."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.table, self.core = nn.Embedding(6, 3), nn.Linear(3, 3)
        self.head = nn.Linear(3, 6, bias=bias)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.core(self.table(x)))).transpose(1, 2)


@pytest.mark.parametrize("limit", [8192, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_both_roles_of_a_tied_table_add_their_partial_traces(bias: bool, limit: int) -> None:
    net, x, y = Tied(bias), torch.randint(0, 6, (5, 4)), torch.randint(0, 6, (5, 4))
    c = Case(net, x, y, "head")
    taken = c.step(max_factor_dim=limit)
    (layer,) = [layer for layer in taken.model.layers if len(layer.uses) == 2]
    inputs, outputs = (part[0] for part in traced(c.fisher(), 6))
    tokens, g = Case(net, x, y, "table").pairs()
    if bias:
        g = torch.cat([g, torch.zeros(*g.shape[:3], 1)], 3)
    embedded = blocks(g, tokens, y.numel())  # the table is the transpose: tokens are its output side
    more = [part[0] for part in traced(embedded, 6)]
    torch.testing.assert_close(taken.factors(layer.name)["A"], inputs + more[0])
    expected = outputs + more[1]
    if limit < 6:
        expected = torch.diag(expected.diagonal())
    torch.testing.assert_close(c.dense(taken.factors(layer.name)["G"])[0], expected)


class Fork(nn.Module):
    """A branch that only some steps take."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.aside, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.both = True

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.head(h + self.aside(h) * 0.0 if not self.both else h + self.aside(h))


def test_a_layer_without_gradient_keeps_a_finite_step() -> None:
    """A = |g|^2-weighted, so that no gradient means no factor at all: the inverse is that of the damping."""
    net, x, y = Fork(), torch.randn(5, 3), torch.randint(0, 2, (5,))
    net.both = False
    taken = step(net, "tkfac", x, lambda f: F.cross_entropy(f, y), loss="cross_entropy", fisher="empirical")
    assert not taken.factors("aside")["A"].any() and not taken.info.fallback
    assert all(direction.isfinite().all() for direction in taken.direction.values())
    assert not taken.direction["aside.weight"].any() and taken.direction["first.weight"].any()


@pytest.mark.parametrize("off", ["sink", "batch", "fuse", "defer", "share", "reference"])
@pytest.mark.parametrize("scheme", ["sqrt", "relative"])
def test_passes_change_nothing(off: str, scheme: str) -> None:
    c = case("grouped conv")
    options: dict[str, Any] = {"backend": "reference"} if off == "reference" else {"disable": (off,)}
    plain, switched = (c.step(damping_scheme=scheme, **more) for more in ({}, options))
    for name, direction in plain.direction.items():
        torch.testing.assert_close(switched.direction[name], direction)


def test_refreshes_may_be_staggered_although_dense_layers_follow_convolutions() -> None:
    c = case("conv")
    model = transform(
        c.net, "tkfac", c.x, loss="cross_entropy", fisher="empirical", solve_every=4, stagger=True, damping=DAMPING
    )
    for _ in range(6):
        taken = accumulate(model, [(c.x, c.loss, {})])
        assert all(direction.isfinite().all() for direction in taken.direction.values())


@pytest.mark.parametrize("scheme", ["pi", "replicated"])
def test_schemes_for_unequal_factors_are_refused(scheme: str) -> None:
    with pytest.raises(FxcurvError, match="choose one of sqrt, eigenvalue, floor, relative, mask"):
        fxcurv.transform(mlp(2, 2), "tkfac", loss="mse", damping_scheme=scheme)


def test_unknown_damping_of_convolutions_is_refused() -> None:
    with pytest.raises(FxcurvError, match="choose one of trace, fixed"):
        fxcurv.transform(mlp(2, 2), "tkfac", loss="mse", conv_damping="none")
