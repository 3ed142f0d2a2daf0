"""Modes of a stationary chain satisfy their equations, fail as the factorisations do, and gains stay finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fxcurv.ir.ops  # noqa: F401  (registers the ops)
from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS
from fxcurv.ir.types import Mat, Psd, Rows, Scalar, Vec

SAMPLES = list(OPS["chain_modes"].samples())
EACH = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: str(tuple(sample[0].shape)))


def damped(C0: Tensor, damping: Tensor) -> Tensor:
    return C0 + damping.reshape(*damping.shape, *(1,) * (C0.ndim - damping.ndim)) * torch.eye(
        C0.shape[-1], dtype=C0.dtype
    )


@EACH
def test_chain_modes(sample: tuple[Any, ...]) -> None:
    C0, C1, damping = sample
    D = damped(C0, damping)
    P, K, mu = OPS["chain_modes"](*sample)
    torch.testing.assert_close(P @ D, C1.mT)
    torch.testing.assert_close(K.mT @ D @ K, torch.eye(D.shape[-1], dtype=D.dtype).expand(D.shape))
    # K mu K^-1 = D^-1/2 H^T H D^1/2 = D^-1 C1^T D^-1 C1
    torch.testing.assert_close(K * mu.unsqueeze(-2), torch.linalg.solve(D, C1.mT @ torch.linalg.solve(D, C1)) @ K)
    assert (mu >= 0).all() and (mu < 1).all()


@EACH
def test_symmetric_chain_modes(sample: tuple[Any, ...]) -> None:
    C0, C1, damping = sample
    D = damped(C0, damping)
    L, psi = OPS["symmetric_chain_modes"](*sample)
    torch.testing.assert_close(L.mT @ D @ L, torch.eye(D.shape[-1], dtype=D.dtype).expand(D.shape))
    torch.testing.assert_close(L.mT @ (C1 + C1.mT) @ L / 2, torch.diag_embed(psi))
    assert (psi.abs() < 1).all()


@pytest.mark.parametrize("name", ["chain_modes", "symmetric_chain_modes"])
@pytest.mark.parametrize("bad", ["nan", "indefinite"])
def test_failure_is_nan_for_the_failing_group_alone(name: str, bad: str) -> None:
    good = torch.eye(3, dtype=torch.float64)
    broken = good * (float("nan") if bad == "nan" else -2.0)
    results = OPS[name](torch.stack([broken, good]), 0.5 * torch.stack([good, good]), 0.1)
    for result in results:
        assert result[0].isnan().all() and result[1].isfinite().all()


def test_a_transition_of_norm_one_is_clipped() -> None:
    C0 = torch.eye(2, dtype=torch.float64)
    assert OPS["chain_modes"](C0, 1.1 * C0, 0.0)[2].tolist() == [1.0, 1.0]
    assert OPS["symmetric_chain_modes"](C0, -1.1 * C0, 0.0)[1].tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("steps", [1.0, 2.0, 7.0, 100.0])
def test_gains_at_the_edges(steps: float) -> None:
    """At x = 1 a sum of T equal terms has T times the variance; at x = -1 with an even T it has none: floored."""
    one = torch.ones(1, dtype=torch.float64)
    gain = OPS["finite_chain_gain"]
    assert gain(one, one, steps).item() == pytest.approx(1 / steps, rel=0.02)
    inverse = gain(-one, one, steps).item()
    assert inverse == pytest.approx(steps, rel=0.03) if steps % 2 else 1e3 < inverse <= 1e4
    assert OPS["chain_gain"](one, one).item() == pytest.approx(1e4)
    single = gain(one.float(), one.float(), torch.tensor(steps))
    assert single.dtype == torch.float32 and single.item() == pytest.approx(1 / steps, rel=0.02)


def test_a_mean_length_between_whole_numbers_is_a_mixture() -> None:
    """Sums over time of sequences of 3 and 4 steps, a quarter of them long."""
    psi_g, psi_a = torch.tensor([0.7, -0.8], dtype=torch.float64), torch.tensor([0.9, -0.5, 0.3], dtype=torch.float64)
    x = psi_g[:, None] * psi_a

    def total(steps: int) -> Tensor:
        return torch.stack([x ** abs(s - t) for s in range(steps) for t in range(steps)]).sum(0)

    expected = 3.25 / (0.75 * total(3) + 0.25 * total(4))
    torch.testing.assert_close(OPS["finite_chain_gain"](psi_g, psi_a, 3.25), expected)


@pytest.mark.parametrize(
    ("name", "operands", "message"),
    [
        ("lagged_gram", (Mat((3, 4)),), "must be a Rows"),
        ("chain_modes", (Mat((3, 3)), Mat((3, 3)), 0.1), "must be a Psd"),
        ("chain_modes", (Psd((3, 3)), Mat((2, 2)), 0.1), "shape must be"),
        ("symmetric_chain_modes", (Psd((2, 3, 3)), Mat((2, 3, 3)), Scalar((3,))), "groups"),
        ("chain_gain", (Vec((2, 3)), Vec((4, 5))), "shape must be"),
        ("finite_chain_gain", (Vec((3,)), Vec((5,)), Vec((1,))), "must be a Scalar"),
        ("sides_apply", (Mat((3, 5)), Mat((5, 5)), Mat((3, 3))), "shape must be"),
        ("sides_apply_transposed", (Rows((1, 1, 3, 5)), Mat((3, 3)), Mat((5, 5))), "must be a Mat"),
    ],
)
def test_type_rule_refuses(name: str, operands: tuple[Any, ...], message: str) -> None:
    with pytest.raises(FxcurvError, match=message):
        OPS[name].infer(*operands)


def test_lagged_gram_is_no_symmetric_matrix() -> None:
    assert str(OPS["lagged_gram"].infer(Rows((None, None, 1, 3)))) == "Mat[3,3]"
    assert str(OPS["lagged_gram"].infer(Rows((None, None, 4, 3), torch.float64))) == "Mat[4;3,3]:f64"
