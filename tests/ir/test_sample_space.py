"""Factors kept as rows: which rows stay, with what scale, and solves against dense inverses."""

from __future__ import annotations

import pytest
import torch

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS
from fxcurv.ir.ops.sample_space import chosen
from fxcurv.ir.types import Mat, Rows


@pytest.mark.parametrize("groups", [1, 3])
def test_rows_that_fit_keep_their_gram(groups: int) -> None:
    rows = torch.randn(4, 2, groups, 3, dtype=torch.float64)
    X = OPS["keep_rows"](rows, 11)
    assert X.shape == ((11, 3) if groups == 1 else (groups, 11, 3))
    torch.testing.assert_close(X.mT @ X, OPS["gram"](rows))
    assert (X.reshape(groups, 11, 3)[:, 8:] == 0).all()


@pytest.mark.parametrize(("b", "s", "capacity"), [(4, 9, 8), (4, 9, 11), (7, 1, 3), (3, 64, 24), (5, 4, 2), (2, 3, 5)])
def test_of_more_rows_evenly_many_of_every_example_stay(b: int, s: int, capacity: int) -> None:
    index = chosen(b, s, capacity, torch.device("cpu"))
    assert index is not None and len(set(index.tolist())) == len(index) <= capacity
    examples = (index // s).bincount(minlength=b)
    if b <= capacity:
        assert examples.tolist() == [capacity // b] * b
    else:
        assert sorted(examples.tolist())[-capacity:] == [1] * capacity
    rows = torch.randn(b, s, 1, 2, dtype=torch.float64)
    expected = rows.reshape(-1, 2)[index] * (b * s / len(index)) ** 0.5
    assert torch.equal(OPS["keep_rows"](rows, capacity)[: len(index)], expected)


def test_scale_of_the_kept_is_that_of_all() -> None:
    """Equal rows: any choice has the Gram of all of them."""
    rows = torch.ones(5, 7, 1, 2, dtype=torch.float64) * torch.tensor([1.0, -2.0], dtype=torch.float64)
    X = OPS["keep_rows"](rows, 11)
    torch.testing.assert_close(X.mT @ X, OPS["gram"](rows))


def test_every_position_is_seen_by_some_example() -> None:
    """64 pixels in lines of 8, 8 of them kept of each example: a fixed start would see one column only."""
    index = chosen(32, 64, 256, torch.device("cpu"))
    assert index is not None
    assert (index % 8).unique().numel() == 8
    assert (index % 64).bincount(minlength=64).max() <= 3 * 32 * 8 // 64


@pytest.mark.parametrize("groups", [(), (3,)])
@pytest.mark.parametrize(("m", "d"), [(3, 7), (7, 3), (4, 4)])
def test_both_forms_of_an_inverse_are_the_dense_one(groups: tuple[int, ...], m: int, d: int) -> None:
    X, c = torch.randn(*groups, m, d, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
    dense = torch.linalg.inv(X.mT @ X + 0.2 * torch.eye(d))
    H, kept = OPS["whitened_rows"](X, c)
    torch.testing.assert_close((torch.eye(d) - H.mT @ H) / kept, dense)
    torch.testing.assert_close(OPS["damped_rows"](X, c), X @ dense)
    padded = torch.cat([X, X.new_zeros(*groups, 2, d)], -2)
    H, kept = OPS["whitened_rows"](padded, c)
    torch.testing.assert_close((torch.eye(d) - H.mT @ H) / kept, dense)


@pytest.mark.parametrize("left", ["rows", "inverse", "diagonal"])
@pytest.mark.parametrize("right", ["rows", "inverse", "diagonal"])
@pytest.mark.parametrize("groups", [(), (2,)])
def test_sides_of_any_kind(left: str, right: str, groups: tuple[int, ...]) -> None:
    def side(kind: str, d: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        X, c = torch.randn(*groups, 3, d, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
        inverse = torch.linalg.inv(X.mT @ X + c * torch.eye(d))
        if kind == "rows":
            return list(OPS["whitened_rows"](X, c)), inverse
        if kind == "inverse":
            return [inverse], inverse
        values = torch.rand(*groups, d, dtype=torch.float64)
        return [values], torch.diag_embed(values)

    V = torch.randn(*groups, 4, 6, dtype=torch.float64)
    (mine_l, inverse_l), (mine_r, inverse_r) = side(left, 4), side(right, 6)
    torch.testing.assert_close(OPS["rows_solve"](V, mine_l, mine_r), inverse_l @ V @ inverse_r)


def test_a_kernel_that_is_not_positive_is_nan_and_hurts_no_other_group() -> None:
    X, c = torch.randn(2, 3, 4, dtype=torch.float64), torch.tensor([0.1, -100.0], dtype=torch.float64)
    H, _ = OPS["whitened_rows"](X, c)
    assert H[0].isfinite().all() and H[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_that_is_its_rows_leaves_nothing(dtype: torch.dtype) -> None:
    XG, XA, scale = torch.randn(9, 20, dtype=dtype), torch.randn(9, 30, dtype=dtype), torch.tensor(0.7, dtype=dtype)
    V = 0.7 * (XG.mT @ XA)
    assert (OPS["unexplained"](V, XG, XA, scale) == 0).all()
    decayed = V + 1e-3 * torch.ones_like(V)
    rest = OPS["unexplained"](decayed, XG, XA, scale)
    torch.testing.assert_close(rest, torch.full_like(V, 1e-3), rtol=1e-2, atol=1e-5)


def test_types_say_what_does_not_fit() -> None:
    assert OPS["keep_rows"].infer(Rows((None, None, 2, 5)), 8) == Mat((2, 8, 5))
    with pytest.raises(FxcurvError, match="keeps 0 rows"):
        OPS["keep_rows"].infer(Rows((None, None, 1, 5)), 0)
    with pytest.raises(FxcurvError, match="'left' of op 'rows_solve'"):
        OPS["rows_solve"].infer(Mat((3, 4)), [Mat((2, 4))] * 3, [Mat((2, 4))] * 2)


def test_norms_that_change_switch() -> None:
    def number(x: float) -> torch.Tensor:
        return torch.tensor(x, dtype=torch.float64)

    state = [number(0.0)] * 3
    flags = []
    for step, norm in enumerate([1.0] * 6 + [3.0] * 4):
        found = OPS["norm_switch"](*state, number(norm), number(step), 0.5, 2)
        state = list(found)
        flags.append(float(found[0]))
    # Sums by periods of two: 2, 2, 2, 6, 6. The first has nothing before it, the fourth is seen when the fifth begins.
    assert flags == [0, 0, 1, 1, 0, 0, 0, 0, 1, 1]
