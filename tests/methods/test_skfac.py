"""SKFAC is K-FAC with batch factors, whatever is low rank; and it survives dampings that rounding does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS
from fxcurv.ir.ops.sample_space import chosen
from fxcurv.methods import skfac
from tests.methods.nets import Attention, convnet, mlp
from tests.methods.oracle import Step, accumulate, relative, step, transform

pytestmark = pytest.mark.usefixtures("float64")
Case = tuple[nn.Module, Tensor, Tensor]


def case(kind: str) -> Case:
    torch.manual_seed(0)
    if kind == "linear":
        return mlp(6, 5, 4, 3), torch.randn(4, 6), torch.randint(0, 3, (4,))
    if kind == "conv":
        return convnet(), torch.randn(3, 2, 5, 5), torch.randint(0, 3, (3,))
    if kind == "grouped":
        return convnet(groups=2), torch.randn(3, 2, 5, 5), torch.randint(0, 3, (3,))
    if kind == "words":
        net = nn.Sequential(nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.Flatten(), nn.Linear(20, 3))
        return net, torch.randint(11, (5, 4)), torch.randint(0, 3, (5,))
    return Attention(), torch.randn(3, 4, 3), torch.randint(0, 3, (3, 4))


KINDS = ("linear", "conv", "grouped", "words", "tokens")


def taken(kind: str, method: str, **options: Any) -> Step:
    net, x, y = case(kind)
    if method == "skfac":
        options = {"rows": 80, "factor_every": 1, **options}
    return step(net, method, x, lambda f: F.cross_entropy(f, y), loss="cross_entropy", **{"damping": 0.01, **options})


def assert_same(mine: Step, theirs: Step, tolerance: float = 1e-9) -> None:
    assert mine.direction.keys() == theirs.direction.keys()
    for name, direction in theirs.direction.items():
        torch.testing.assert_close(mine.direction[name], direction, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("fisher", ["empirical", "mc"])
@pytest.mark.parametrize("path", ["low_rank", "dense", "auto"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_and_path_is_kfac(kind: str, sharing: str, path: str, fisher: str) -> None:
    """The low-rank path equals the dense one, for either choice of the cost model, with rows to spare and padding."""
    options = {"sharing": sharing, "fisher": fisher}
    kfac, mine = taken(kind, "kfac", **options), taken(kind, "skfac", path=path, **options)
    assert_same(mine, kfac)
    for layer in mine.model.layers:
        torch.testing.assert_close(mine.model.block(layer.name), kfac.model.block(layer.name))
    assert any(".XA" in key for key in mine.model.state_dict()) == (path == "low_rank")


@pytest.mark.parametrize("rows", [3, 4, 5, 6])
def test_sides_differ_in_what_is_cheaper(rows: int) -> None:
    """A side wider than the room for rows is low rank; every choice is the same direction as long as rows fit in."""
    mine = taken("linear", "skfac", rows=rows)
    for name, d_in, d_out in (("0", 7, 5), ("2", 6, 4), ("4", 5, 3)):
        parts = {
            key.removeprefix(f"curvature.{name}.") for key in mine.model.state_dict() if f"curvature.{name}." in key
        }
        assert ("XA" in parts, "XG" in parts) == (rows < d_in, rows < d_out)
        assert ("A" in parts, "G" in parts) == (rows >= d_in, rows >= d_out)
    if rows >= 4:
        assert_same(mine, taken("linear", "kfac"))
        assert_same(
            taken("linear", "skfac", rows=rows, fisher="empirical"), taken("linear", "kfac", fisher="empirical")
        )


@pytest.mark.parametrize("scheme", ["pi", "sqrt"])
@pytest.mark.parametrize("options", [{"fisher": "ggn"}, {"fisher": "mc", "fisher_samples": 3}, {"fisher": "empirical"}])
def test_sources_and_schemes(scheme: str, options: dict[str, Any]) -> None:
    options = {**options, "damping_scheme": scheme}
    assert_same(taken("conv", "skfac", rows=300, **options), taken("conv", "kfac", **options))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_convolution_of_one_position_is_a_linear_layer(sharing: str) -> None:
    torch.manual_seed(0)
    conv, x, y = nn.Conv2d(3, 4, 1), torch.randn(6, 3, 1, 1), torch.randint(0, 4, (6,))
    line = nn.Linear(3, 4)
    line.load_state_dict({k: v.reshape(v.shape[:2]) for k, v in conv.state_dict().items()})
    options = {"loss": "cross_entropy", "fisher": "empirical", "damping": 0.1, "rows": 6, "path": "low_rank"}
    first = step(
        nn.Sequential(conv, nn.Flatten()), "skfac", x, lambda f: F.cross_entropy(f, y), sharing=sharing, **options
    )
    second = step(nn.Sequential(line), "skfac", x.flatten(1), lambda f: F.cross_entropy(f, y), **options)
    torch.testing.assert_close(first.direction["0.weight"].flatten(1), second.direction["0.weight"])


def test_sub_sampled_positions_keep_the_scale_of_kfc() -> None:
    """Where all positions are alike, some of them say as much as all: A is a mean, and G a sum of all positions."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    x, y = torch.randn(4, 2, 1, 1).expand(4, 2, 6, 6).contiguous(), torch.randint(0, 3, (4,))
    options = {"loss": "cross_entropy", "fisher": "empirical", "damping": 0.1}
    kfac = step(net, "kfac", x, lambda f: F.cross_entropy(f, y), **options)
    mine = step(net, "skfac", x, lambda f: F.cross_entropy(f, y), rows=13, path="low_rank", **options)
    assert_same(mine, kfac)
    torch.testing.assert_close(mine.model.block("0"), kfac.model.block("0"))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv", "grouped"])
