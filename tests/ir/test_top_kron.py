"""The best Kronecker products of a block against the singular value decomposition of its rearrangement, written out."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

import fxcurv.ir.ops  # noqa: F401  (registers the ops)
from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS
from fxcurv.ir.ops import rearranged as module
from fxcurv.ir.ops.rearranged import Coordinates, Dense, rearranged
from fxcurv.ir.types import Psd, Rows, Scalar, Sym

pytestmark = pytest.mark.usefixtures("float64")

WEIGHT = torch.tensor(0.1, dtype=torch.float64)
TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def rows(b: int = 30, s: int = 1, groups: int = 1, i: int = 4, o: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows whose lengths are correlated, so that no one product is exact."""
    torch.manual_seed(seed)
    length = torch.randn(b, 1, 1, 1).exp()
    return (torch.randn(b, s, groups, i) + 0.5) * length, (torch.randn(b, s, groups, o).cumsum(1) + 0.3) * length


def rearrangement(a: Tensor, g: Tensor, window: int = 0, hard: bool = False) -> Tensor:
    """Z of one group, by explicit double sums over the positions of every example."""
    total = torch.zeros(a.shape[3] ** 2, g.shape[3] ** 2)
    for n, t, u in product(range(a.shape[0]), range(a.shape[1]), range(a.shape[1])):
        if abs(t - u) <= window:
            k = 1.0 if hard else 1 - abs(t - u) / (window + 1)
            left, right = torch.outer(a[n, t, 0], a[n, u, 0]), torch.outer(g[n, t, 0], g[n, u, 0])
            total += WEIGHT * k * torch.outer(left.flatten(), right.flatten())
    return total


def outer(R: Tensor, S: Tensor) -> Tensor:
    return torch.outer(R.flatten(), S.flatten())


def zeros(g: Tensor) -> Tensor:
    return torch.zeros(g.shape[3], g.shape[3])


def top(a: Tensor, g: Tensor, *off: Tensor, iterations: int = 60, window: int = 0, hard: bool = False) -> list[Tensor]:
    return list(OPS["top_kron"](a, g, WEIGHT, zeros(g), list(off), iterations, window, hard))


def both(a: Tensor, g: Tensor, window: int = 0, krylov: int = 6, restarts: int = 6) -> list[Tensor]:
    return list(OPS["top_two_kron"](a, g, WEIGHT, zeros(g), zeros(g), krylov, restarts, window, False))


CASES = {
    "examples": ({}, 0),
    "few rows": ({"b": 5, "i": 6, "o": 5}, 0),
    "positions as examples": ({"b": 6, "s": 5}, 0),
    "neighbours": ({"b": 6, "s": 5}, 1),
    "window beyond the positions": ({"b": 6, "s": 3}, 7),
}


