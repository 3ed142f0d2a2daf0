"""Pairs of rows that stand for a batch, against its explicit Fisher."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS
from fxcurv.ir.types import Mat, Psd, Rows

pytestmark = pytest.mark.usefixtures("float64")
LAM = 0.05


def batch(n: int, i: int = 4, o: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 1, i, generator=draw), torch.randn(n, 1, 1, o, generator=draw) / n**0.5


def gradients(a: Tensor, g: Tensor) -> Tensor:
    """One example's gradient a row, in the row-major order of (o, i)."""
    return (g[:, 0, 0, :, None] * a[:, 0, 0, None, :]).flatten(1)


def dense(a: Tensor, g: Tensor, V: Tensor, lam: float = LAM) -> Tensor:
    u = gradients(a, g)
    return torch.linalg.solve(u.mT @ u + lam * torch.eye(u.shape[1]), V.flatten()).view(V.shape)


def reduce(kind: str, a: Tensor, g: Tensor, rank: int, **options: object) -> tuple[Tensor, ...]:
    lam = torch.tensor(LAM)
    if kind == "kid":
        return OPS["interpolated_pairs"](a, g, rank, lam, options.get("by_norm", False))
    if kind == "kis":
        numbers = torch.tensor(float(options.get("seed", 1))), torch.tensor(float(options.get("step", 5)))
        return OPS["sampled_pairs"](
            a, g, rank, lam, *numbers, options.get("stream", 0), options.get("replacement", False)
        )
    return OPS["spaced_pairs"](a, g, rank, lam)


def solve(workers: list[tuple[Tensor, ...]], V: Tensor) -> Tensor:
    xa, xg, p = (list(parts) for parts in zip(*workers, strict=True))
    M = OPS["pairs_kernel"](xa, xg, p)
    return OPS["pairs_solve"](V, torch.cat(xa), torch.cat(xg), M, torch.tensor(LAM))


@pytest.mark.parametrize("kind", ["kid", "kis", "exact"])
@pytest.mark.parametrize("rank", [8, 11])
@pytest.mark.parametrize("sizes", [(8,), (5, 3), (1, 4, 3)])
def test_all_pairs_give_the_dense_solve_on_any_number_of_workers(kind: str, rank: int, sizes: tuple[int, ...]) -> None:
    (a, g), V = batch(8), torch.randn(3, 4)
    workers = [reduce(kind, *part, rank) for part in zip(a.split(sizes), g.split(sizes), strict=True)]
    torch.testing.assert_close(solve(workers, V), dense(a, g, V))