def test_direction_solves_with_its_own_block_when_rows_do_not_fit_in(kind: str, own: bool) -> None:
    mine = taken(kind, "skfac", rows=3, path="low_rank", fisher="empirical", factor_every=1 if own else 2)
    groups = 2 if kind == "grouped" else 1
    states = mine.model.state_dict()
    gradient, direction = mine.pair("0", groups)
    for k in range(groups):
        a, g = (states[f"curvature.0.X{side}"].reshape(groups, 3, -1)[k] for side in "AG")
        A, G = a.mT @ a, g.mT @ g
        pi = ((A.trace() / len(A)) / (G.trace() / len(G))).sqrt()
        expected = torch.linalg.solve(G + 0.1 / pi * torch.eye(len(G)), gradient[k]) @ torch.linalg.inv(
            A + 0.1 * pi * torch.eye(len(A))
        )
        torch.testing.assert_close(direction[k], expected)


def test_rows_that_do_not_fit_in_are_the_chosen_positions() -> None:
    net, x, y = case("conv")
    mine = taken("conv", "skfac", rows=8, path="low_rank", fisher="empirical")
    index = chosen(3, 25, 8, torch.device("cpu"))
    patches = torch.cat([F.unfold(x, 3, padding=1).mT.reshape(75, 18), torch.ones(75, 1)], 1)[index]
    found = mine.model.state_dict()["curvature.0.XA"]
    torch.testing.assert_close(found, torch.cat([patches / len(patches) ** 0.5, torch.zeros(8 - len(patches), 19)]))


# What float32 cannot do -----------------------------------------------------------------------------------------------


def wide() -> Case:
    torch.manual_seed(0)
    return mlp(200, 150, 90), torch.randn(64, 200), torch.randint(0, 90, (64,))


def in_precision(dtype: torch.dtype, method: str, c: float, **options: Any) -> Tensor:
    net, x, y = wide()
    options = {"loss": "cross_entropy", "fisher": "empirical", "damping": c**2, "damping_scheme": "sqrt", **options}
    mine = step(net.to(dtype), method, x.to(dtype), lambda f: F.cross_entropy(f, y), **options)
    return torch.cat([direction.double().flatten() for direction in mine.direction.values()])


@pytest.mark.parametrize("c", [1e-2, 1e-4, 1e-6])
def test_own_rows_survive_a_small_damping_in_single_precision(c: float) -> None:
    exact = in_precision(torch.float64, "kfac", c)
    own = in_precision(torch.float32, "skfac", c, rows=64, factor_every=1)
    assert relative(own, exact) < 1e-5
    if c == 1e-6:  # V itself is rounded: no method that reads it can do better
        assert relative(in_precision(torch.float32, "skfac", c, rows=64, factor_every=2), exact) > 0.1
        assert relative(in_precision(torch.float32, "kfac", c), exact) > 0.1


