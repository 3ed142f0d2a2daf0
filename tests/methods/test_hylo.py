"""HyLo against the explicit empirical Fisher of single examples."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import FxcurvError
from fxcurv.methods import hylo
from tests.methods.nets import convnet, mlp
from tests.methods.oracle import Step, accumulate, as_function, example_gradients, relative, step, transform

pytestmark = pytest.mark.usefixtures("float64")
LAM = 0.02
OPTIONS: dict[str, Any] = {"loss": "cross_entropy", "damping": LAM, "factor_every": 1}


def digits(n: int = 6, seed: int = 0) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(seed)
    return mlp(4, 5, 3), torch.randn(n, 4), torch.randint(0, 3, (n,))


def images(groups: int = 1) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return convnet(groups=groups), torch.randn(4, 2, 5, 5), torch.randint(0, 3, (4,))


def loss_of(y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda f: F.cross_entropy(f, y)


def fisher(net: nn.Module, name: str, x: Tensor, y: Tensor) -> Tensor:
    """Mean over examples of the outer products of their gradients."""
    rows = example_gradients(net, name, x, lambda f, n: F.cross_entropy(f, y[n : n + 1]))
    return rows.T @ rows / len(x)


def natural(block: Tensor, taken: Step, name: str, lam: float = LAM) -> tuple[Tensor, Tensor]:
    """(direction, the dense solve)."""
    gradient, direction = taken.pair(name)
    return direction.flatten(), torch.linalg.solve(block + lam * torch.eye(len(block)), gradient.flatten())


@pytest.mark.parametrize("factor_every", [1, 2])
@pytest.mark.parametrize("mode", ["exact", "kid", "kis", "switch"])
@pytest.mark.parametrize("rank", [6, 9])
def test_with_room_for_all_examples_it_is_the_dense_natural_gradient(mode: str, rank: int, factor_every: int) -> None:
    net, x, y = digits()
    exact = {name: fisher(net, name, x, y) for name in ("0", "2")}
    taken = step(net, "hylo", x, loss_of(y), mode=mode, rank=rank, **{**OPTIONS, "factor_every": factor_every})
    for name, block in exact.items():
        torch.testing.assert_close(*natural(block, taken, name))
        torch.testing.assert_close(taken.model.block(name), block)


@pytest.mark.parametrize("sharing", ["reduce", "expand"])
@pytest.mark.parametrize("mode", ["exact", "kid"])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_have_a_pair_for_an_example_or_for_a_position(groups: int, mode: str, sharing: str) -> None:
    """reduce: the mean patch and the summed gradient of an example; expand: every position by itself."""
    net, x, y = images(groups)
    taken = step(copy.deepcopy(net), "hylo", x, loss_of(y), mode=mode, rank=100, sharing=sharing, **OPTIONS)
    hidden = net[0](x).detach().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(net[1:](hidden), y, reduction="sum"), hidden)
    g = g.reshape(4, groups, 4 // groups, 25)
    a = F.unfold(x, 3, padding=1).reshape(4, groups, -1, 25)
    a = torch.cat([a, torch.ones(4, groups, 1, 25)], 2)
    if sharing == "reduce":
        a, g = a.mean(3, keepdim=True), g.sum(3, keepdim=True)
    u = torch.einsum("ngos,ngis->gnsoi", g, a).reshape(groups, 4 * a.shape[3], -1)
    gradient, direction = taken.pair("0", groups)
    for k in range(groups):
        F_k = u[k].T @ u[k] / 4
        expected = torch.linalg.solve(F_k + LAM * torch.eye(len(F_k)), gradient[k].flatten())
        torch.testing.assert_close(direction[k].flatten(), expected)
        block = taken.model.block("0")
        torch.testing.assert_close(block[k] if groups > 1 else block, F_k)


@pytest.mark.parametrize("options", [{"fisher": "mc", "fisher_samples": 2}, {"fisher": "ggn"}], ids=str)
def test_other_sources_are_other_gradients(options: dict[str, Any]) -> None:
    """The exact Gauss-Newton matrix has as many pairs as the outputs have entries; sampled labels come in pairs too."""
    net, x, y = digits()
    taken = step(net, "hylo", x, loss_of(y), mode="exact", rank=18, **OPTIONS, **options)
    block = taken.model.block("0")
    if options["fisher"] == "ggn":
        call, matrix = as_function(net, "0")
        p = torch.softmax(net(x), 1)
        J = torch.func.jacrev(lambda m: call(m, x))(matrix).reshape(6, 3, -1)
        H = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        torch.testing.assert_close(block, torch.einsum("nop,noq,nqr->pr", J, H, J).detach() / 6)
    torch.testing.assert_close(*natural(block, taken, "0"))


@pytest.mark.parametrize("mode", ["kid", "kis", "exact"])
def test_direction_solves_with_its_own_block(mode: str) -> None:
    """Fewer pairs than examples: what block() says is what was inverted, whether or not the rows are the gradient's."""
    net, x, y = digits(12)
    for options in ({"factor_every": 1}, {"factor_every": 2}, {"replacement": True}):
        taken = step(copy.deepcopy(net), "hylo", x, loss_of(y), mode=mode, rank=5, **{**OPTIONS, **options})
        for name in ("0", "2"):
            torch.testing.assert_close(*natural(taken.model.block(name), taken, name))
    assert relative(taken.model.block("0"), fisher(net, "0", x, y)) > 0.05


