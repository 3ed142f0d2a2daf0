"""Best sums of Kronecker products against the singular value decomposition of explicit Fisher blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcurv.errors import FxcurvError
from fxcurv.methods import get_method
from fxcurv.runtime.module import CurvatureModule
from tests.methods.blocks import best, layer_rows, symmetric_part, tkfac, windowed
from tests.methods.nets import mlp
from tests.methods.oracle import ggn, transform
from tests.methods.test_ekfac import Case, backward, case

pytestmark = pytest.mark.usefixtures("float64")

KINDS = ("linear", "conv", "strided conv", "grouped conv", "tokens")
RANKS = {"kpsvd": 1, "deflation": 2, "lanczos": 2}
ALL = {"share": 1.0, "window": 1000, "kernel": "hard"}  # all examples, all pairs of positions: the exact block
MANY = {"kpsvd": {"iterations": 50}, "deflation": {"iterations": 100}, "kfac_corrected": {"iterations": 100}}
MANY |= {"lanczos": {"krylov": 6, "restarts": 10}}


def fitted(c: Case, method: str, **options: Any) -> CurvatureModule:
    """The model after one step on the empirical Fisher of its batch, with as many iterations as are needed."""
    defaults = {"fisher": "empirical", **MANY.get(method, {})}
    model = transform(c.net, method, c.x, **{"loss": "cross_entropy", "factor_every": 1, **defaults, **options})
    backward(model, c)
    model.precondition_()
    return model


def block(model: CurvatureModule, c: Case) -> Tensor:
    found = model.block(c.name)
    return found if found.ndim == 2 else torch.block_diag(*found)


def diagonal_blocks(matrix: Tensor, groups: int) -> list[Tensor]:
    size = len(matrix) // groups
    return [matrix[k * size : (k + 1) * size, k * size : (k + 1) * size] for k in range(groups)]


def outputs(c: Case) -> int:
    return c.net.get_submodule(c.name).weight.shape[0] // c.groups


@pytest.mark.parametrize("method", RANKS)
@pytest.mark.parametrize("kind", KINDS)
def test_block_is_the_best_sum_of_products(kind: str, method: str) -> None:
    c = case(kind)
    exact = diagonal_blocks(c.fisher(), c.groups)
    expected = torch.block_diag(*(best(one, outputs(c), RANKS[method]) for one in exact))
    torch.testing.assert_close(block(fitted(c, method, **ALL), c), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", RANKS)
@pytest.mark.parametrize("kind", ["conv", "tokens"])
@pytest.mark.parametrize("window", [0, 1, 3])
def test_window_is_a_double_sum_over_positions(kind: str, method: str, window: int) -> None:
    c = case(kind)
    rows_a, rows_g = layer_rows(c)
    near = windowed(rows_a, rows_g, c.y.numel(), window)
    found = block(fitted(c, method, share=1.0, window=window), c)
    torch.testing.assert_close(found, best(near, outputs(c), RANKS[method]), rtol=1e-6, atol=1e-8)
    everything = windowed(rows_a, rows_g, c.y.numel(), 1000, True)
    torch.testing.assert_close(everything, c.fisher())
    assert (near - everything).norm() > 0.01 * everything.norm()


@pytest.mark.parametrize(
    ("kind", "seed"), [*((kind, 0) for kind in KINDS), ("linear", 1), ("linear", 2), ("tokens", 1)]
)
def test_errors_are_in_the_order_of_the_paper(kind: str, seed: int) -> None:
    c = case(kind, seed)
    blocks = {m: block(fitted(c, m, **ALL), c) for m in (*RANKS, "kfac_corrected")}
    blocks["kfac"] = block(fitted(c, "kfac"), c)
    exact = c.fisher()
    parts = diagonal_blocks(exact, c.groups)
    blocks["tkfac"] = torch.block_diag(*(tkfac(one, outputs(c)) for one in parts))
    error = {m: float((found - exact).norm() / exact.norm()) for m, found in blocks.items()}
    slack = 1e-9
    assert error["kpsvd"] <= min(error["kfac"], error["tkfac"]) + slack
    assert error["kfac_corrected"] < error["kfac"] * (1 - 1e-3)
    assert error["deflation"] <= min(error["kpsvd"], error["kfac_corrected"]) + slack
    assert error["deflation"] == pytest.approx(error["lanczos"], rel=1e-6)
    assert error["kpsvd"] < min(error["kfac"], error["tkfac"]) * (1 - 1e-4)  # the cases are not degenerate
    sigma = [torch.linalg.svdvals(symmetric_part(one, outputs(c))) for one in parts]
    for rank, method in ((1, "kpsvd"), (2, "deflation")):
        found = sum(float(values[:rank].square().sum()) for values in sigma)
        assert error[method] ** 2 == pytest.approx(1 - found / float(exact.square().sum()), rel=1e-6)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_correction_is_the_best_product_for_what_kfac_leaves(kind: str) -> None:
    c = case(kind)
    model, kfac = fitted(c, "kfac_corrected", **ALL), fitted(c, "kfac")
    left = c.fisher() - block(kfac, c)
    torch.testing.assert_close(block(model, c) - block(kfac, c), best(left, outputs(c), 1), rtol=1e-6, atol=1e-8)
    for side in ("A", "G"):
        torch.testing.assert_close(model.factors(c.name)[side], kfac.factors(c.name)[side])


@pytest.mark.parametrize("method", [*RANKS, "kfac_corrected"])
def test_one_example_is_exact(method: str) -> None:
    c = Case(mlp(4, 5, 3), torch.randn(1, 4), torch.randint(0, 3, (1,)), "0")
    model = fitted(c, method)
    torch.testing.assert_close(block(model, c), c.fisher(), rtol=1e-7, atol=1e-12)
    if method != "kpsvd":
        factors = model.factors("0")
        assert torch.kron(factors["G2"], factors["A2"]).norm() < 1e-7 * c.fisher().norm()


@pytest.mark.parametrize("method", RANKS)
def test_columns_of_an_exact_source_are_pairs_of_rows(method: str) -> None:
    c = case("linear")
    exact = ggn(c.net, c.name, c.x, c.loss)
    found = block(fitted(c, method, fisher="ggn", share=1.0), c)
    torch.testing.assert_close(found, best(exact, outputs(c), RANKS[method]), rtol=1e-6, atol=1e-8)


def test_samples_are_averaged() -> None:
    """Of one example a is the same in every draw, so that K-FAC's product of the same draws is exact."""
    c = Case(mlp(4, 5, 3), torch.randn(1, 4), torch.randint(0, 3, (1,)), "0")
    options = {"fisher": "mc", "fisher_samples": 3, "seed": 5}
    torch.testing.assert_close(
        block(fitted(c, "kpsvd", share=1.0, **options), c), block(fitted(c, "kfac", **options), c)
    )


