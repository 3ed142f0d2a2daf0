"""Counter-based random numbers: quality, determinism, and independence of chunking and global state."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from scipy import stats

from fxcurv import sampling

F64 = torch.float64
DRAWS = {"uniform": sampling.uniform, "normal": sampling.normal, "signs": sampling.signs}
MOMENTS = {"uniform": (0.5, 1 / 12, 1 / 80), "normal": (0.0, 1.0, 3.0), "signs": (0.0, 1.0, 1.0)}  # mean, var, 4th


@pytest.mark.parametrize("name", DRAWS)
def test_moments(name: str) -> None:
    x = DRAWS[name]((7, 1), 500, 400, dtype=F64).flatten()
    mean, var, fourth = MOMENTS[name]
    assert abs(x.mean() - mean) < 4 * (var / len(x)) ** 0.5
    assert abs((x - mean).square().mean() - var) <= 4 * ((fourth - var**2) / len(x)) ** 0.5 + 1e-12


@pytest.mark.parametrize(("name", "law"), [("uniform", stats.uniform), ("normal", stats.norm)])
@pytest.mark.parametrize("shape", [(40_000, 1), (1, 40_000), (200, 200)])
def test_distribution(name: str, law: stats.rv_continuous, shape: tuple[int, int]) -> None:
    assert stats.kstest(DRAWS[name]((3,), *shape, dtype=F64).flatten().numpy(), law.cdf).pvalue > 1e-3


def test_first_draws_over_consecutive_keys_are_uniform() -> None:
    for key in (lambda i: (i,), lambda i: (0, i, 0), lambda i: (i, 5)):
        first = np.array([sampling.uniform(key(i), 1, 1, dtype=F64).item() for i in range(2000)])
        assert stats.kstest(first, stats.uniform.cdf).pvalue > 1e-3


@pytest.mark.parametrize("name", DRAWS)
def test_neighbours_are_independent(name: str) -> None:
    n = 400
    x = DRAWS[name]((1, 2), n, n, dtype=F64) - MOMENTS[name][0]
    others = {
        "row": (x[:-1], x[1:]),
        "column": (x[:, :-1], x[:, 1:]),
        "diagonal": (x[:-1, 1:], x[1:, :-1]),
        "transpose": (x.tril(-1), x.T.tril(-1)),
        "step": (x, DRAWS[name]((1, 3), n, n, dtype=F64) - MOMENTS[name][0]),
        "seed": (x, DRAWS[name]((2, 2), n, n, dtype=F64) - MOMENTS[name][0]),
        "swapped": (x, DRAWS[name]((2, 1), n, n, dtype=F64) - MOMENTS[name][0]),
        "longer": (x, DRAWS[name]((1, 2, 0), n, n, dtype=F64) - MOMENTS[name][0]),
    }
    for where, (a, b) in others.items():
        assert abs((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()) < 5 / n, where


def test_pairs_fill_the_unit_square() -> None:
    x = sampling.uniform((11,), 300, 301, dtype=F64)
    for a, b in ((x[:, :-1], x[:, 1:]), (x[:-1], x[1:])):
        cells = np.histogram2d(a.flatten(), b.flatten(), bins=16, range=[[0, 1], [0, 1]])[0]
        assert stats.chisquare(cells.flatten()).pvalue > 1e-3


@pytest.mark.parametrize("name", DRAWS)
def test_rows_do_not_depend_on_chunks_or_on_width(name: str) -> None:
    draw = DRAWS[name]
    whole = draw((5, -6), 10, 4)
    assert torch.equal(whole, draw((5, -6), 10, 4))
    chunks = [draw((5, -6), rows, 4, first_row=first) for first, rows in ((0, 1), (1, 6), (7, 0), (7, 3))]
    assert torch.equal(whole, torch.cat(chunks))
    assert torch.equal(whole[:, :2], draw((5, -6), 10, 2))
    assert whole.unique().numel() > 1 and not torch.equal(whole, draw((5, 6), 10, 4))


@pytest.mark.parametrize("name", DRAWS)
def test_global_generators_are_left_alone(name: str) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    draws = DRAWS[name]((0,), 3, 3)
    torch.manual_seed(1)
    assert torch.equal(draws, DRAWS[name]((0,), 3, 3))
    torch.set_rng_state(before[0])
    DRAWS[name]((0,), 3, 3)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_open_interval_and_finite_in_every_dtype(dtype: torch.dtype) -> None:
    u, z = sampling.uniform((1,), 400, 500, dtype=dtype), sampling.normal((1,), 400, 500, dtype=dtype)
    assert u.dtype == z.dtype == dtype
    assert u.min() > 0 and u.max() < 1 and z.isfinite().all()
    assert (u.double() - sampling.uniform((1,), 400, 500, dtype=F64)).abs().max() <= torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("bits", [0, -1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_extreme_bits_stay_inside(monkeypatch: pytest.MonkeyPatch, bits: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(sampling, "_bits", lambda *args: torch.tensor([[bits]]))
    u = sampling.uniform((), 1, 1, dtype=dtype)
    z = sampling.normal((), 1, 1, dtype=dtype)
    assert 0 < u < 1 and z.isfinite() and 3 < abs(z) < 8.3
    assert torch.sign(z) == sampling.signs((), 1, 1, dtype=dtype)


def test_hash_equals_arbitrary_precision_integers() -> None:
    """int64 arithmetic in torch wraps exactly as unsigned 64-bit arithmetic does."""
    key, mask = (123456789012345678901, -3), (1 << 64) - 1

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    seed = len(key)
    for part in key:
        seed = mix(((seed + 0x9E3779B97F4A7C15) ^ (part & mask)) & mask)
    rows = [mix((seed + row * 0x9E3779B97F4A7C15) & mask) for row in (7, 8)]
    expected = [[mix((row + column * 0xD1B54A32D192ED03) & mask) for column in (1, 2, 3)] for row in rows]
    u = sampling.uniform(key, 2, 3, first_row=7, dtype=F64)
    assert u.tolist() == [[((value >> 12) + 0.5) / 2**52 for value in row] for row in expected]


def test_empty_blocks() -> None:
    assert sampling.uniform((1,), 0, 5).shape == (0, 5) and sampling.normal((1,), 5, 0).shape == (5, 0)