def test_copies_of_the_batch_cost_interpolation_nothing() -> None:
    net, x, y = digits()
    once = step(copy.deepcopy(net), "hylo", x, loss_of(y), mode="exact", rank=6, **OPTIONS)
    x, y = x.repeat(3, 1), y.repeat(3)
    for mode, same in (("kid", True), ("kis", False)):
        taken = step(copy.deepcopy(net), "hylo", x, loss_of(y), mode=mode, rank=6, **OPTIONS)
        assert (relative(taken.direction["0.weight"], once.direction["0.weight"]) < 1e-8) == same
    taken = step(copy.deepcopy(net), "hylo", x, loss_of(y), mode="kid", rank=6, pivots="norm", **OPTIONS)
    assert relative(taken.direction["0.weight"], once.direction["0.weight"]) > 1e-3


def test_micro_batches_are_one_batch() -> None:
    net, x, y = digits()
    whole = step(copy.deepcopy(net), "hylo", x, loss_of(y), mode="kid", rank=4, **OPTIONS)
    model = transform(net, "hylo", x, mode="kid", rank=4, **OPTIONS)
    parts = accumulate(
        model, [(x[k : k + 2], lambda f, k=k: F.cross_entropy(f, y[k : k + 2]) / 3, {}) for k in (0, 2, 4)]
    )
    for name in whole.gradient:
        torch.testing.assert_close(parts.gradient[name], whole.gradient[name])
        torch.testing.assert_close(parts.direction[name], whole.direction[name])


def test_weight_decay_in_the_loss_takes_the_ordinary_way() -> None:
    net, x, y = digits()
    exact = fisher(net, "0", x, y)

    def loss(f: Tensor) -> Tensor:
        return F.cross_entropy(f, y) + 0.1 * sum(p.square().sum() for p in net.parameters())

    taken = step(net, "hylo", x, loss, mode="exact", rank=8, backward={"targets": y}, **OPTIONS)
    torch.testing.assert_close(*natural(exact, taken, "0"))


@pytest.mark.parametrize("damping", [1e-2, 1e-6])
def test_weighting_anew_survives_a_small_damping_in_single_precision(damping: float) -> None:
    torch.manual_seed(0)
    net, x, y = mlp(40, 30, 20), torch.randn(32, 40), torch.randint(0, 20, (32,))

    def direction(dtype: torch.dtype, factor_every: int) -> Tensor:
        options = {**OPTIONS, "damping": damping, "factor_every": factor_every, "mode": "exact", "rank": 32}
        mine = step(copy.deepcopy(net).to(dtype), "hylo", x.to(dtype), loss_of(y), **options)
        return torch.cat([part.double().flatten() for part in mine.direction.values()])

    exact = direction(torch.float64, 2)
    assert relative(direction(torch.float32, 1), exact) < 1e-5
    if damping == 1e-6:
        assert relative(direction(torch.float32, 2), exact) > 1e-2


def test_embeddings_have_the_diagonal_and_norms_their_blocks() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4), nn.Flatten(), nn.Linear(12, 3))
    x, y = torch.randint(9, (5, 3)), torch.randint(0, 3, (5,))
    diag = step(copy.deepcopy(net), "diag", x, loss_of(y), loss="cross_entropy", fisher="empirical", damping=LAM)
    kfac = step(copy.deepcopy(net), "kfac", x, loss_of(y), loss="cross_entropy", fisher="empirical", damping=LAM)
    taken = step(net, "hylo", x, loss_of(y), mode="kid", rank=5, **OPTIONS)
    torch.testing.assert_close(taken.direction["0.weight"], diag.direction["0.weight"])
    torch.testing.assert_close(taken.direction["1.weight"], kfac.direction["1.weight"])
    assert not any("X" in key for key in taken.model.state_dict() if key.startswith("curvature.0."))