@pytest.mark.parametrize("method", [*RANKS, "kfac_corrected"])
def test_a_share_of_the_examples_stands_for_all(method: str) -> None:
    c = case("linear")
    model = fitted(c, method, share=0.5)
    kept = [k * 7 // 4 for k in range(4)]
    part = Case(c.net, c.x[kept], c.y[kept], c.name)
    if method != "kfac_corrected":
        expected = best(part.fisher(), outputs(c), RANKS[method])
    else:
        own = block(fitted(part, "kfac"), c)
        expected = block(fitted(c, "kfac"), c) + best(part.fisher() - own, outputs(c), 1)
    torch.testing.assert_close(block(model, c), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["conv", "tokens"])
def test_reduce_fits_sums_and_means_over_positions(kind: str) -> None:
    c = case(kind)
    rows_a, rows_g = layer_rows(c)
    reduced = windowed(rows_a.mean(1, keepdim=True), rows_g.sum(1, keepdim=True), c.y.numel(), 0)
    found = block(fitted(c, "kpsvd", share=1.0, sharing="reduce"), c)
    torch.testing.assert_close(found, best(reduced, outputs(c), 1), rtol=1e-6, atol=1e-8)
    assert (reduced - c.fisher()).norm() > 0.01 * reduced.norm()


@pytest.mark.parametrize("method", ["kpsvd", "deflation", "lanczos"])
def test_every_fit_starts_from_the_last(method: str) -> None:
    """One iteration (or one small space) a step gets to the best product within some steps on one batch."""
    c = case("linear", 1)
    exact = best(c.fisher(), outputs(c), RANKS[method])
    few = {"krylov": 3, "restarts": 1} if method == "lanczos" else {"iterations": 1}
    model = fitted(c, method, share=1.0, **few)
    errors = []
    for _ in range(60):
        errors.append(float((block(model, c) - exact).norm() / exact.norm()))
        backward(model, c)
        model.precondition_()
    assert errors[0] > 1e-4 and errors[-1] < 2e-3 * errors[0]


@pytest.mark.parametrize("method", ["kpsvd", "deflation"])
def test_factors_are_averaged_one_by_one(method: str) -> None:
    c, other = case("linear"), case("linear", 1)
    second = Case(c.net, other.x, other.y, c.name)
    parts = [fitted(one, method, share=1.0).factors(c.name) for one in (c, second)]
    model = fitted(c, method, share=1.0, ema=0.9)
    backward(model, second)
    model.precondition_()
    for part, value in model.factors(c.name).items():
        torch.testing.assert_close(value, (parts[0][part] + parts[1][part]) / 2, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", [*RANKS, "kfac_corrected"])
def test_wide_layers_and_embeddings_are_those_of_kfac(method: str) -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 3))
    c = Case(net, torch.randint(0, 6, (5, 2)), torch.randint(0, 3, (5,)), "4")
    options: dict[str, Any] = {"max_factor_dim": 8, "damping_scheme": "sqrt", "damping": 0.01}
    models = [fitted(c, m, **options) for m in (method, "kfac")]
    for name in ("0", "2", "4"):
        mine, theirs = (model.factors(name) for model in models)
        assert set(mine) == {"A", "G"}
        for part in mine:
            torch.testing.assert_close(mine[part], theirs[part])
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize(
    ("method", "option", "message"),
    [
        ("kpsvd", {"window": -1}, "window=-1 must be a whole number"),
        ("kpsvd", {"window": 0.5}, "window=0.5 must be a whole number"),
        ("kpsvd", {"kernel": "round"}, "kernel='round' is unknown; choose one of triangular, hard"),
        ("deflation", {"share": 0.0}, "share=0.0 must be above 0"),
        ("deflation", {"iterations": 0}, "iterations=0 must be a whole number, at least 1"),
        ("lanczos", {"krylov": 2}, "krylov=2 must be a whole number, at least 3"),
        ("lanczos", {"restarts": 0}, "restarts=0 must be"),
        ("kfac_corrected", {"safeguard": "none"}, "safeguard='none' is unknown; choose one of floor, absolute, drop"),
        ("kfac_corrected", {"floor": 0.0}, "floor=0.0 must be above 0"),
        ("lanczos", {"damping_scheme": "eigenvalue"}, "'eigenvalue' has no place in this method"),
    ],
)
def test_wrong_numbers_are_named(method: str, option: dict[str, Any], message: str) -> None:
    with pytest.raises(FxcurvError, match=message):
        get_method(method, **option)