@pytest.mark.parametrize("n", [8, 20])
def test_more_pairs_than_a_gradient_has_entries(n: int) -> None:
    """K is singular; its pivots end when nothing is left."""
    (a, g), V = batch(n, 2, 2), torch.randn(2, 2)
    torch.testing.assert_close(solve([reduce("kid", a, g, n)], V), dense(a, g, V), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(solve([reduce("kid", a, g, 4)], V), dense(a, g, V), rtol=1e-7, atol=1e-9)


def test_copies_of_a_few_examples_are_interpolated_exactly_and_not_sampled() -> None:
    (a, g), V = batch(4), torch.randn(3, 4)
    a, g = a.repeat(3, 1, 1, 1), g.repeat(3, 1, 1, 1)
    expected = dense(a, g, V)
    torch.testing.assert_close(solve([reduce("kid", a, g, 4)], V), expected)
    assert (solve([reduce("kis", a, g, 4)], V) - expected).norm() > 1e-3 * expected.norm()
    assert (solve([reduce("kid", a, g, 4, by_norm=True)], V) - expected).norm() > 1e-3 * expected.norm()


@pytest.mark.parametrize("by_norm", [False, True])
@pytest.mark.parametrize("rank", [2, 5])
def test_interpolation_is_the_formula_of_its_pivots(by_norm: bool, rank: int) -> None:
    """Y by least squares in the gradients of the pivots, P = Y (E + lambda I)^-1 Y^T with the residual's kernel E."""
    a, g = batch(9)
    u = gradients(a, g)
    xa, xg, P = reduce("kid", a, g, rank, by_norm=by_norm)
    kept = gradients(xa[:, None, None], xg[:, None, None])
    S = [int((u - row).norm(dim=1).argmin()) for row in kept]
    assert torch.equal(u[S], kept)
    if by_norm:
        assert u.norm(dim=1).argsort(descending=True)[:rank].tolist() == S
    assert S[0] == int(u.norm(dim=1).argmax())
    Y = torch.linalg.lstsq(u[S].mT, u.mT).solution
    rest = u - Y.mT @ u[S]
    torch.testing.assert_close(P, Y @ torch.linalg.inv(rest @ rest.mT + LAM * torch.eye(9)) @ Y.mT)


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("seed", range(3))
def test_interpolated_operator_is_positive_and_at_most_that_of_no_pair(rank: int, seed: int) -> None:
    """So U is a direction of descent. Least squares in columns of K, as in the paper, may break either bound."""
    (a, g), eye = batch(9, seed=seed), torch.eye(12)
    kept = reduce("kid", a, g, rank)
    operator = torch.stack([solve([kept], v.view(3, 4)).flatten() for v in eye])
    torch.testing.assert_close(operator, operator.mT)
    values = torch.linalg.eigvalsh(operator) * LAM
    assert 0 < values.min() < 0.9 and values.max() < 1 + 1e-9


def test_kernel_is_the_other_form_of_woodbury() -> None:
    xa, xg = [torch.randn(3, 4), torch.randn(2, 4)], [torch.randn(3, 3), torch.randn(2, 3)]
    P = [torch.eye(3) * 0.5 + 0.1, torch.eye(2)]
    M, whole = OPS["pairs_kernel"](xa, xg, P), torch.block_diag(*P)
    a, g = torch.cat(xa), torch.cat(xg)
    K = (a @ a.mT) * (g @ g.mT)
    torch.testing.assert_close(M, whole - whole @ K @ torch.linalg.inv(torch.eye(5) + whole @ K) @ whole)


def test_draws_without_replacement_are_distinct_and_a_function_of_the_key() -> None:
    a, g = batch(30)
    first = reduce("kis", a, g, 6, step=7)
    kept = gradients(first[0][:, None, None], first[1][:, None, None]) / (30 / 6) ** 0.5
    S = [int((gradients(a, g) - row).norm(dim=1).argmin()) for row in kept]
    assert len(set(S)) == 6
    torch.testing.assert_close(gradients(a, g)[S], kept)
    assert all(torch.equal(x, y) for x, y in zip(first, reduce("kis", a, g, 6, step=7), strict=True))
    for other in ({"step": 8}, {"step": 7, "seed": 2}, {"step": 7, "stream": 1}):
        assert not torch.equal(first[0], reduce("kis", a, g, 6, **other)[0])


@pytest.mark.parametrize("replacement", [False, True])
def test_importance_is_the_squared_norm_of_a_gradient(replacement: bool) -> None:
    a, g = torch.ones(3, 1, 1, 1), torch.tensor([1.0, 2.0, 0.0])[:, None, None, None]
    drawn = [float(reduce("kis", a, g, 1, step=k, replacement=replacement)[1]) for k in range(400)]
    if replacement:  # the square root of the whole trace, whichever was drawn
        assert {round(value, 6) for value in drawn} == {round(5**0.5, 6)}
    else:  # 4 : 1 : 0, times sqrt(3) for the scale of all three
        kinds = [round(value / 3**0.5, 6) for value in drawn]
        assert set(kinds) == {1.0, 2.0}
        assert abs(kinds.count(2.0) / 400 - 0.8) < 0.06


def test_draws_with_replacement_are_unbiased_with_the_whole_trace() -> None:
    a, g = batch(6, 2, 2)
    u, total = gradients(a, g), torch.zeros(4, 4)
    F = u.mT @ u
    for k in range(600):
        xa, xg, _ = reduce("kis", a, g, 3, step=k, replacement=True)
        v = gradients(xa[:, None, None], xg[:, None, None])
        torch.testing.assert_close((v.mT @ v).trace(), F.trace())
        total += v.mT @ v / 600
    assert (total - F).norm() < 0.1 * F.norm()
    kept = torch.zeros(4, 4)
    for k in range(600):  # each counting alike, the large ones count too often
        xa, xg, _ = reduce("kis", a, g, 3, step=k)
        v = gradients(xa[:, None, None], xg[:, None, None])
        kept += v.mT @ v / 600
    assert kept.trace() > 1.05 * F.trace()


@pytest.mark.parametrize("kind", ["kid", "kis", "exact"])
def test_groups_are_apart_and_an_empty_batch_is_the_damped_gradient(kind: str) -> None:
    a, g, V = torch.randn(6, 2, 2, 3), torch.randn(6, 2, 2, 2), torch.randn(2, 2, 3)
    for rank in (5, 12):
        xa, xg, P = reduce(kind, a, g, rank)
        M = OPS["pairs_kernel"]([xa], [xg], [P])
        found = OPS["pairs_solve"](V, xa, xg, M, torch.tensor(LAM))
        assert xa.shape == (2, rank, 3) and found.shape == V.shape
        if rank == 12:
            for k in range(2):
                parts = (x[:, :, k].reshape(12, 1, 1, -1) for x in (a, g))
                torch.testing.assert_close(found[k], dense(*parts, V[k]))
    xa, xg, P = reduce(kind, a[:0, :, :1], g[:0, :, :1], 4)
    M = OPS["pairs_kernel"]([xa], [xg], [P])
    torch.testing.assert_close(OPS["pairs_solve"](V[0], xa, xg, M, torch.tensor(LAM)), V[0] / LAM)


@pytest.mark.parametrize("lam", [1e-1, 1e-6])
def test_weighting_anew_is_the_solve_and_cancels_nothing(lam: float) -> None:
    (a, g), damping = batch(6), torch.tensor(lam)
    xa, xg, P = OPS["spaced_pairs"](a, g, 8, damping)
    M, V = OPS["pairs_kernel"]([xa], [xg], [P]), 0.3 * xg.mT @ xa
    found = OPS["reweighted"](xa, xg, M, torch.tensor(0.3))
    torch.testing.assert_close(found, dense(a, g, V, lam), rtol=1e-6, atol=1e-8)
    rounded = OPS["pairs_solve"](V.float(), xa, xg, M, damping).double()
    error = (rounded - found).norm() / found.norm()
    assert error < 1e-5 if lam == 1e-1 else error > 1e-3


def test_types_say_what_does_not_fit() -> None:
    rows = Rows((None, None, 1, 5)), Rows((None, None, 1, 3))
    assert OPS["spaced_pairs"].infer(*rows, 7, 0.1) == (Mat((7, 5)), Mat((7, 3)), Psd((7, 7), torch.float64))
    with pytest.raises(FxcurvError, match="'spaced_pairs' keeps 0 pairs"):
        OPS["spaced_pairs"].infer(*rows, 0, 0.1)
    with pytest.raises(FxcurvError, match="'XG' of op 'pairs_solve'"):
        OPS["pairs_solve"].infer(Mat((3, 5)), Mat((7, 5)), Mat((6, 3)), Psd((7, 7)), 0.1)