@pytest.mark.parametrize("table", [0, None], ids=["dense", "by cost"])
@pytest.mark.parametrize("name", CASES)
def test_leading_triplets_of_the_rearranged_block(
    name: str, table: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if table is not None:
        monkeypatch.setattr(module, "TABLE", table)
    shape, window = CASES[name]
    a, g = rows(**shape)
    Z = rearrangement(a, g, window)
    U, sigma, Vh = torch.linalg.svd(Z, full_matrices=False)
    best = [sigma[rank] * torch.outer(U[:, rank], Vh[rank]) for rank in range(2)]
    R, S = top(a, g, window=window)
    torch.testing.assert_close(outer(R, S), best[0], **TIGHT)
    torch.testing.assert_close((Z - outer(R, S)).square().sum(), sigma[1:].square().sum())
    R2, S2 = top(a, g, R, S, iterations=200, window=window)
    torch.testing.assert_close(outer(R2, S2), best[1], rtol=1e-7, atol=1e-8)
    terms = both(a, g, window, restarts=20)
    torch.testing.assert_close(outer(*terms[:2]), best[0], **TIGHT)
    torch.testing.assert_close(outer(*terms[2:]), best[1], rtol=1e-7, atol=1e-8)
    for R, S in (top(a, g, window=window), terms[:2], terms[2:]):
        torch.testing.assert_close(R.norm(), S.norm())
        assert R.trace() > 0 and torch.equal(R, R.T) and torch.equal(S, S.T)
    assert torch.linalg.eigvalsh(terms[0]).min() > -1e-12 and torch.linalg.eigvalsh(terms[1]).min() > -1e-12


def test_representation_is_chosen_by_cost() -> None:
    kinds = {}
    for b, window, s, size in ((5, 0, 1, 20), (5, 1, 1, 20), (5, 1, 2, 20), (2000, 0, 1, 2)):
        a, g = rows(b, s, 1, size, size)
        kinds[b, window, s] = type(rearranged(a, g, WEIGHT, [], window, False))
    assert kinds == {(5, 0, 1): Coordinates, (5, 1, 1): Coordinates, (5, 1, 2): Dense, (2000, 0, 1): Dense}


@pytest.mark.parametrize("off", [False, True])
def test_both_representations_are_one_map(off: bool) -> None:
    a, g = rows(7, i=6, o=5, groups=2)
    taken = [torch.randn(2, d, d) for d in (6, 5)] if off else []
    taken = [M + M.mT for M in taken]
    S = torch.randn(2, 5, 5)
    found = []
    for table in (0, None):
        z = rearranged(a, g, WEIGHT, taken, 0, False, table)
        u = z.forward(z.back(z.enter(S + S.mT)))
        v = z.back(u)
        found.append((z.leave(u, "a"), z.leave(v, "g"), z.inner(u, u, "a"), z.inner(v, v, "g")))
    torch.testing.assert_close(found[0], found[1], **TIGHT)


def test_groups_are_apart() -> None:
    a, g = rows(12, 2, groups=3)
    start = zeros(g).expand(3, 3, 3)
    R, S = OPS["top_kron"](a, g, WEIGHT, start, [], 40, 1, False)
    terms = OPS["top_two_kron"](a, g, WEIGHT, start, start, 6, 8, 1, False)
    for k in range(3):
        mine = [x[:, :, k : k + 1] for x in (a, g)]
        torch.testing.assert_close([R[k], S[k]], top(*mine, iterations=40, window=1), **TIGHT)
        torch.testing.assert_close([x[k] for x in terms], both(*mine, 1, restarts=8), rtol=1e-7, atol=1e-9)


def test_half_an_iteration_gives_tkfac() -> None:
    """From the identity the input factor is E[|g|^2 a a^T], without a whole iteration."""
    a, g = rows()
    R, _ = top(a, g, iterations=0)
    weighted = torch.einsum("no,ni,nj->ij", g[:, 0, 0].square(), a[:, 0, 0], a[:, 0, 0])
    torch.testing.assert_close(R / R.trace(), weighted / weighted.trace())


def test_one_row_is_exact_and_leaves_nothing() -> None:
    a, g = rows(1)
    R, S = top(a, g, iterations=1)
    torch.testing.assert_close(outer(R, S), rearrangement(a, g))
    R2, S2 = top(a, g, R, S)
    assert outer(R2, S2).norm() < 1e-13 * outer(R, S).norm()
    terms = both(a, g)
    torch.testing.assert_close(outer(*terms[:2]), rearrangement(a, g))
    assert outer(*terms[2:]).norm() < 1e-7 * outer(R, S).norm()


@pytest.mark.parametrize("sides", ["both", "a", "g"])
def test_no_rows_of_a_side_give_zeros(sides: str) -> None:
    a, g = rows(6)
    a, g = a[: 0 if sides in ("a", "both") else 6], g[: 0 if sides in ("g", "both") else 6]
    for result in (top(a, g), top(a, g, torch.zeros(4, 4), zeros(g)), both(a, g), top(a, g, window=1)):
        assert all(torch.equal(x, torch.zeros_like(x)) for x in result)


def test_rows_without_partners_are_refused() -> None:
    a, g = rows(6)
    with pytest.raises(FxcurvError, match="6 examples of a layer's input do not pair with 4 of its output"):
        top(a, g[:4])


@pytest.mark.parametrize("stale", ["orthogonal", "near"])
def test_a_start_saves_iterations_and_an_orthogonal_one_does_no_harm(stale: str) -> None:
    a, g = rows()
    g[..., 2] = 0  # a unit that has died
    R, S = top(a, g)
    start = torch.diag(torch.tensor([0.0, 0.0, 5.0])) if stale == "orthogonal" else S + 1e-3 * torch.eye(3)
    count = 60 if stale == "orthogonal" else 2
    found = OPS["top_kron"](a, g, WEIGHT, start, [], count, 0, False)
    cold = top(a, g, iterations=count)
    torch.testing.assert_close(outer(*found), outer(R, S), rtol=1e-5, atol=1e-5)
    if stale == "near":
        assert (outer(*found) - outer(R, S)).norm() < 0.1 * (outer(*cold) - outer(R, S)).norm()


@pytest.mark.parametrize("hard", [False, True])
def test_a_hard_window_is_clipped_and_a_triangular_one_needs_no_clipping(hard: bool) -> None:
    """With three basis vectors as inputs and one output gradient, R is the kernel of the window itself."""
    a, g = torch.eye(3).reshape(1, 3, 1, 3), torch.ones(1, 3, 1, 2)
    near = 1.0 if hard else 0.5
    kernel = torch.tensor([[1, near, 0], [near, 1, near], [0, near, 1]])
    values, vectors = torch.linalg.eigh(kernel)
    assert bool(values[0] < 0) == hard
    R, S = top(a, g, window=1, hard=hard)
    positive = vectors @ torch.diag(values.clamp(min=0)) @ vectors.T
    torch.testing.assert_close(R / R.trace(), positive / positive.trace())
    torch.testing.assert_close(S / S.trace(), torch.full((2, 2), 0.5))


@pytest.mark.parametrize("groups", [(), (2,)])
@pytest.mark.parametrize("sign", [1, -1])
def test_modes_invert_the_sum_of_two_products(groups: tuple[int, ...], sign: int) -> None:
    torch.manual_seed(3)
    D, C, V = [], [], torch.randn(*groups, 3, 4)
    for d in (4, 3):
        root, other = torch.randn(*groups, d, d), torch.randn(*groups, d, d)
        D.append(root @ root.mT)
        C.append(0.2 * (other + other.mT))
    damping = torch.tensor(0.7)
    (KA, sA), (KG, sG) = (OPS["pencil_modes"](x, y, damping) for x, y in zip(D, C, strict=True))
    for K, s, x, y in ((KA, sA, D[0], C[0]), (KG, sG, D[1], C[1])):
        eye = torch.eye(x.shape[-1]).expand(x.shape)
        torch.testing.assert_close(K.mT @ (x + damping * eye) @ K, eye)
        torch.testing.assert_close(K.mT @ y @ K, torch.diag_embed(s))
    assert (1 + sign * sG.unsqueeze(-1) * sA.unsqueeze(-2)).min() > 0.3
    gain = OPS["two_term_gain"](sG, sA, torch.tensor(0.1), sign, "floor")
    U = KG @ (gain * (KG.mT @ V @ KA)) @ KA.mT
    for k in range(groups[0] if groups else 1):
        A, G, A2, G2, v, u = (x[k] if groups else x for x in (*D, *C, V, U))
        dense = torch.kron(G + damping * torch.eye(3), A + damping * torch.eye(4)) + sign * torch.kron(G2, A2)
        torch.testing.assert_close(u.flatten(), torch.linalg.solve(dense, v.flatten()))


def test_wrong_operands_are_named() -> None:
    a, g, w = Rows((None, 1, 1, 4)), Rows((None, 1, 1, 3)), Scalar()
    start = Psd((3, 3))
    for message, operands in {
        "operand 'start'": (a, g, w, Psd((4, 4)), [], 3),
        "operand 'off'": (a, g, w, start, [Psd((3, 3)), start], 3),
        "no or two matrices": (a, g, w, start, [start], 3),
        "operand 'window'": (a, g, w, start, [], 3, -1),
    }.items():
        with pytest.raises(FxcurvError, match=message):
            OPS["top_kron"].infer(*operands)
    with pytest.raises(FxcurvError, match="dimension of at least 3"):
        OPS["top_two_kron"].infer(a, g, w, start, Sym((3, 3)), 2, 4)
    with pytest.raises(FxcurvError, match="'share'"):
        OPS["subset_examples"].infer(a, 0.0)
    with pytest.raises(FxcurvError, match="'keep'"):
        OPS["two_term_gain"].infer(*[OPS["pencil_modes"].infer(start, start, w)[1]] * 2, w, 1, "keep")