def test_thin_products_lose_nothing_beyond_the_rounding_of_the_gradient() -> None:
    """In single precision they would lose |X|^2 / c roundings where the gradient in float64 asks for none."""
    c, X = torch.tensor(1e-5), torch.randn(64, 200).float()
    V = torch.randn(30, 64) @ X.double()  # in the span of the rows, as a gradient is
    exact = torch.linalg.solve(X.double().mT @ X.double() + c * torch.eye(200), V.mT).mT
    H, kept = OPS["whitened_rows"](X, c)
    assert H.dtype == torch.float64
    assert relative(OPS["rows_solve"](V, [torch.eye(30)], [H, kept]), exact) < 1e-6
    assert relative(OPS["rows_solve"](V, [torch.eye(30)], [H.float(), kept]), exact) > 1e-2


@pytest.mark.parametrize("kind", ["linear", "conv", "tokens"])
def test_what_is_no_product_of_rows_takes_the_ordinary_way(kind: str) -> None:
    """A penalty on the weights is in the gradient and not in the rows: the sum of both ways is exact all the same."""
    net, x, y = case(kind)

    def penalised(net: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda f: F.cross_entropy(f, y) + 0.1 * sum(p.square().sum() for p in net.parameters())

    options = {"loss": "cross_entropy", "fisher": "empirical", "damping": 0.01, "backward": {"targets": y}}
    nets = [copy.deepcopy(net) for _ in range(2)]
    kfac = step(nets[0], "kfac", x, penalised(nets[0]), **options)
    mine = step(nets[1], "skfac", x, penalised(nets[1]), rows=80, path="low_rank", factor_every=1, **options)
    assert_same(mine, kfac)


def test_old_rows_are_not_taken_for_those_of_the_gradient() -> None:
    net, x, y = case("linear")
    model = transform(net, "skfac", x, loss="cross_entropy", fisher="empirical", damping=0.01, rows=4, factor_every=1)
    other = torch.randn(4, 6)
    accumulate(model, [(x, lambda f: F.cross_entropy(f, y), {})])
    block = model.block("0")
    model.due(statistics=False, refresh=False)
    mine = accumulate(model, [(other, lambda f: F.cross_entropy(f, y), {})])
    assert torch.equal(model.block("0"), block)
    states = model.state_dict()
    gradient, direction = mine.pair("0")
    A, G = (states[f"curvature.0.X{s}"].mT @ states[f"curvature.0.X{s}"] for s in "AG")
    pi = ((A.trace() / len(A)) / (G.trace() / len(G))).sqrt()
    expected = torch.linalg.solve(G + 0.1 / pi * torch.eye(5), gradient[0]) @ torch.linalg.inv(
        A + 0.1 * pi * torch.eye(7)
    )
    torch.testing.assert_close(direction[0], expected)


# Over time and batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["low_rank", "auto"])
def test_a_window_of_rows_is_the_running_average(path: str) -> None:
    torch.manual_seed(0)
    net = mlp(6, 5, 3)
    batches = [(torch.randn(4, 6), torch.randint(0, 3, (4,))) for _ in range(4)]
    options = {"loss": "cross_entropy", "fisher": "empirical", "damping": 0.01, "ema": 0.6}
    x = batches[0][0]
    kfac = transform(copy.deepcopy(net), "kfac", x, **options)
    mine = transform(net, "skfac", x, rows=4, window=4, path=path, factor_every=1, **options)
    short = transform(copy.deepcopy(net), "skfac", x, rows=4, window=2, path="low_rank", factor_every=1, **options)
    for x, y in batches:
        steps = [accumulate(m, [(x, lambda f, y=y: F.cross_entropy(f, y), {})]) for m in (kfac, mine, short)]
        assert_same(steps[1], steps[0])
    assert relative(short.block("0"), kfac.block("0")) > 1e-3


def test_micro_batches_are_one_batch() -> None:
    net, x, y = case("conv")
    nets = [copy.deepcopy(net) for _ in range(2)]
    parts = [(x[:2], y[:2]), (x[2:], y[2:])]
    options = {"loss": "cross_entropy", "fisher": "empirical", "damping": 0.01}
    steps = []
    for method, own, more in (("kfac", nets[0], {}), ("skfac", nets[1], {"rows": 80, "path": "low_rank"})):
        model = transform(own, method, x, **options, **more)
        steps.append(accumulate(model, [(a, lambda f, b=b: F.cross_entropy(f, b), {}) for a, b in parts]))
    assert_same(steps[1], steps[0])


class Sometimes(nn.Module):
    """A second branch that some calls leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor, both: bool = True) -> Tensor:
        return self.first(x) + self.second(x) if both else self.first(x)


@pytest.mark.parametrize(("method", "options"), [("skfac", {"rows": 4, "path": "low_rank"}), ("hylo", {"rank": 4})])
def test_a_layer_that_is_not_reached_keeps_its_rows(method: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net, x, y = Sometimes(), torch.randn(4, 6), torch.randint(0, 3, (4,))
    options = {"loss": "cross_entropy", "fisher": "empirical", "damping": 0.01, "factor_every": 1, **options}
    model = transform(net, method, x, **options)
    accumulate(model, [(x, lambda f: F.cross_entropy(f, y), {})])
    before = {name: model.block(name) for name in ("first", "second")}
    outputs = model(-x, False)
    model.backward(F.cross_entropy(outputs, y), outputs)
    model.precondition_()
    torch.testing.assert_close(model.block("second"), before["second"], rtol=0, atol=0)
    assert relative(model.block("first"), before["first"]) > 1e-3


def test_tied_embedding_and_head_keep_the_dense_factors() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mix = nn.Embedding(7, 5), nn.Linear(5, 5)
            self.head = nn.Linear(5, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(torch.tanh(self.mix(self.table(tokens)).mean(1)))

    torch.manual_seed(0)
    net, x, y = Tied(), torch.randint(7, (4, 3)), torch.randint(0, 7, (4,))
    options = {"loss": "cross_entropy", "fisher": "empirical", "damping": 0.01}
    kfac = step(copy.deepcopy(net), "kfac", x, lambda f: F.cross_entropy(f, y), **options)
    assert_same(step(net, "skfac", x, lambda f: F.cross_entropy(f, y), rows=12, path="low_rank", **options), kfac)


def test_a_wide_side_needs_no_matrix_and_no_diagonal() -> None:
    torch.manual_seed(0)
    net, x, y = mlp(40, 3), torch.randn(4, 40), torch.randint(0, 3, (4,))
    options = {"loss": "cross_entropy", "fisher": "empirical", "damping": 0.01}
    kfac = step(copy.deepcopy(net), "kfac", x, lambda f: F.cross_entropy(f, y), **options)
    mine = step(net, "skfac", x, lambda f: F.cross_entropy(f, y), rows=4, max_factor_dim=8, **options)
    assert_same(mine, kfac)
    assert max(v.numel() for k, v in mine.model.state_dict().items() if "curvature" in k) <= 4 * 41


SWITCHES = [{"backend": "reference"}, *({"disable": (name,)} for name in ("sink", "share", "batch", "fuse", "defer"))]


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
@pytest.mark.parametrize(
    "options", [{"path": "auto", "rows": 8}, {"path": "low_rank", "rows": 80, "fisher": "mc"}], ids=str
)
def test_no_pass_and_no_kernel_changes_it(options: dict[str, Any], switch: dict[str, Any]) -> None:
    options = {"fisher": "empirical", **options}
    assert_same(taken("conv", "skfac", **options, **switch), taken("conv", "skfac", **options))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rows": 0}, "rows=0"),
        ({"path": "fast"}, "path='fast' is unknown; choose one of auto, dense, low_rank"),
        ({"ema": 0.9}, "give it window=2 or more"),
        ({"damping_scheme": "eigenvalue"}, "choose one of pi, sqrt"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], said: str) -> None:
    with pytest.raises(FxcurvError, match=said):
        skfac(**options)