def trained(model: fxcurv.CurvatureModule, steps: range, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    batches = [(torch.randn(12, 4, generator=draw), torch.randint(0, 3, (12,), generator=draw)) for _ in range(10)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for k in steps:
        model.zero_grad()
        x, y = batches[k]
        accumulate(model, [(x, loss_of(y), {})])
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("options", [{"mode": "kis"}, {"mode": "switch", "period": 2, "threshold": 1.0}], ids=str)
def test_sampling_resumes_bit_for_bit(options: dict[str, Any]) -> None:
    options = {**OPTIONS, **options, "rank": 4, "factor_every": 2, "damping_target": 0.01, "decay_steps": 5}
    net, x, _ = digits()
    first = transform(copy.deepcopy(net), "hylo", x, **options)
    expected = trained(first, range(6))
    second = transform(copy.deepcopy(net), "hylo", x, **options)
    trained(second, range(3))
    third = transform(copy.deepcopy(net), "hylo", x, **options)
    third.load_state_dict(second.state_dict())
    for mine, theirs in zip(trained(third, range(3, 6)), expected, strict=True):
        assert torch.equal(mine, theirs)
    other = transform(copy.deepcopy(net), "hylo", x, seed=1, **options)
    assert not torch.equal(trained(other, range(6))[0], expected[0])


def kept(model: fxcurv.CurvatureModule, name: str = "0") -> Tensor:
    return model.state_dict()[f"curvature.{name}.XA"]


def test_intervals_and_norms_choose_between_the_two_ways() -> None:
    net, x, y = digits(12)
    ways = {}
    for mode in ("kid", "kis"):
        model = transform(copy.deepcopy(net), "hylo", x, mode=mode, rank=4, **OPTIONS)
        ways[mode] = []
        for _ in range(8):
            accumulate(model, [(x, loss_of(y), {})])
            ways[mode].append(kept(model))

    def seen(**options: Any) -> list[str]:
        model = transform(copy.deepcopy(net), "hylo", x, rank=4, **OPTIONS, **options)
        found = []
        for k in range(8):
            scale = 3.0 if k in (4, 5) else 1.0
            model.zero_grad()
            outputs = model(x)
            value = F.cross_entropy(outputs, y)
            model.backward(value, outputs)
            for p in model.parameters():  # gradients of another length in two steps, the rows as they are
                p.grad.mul_(scale)
            model.precondition_()
            found.append(next(mode for mode in ways if torch.equal(kept(model), ways[mode][k])))
        return found

    assert seen(intervals="2 4 6") == ["kid"] * 2 + ["kis"] * 3 + ["kid"] * 2 + ["kis"]
    # Periods of two steps with gradients 1, 1, 3, 1: nothing to compare with yet, no change, three times more.
    assert seen(period=2, threshold=0.5) == ["kid"] * 4 + ["kis"] * 2 + ["kid"] * 2
    assert seen(period=2, threshold=5.0) == ["kid"] * 4 + ["kis"] * 4


def test_damping_decays_to_its_target() -> None:
    net, x, y = digits()
    options = {**OPTIONS, "damping": 0.4, "damping_target": 0.04, "decay_steps": 10, "warmup": 2, "mode": "exact"}
    model = transform(net, "hylo", x, rank=6, **options)
    lam = 0.4
    for k in range(6):
        lam = 0.4 if k <= 2 else lam * (1 - 2 / 10) + 0.04 * 2 / 10
        exact = fisher(model.strip(), "0", x, y)
        taken = accumulate(model, [(x, loss_of(y), {})])
        torch.testing.assert_close(*natural(exact, taken, "0", lam))


def test_a_changed_damping_waits_for_new_rows() -> None:
    """The kernel and what divides by the damping belong together."""
    net, x, y = digits()
    exact = fisher(net, "0", x, y)
    model = transform(net, "hylo", x, mode="kid", rank=6, **{**OPTIONS, "factor_every": 2})
    model.hyper["damping"] = LAM
    accumulate(model, [(x, loss_of(y), {})])
    model.hyper["damping"] = 5.0
    taken = accumulate(model, [(x, loss_of(y), {})])
    torch.testing.assert_close(*natural(exact, taken, "0"))


SWITCHES = [{"backend": "reference"}, *({"disable": (name,)} for name in ("sink", "share", "batch", "fuse", "defer"))]


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
@pytest.mark.parametrize("options", [{"mode": "switch"}, {"mode": "exact", "sharing": "expand"}], ids=str)
def test_no_pass_and_no_kernel_changes_it(options: dict[str, Any], switch: dict[str, Any]) -> None:
    net, x, y = images(2)
    taken = [
        step(copy.deepcopy(net), "hylo", x, loss_of(y), rank=3, **OPTIONS, **options, **more) for more in ({}, switch)
    ]
    for name, direction in taken[0].direction.items():
        torch.testing.assert_close(taken[1].direction[name], direction, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "rank=0"),
        ({"mode": "fast"}, "mode='fast' is unknown; choose one of switch, kid, kis, exact"),
        ({"pivots": "random"}, "choose 'left' or 'norm'"),
        ({"intervals": "10 20"}, "three numbers of steps"),
        ({"damping_target": 1.0}, "must lie between 0 and damping"),
        ({"damping_target": 0.01, "decay_steps": 0}, "decay_steps=0 must be a whole number, at least 1"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], said: str) -> None:
    with pytest.raises(FxcurvError, match=said):
        hylo(**options)
