"""Failures, scalars in place of tensors, and what the type rules give and refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxcurv.ir.ops  # noqa: F401  (registers the ops)
from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS
from fxcurv.ir.ops import linalg
from fxcurv.ir.types import Diag, Mat, Orth, Psd, Rows, Scalar, Tensor, Vec

DTYPES = (torch.float64, torch.float32, torch.bfloat16)

BAD = {
    "indefinite": torch.diag(torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64)),
    "zero pivot": torch.diag(torch.tensor([1.0, -0.5, 1.0], dtype=torch.float64)),
    "nan": torch.full((3, 3), float("nan"), dtype=torch.float64),
    "inf": torch.diag(torch.tensor([1.0, float("inf"), 1.0], dtype=torch.float64)),
}


@pytest.mark.parametrize(
    ("name", "bad"), [("inverse", b) for b in BAD] + [(n, b) for n in ("eigh", "inverse_root") for b in ("nan", "inf")]
)
@pytest.mark.parametrize("form", ["matrix", "group", "diagonal", "diagonal group"])
def test_failure_is_nan_for_the_failing_group_alone(name: str, bad: str, form: str) -> None:
    matrix, good = BAD[bad], 2 * torch.eye(3, dtype=torch.float64)
    if "diagonal" in form:
        matrix, good = matrix.diagonal(), good.diagonal()
    A = torch.stack([matrix, good]) if "group" in form else matrix
    rest = {"inverse": (0.5,), "eigh": (), "inverse_root": (2.0, 0.5)}[name]
    results = OPS[name](A, *rest)
    for result in results if isinstance(results, tuple) else (results,):
        failed = result[0] if "group" in form else result
        assert failed.isnan().all()
        if "group" in form:
            assert result[1].isfinite().all()


def test_eigh_that_does_not_converge_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.linalg.eigh

    def failing(A: torch.Tensor) -> Any:
        if (A == 7.0).any():
            raise torch.linalg.LinAlgError("did not converge")
        return real(A)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    bad, good = 7 * torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    values, vectors = linalg.decompose(torch.stack([bad, good]))
    assert values[0].isnan().all() and vectors[0].isnan().all()
    assert values[1].tolist() == [1.0, 1.0] and vectors[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inverse_is_exactly_symmetric(dtype: torch.dtype) -> None:
    root = torch.randn(3, 9, 20, generator=torch.Generator().manual_seed(0))
    inverse = OPS["inverse"]((root @ root.mT).to(dtype), 0.1)
    assert torch.equal(inverse, inverse.mT)


SCALED = ("mean", "ema", "moving", "bias_correct", "inverse", "inverse_root", "scale", "damped_divide", "power")


@pytest.mark.parametrize("name", SCALED)
def test_numbers_may_stand_for_scalars(name: str) -> None:
    for first, *rest in OPS[name].samples():
        numbers = [x.item() if isinstance(x, torch.Tensor) and x.ndim == 0 and first.ndim else x for x in rest]
        torch.testing.assert_close(OPS[name](first, *numbers), OPS[name](first, *rest), equal_nan=True)


def test_numbers_may_stand_on_either_side() -> None:
    x = torch.tensor([2.0, 4.0])
    assert OPS["sub"](1.0, x).tolist() == [-1.0, -3.0]
    assert OPS["div"](1.0, x).tolist() == [0.5, 0.25]
    assert OPS["ema_weight"](torch.tensor(99.0), 3, 0.5).item() == 0.5
    assert OPS["tick"](torch.tensor(4.0), 3).item() == 5.0
    assert OPS["clip_kl"]([torch.tensor(4.0)], 1.0, 1.0).item() == 0.5


def test_a_double_scalar_does_not_promote_single_precision() -> None:
    x, scalar, line = (
        torch.ones(2, 3, 3),
        torch.tensor(0.5, dtype=torch.float64),
        torch.full((2,), 0.5, dtype=torch.float64),
    )
    for value in (scalar, line):
        assert OPS["scale"](x, value).dtype == torch.float32
        assert OPS["mul"](x, value).dtype == torch.float32
        assert OPS["ema"](x, x, value).dtype == torch.float32
        assert OPS["mean"](x, value).dtype == torch.float32
        assert OPS["inverse"](x, value).dtype == torch.float32


def test_ema_of_half_precision_state_keeps_its_weight() -> None:
    old, new = torch.zeros(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16)
    assert OPS["ema"](old, new, 0.999)[0].item() == pytest.approx(0.001, rel=0.01)


def test_ema_with_weight_one_ignores_a_broken_new_value() -> None:
    old = torch.tensor([1.0, 2.0], dtype=torch.float64)
    new = torch.tensor([float("nan"), float("inf")], dtype=torch.float64)
    assert torch.equal(OPS["ema"](old, new, torch.tensor(1.0)), old)
    assert torch.equal(OPS["ema"](old, new, 1.0), old)


@pytest.mark.parametrize(
    ("name", "operands", "message"),
    [
        ("gram", (Mat((3, 4)),), "must be a Rows"),
        ("second_moment", (Rows((5, 1, 1, 3)), Rows((4, 1, 1, 2)), Orth((3, 3)), Orth((2, 2))), "shape must be"),
        ("second_moment", (Rows((5, 1, 1, 3)), Rows((5, 1, 1, 2)), Orth((2, 2)), Orth((3, 3))), "shape must be"),
        ("kron_apply", (Mat((3, 5)), Psd((5, 5)), Psd((3, 3))), "shape must be"),
        ("kron_apply", (Mat((4, 3, 5)), Psd((3, 3)), Psd((4, 5, 5))), "shape must be"),
        ("rotate", (Mat((3, 5)), Psd((3, 3)), Orth((5, 5))), "must be a Diag or Orth"),
        ("inverse", (Diag((4, 4)), 0.1), "diagonal=True"),
        ("inverse", (Psd((4, 4)), 0.1, True), "leave the flag out"),
        ("inverse", (Psd((2, 4, 4)), Scalar((3,))), "groups"),
        ("inverse", (Orth((4, 4)), 0.1), "must be a Diag or Psd"),
        ("pi_split", (Psd((2, 4, 4)), Psd((3, 3))), "equal groups"),
        ("add", (Psd((4, 4)), 0.1), "damping"),
        ("add", (Psd((4, 4)), Psd((3, 3))), "shape must be"),
        ("add", (Psd((4, 4)), Mat((4, 4))), "must be a Psd"),
        ("add", (1.0, 2.0), "at least one tensor"),
        ("mul", (Vec((4,)), Scalar((4,))), "groups"),
        ("ema", (Psd((4, 4)), Mat((4, 4)), 0.5), "must be a Psd"),
        ("mode_gram", (Tensor((4, 3)), 2), "modes go from 0 to 1"),
        ("matricize", (Tensor((4, 3)), [0, 0], [4, 3]), "does not order"),
        ("matricize", (Tensor((4, 3)), [0, 1], [4, 4]), "cannot bring"),
        ("append_column", (Mat((4, 3)), Vec((3,))), "one bias entry"),
        ("unpack", (Vec((4,)), 2, [3]), "not all there"),
        ("clip_kl", ([], 0.1, 0.1), "at least one value"),
        ("finite", ([],), "at least one value"),
        ("pack", ([],), "at least one value"),
    ],
)
def test_type_rule_refuses(name: str, operands: tuple[Any, ...], message: str) -> None:
    with pytest.raises(FxcurvError, match=message):
        OPS[name].infer(*operands)


@pytest.mark.parametrize(
    ("name", "operands", "expected"),
    [
        ("add", (Psd((4, 4)), Psd((4, 4))), "Psd[4]"),
        ("sub", (Psd((4, 4)), Psd((4, 4))), "Sym[4]"),
        ("mul", (Psd((4, 4)), 2.0), "Psd[4]"),
        ("mul", (Scalar((3,)), Psd((3, 4, 4))), "Psd[3;4]"),
        ("mul", (Orth((4, 4)), 2.0), "Mat[4,4]"),
        ("div", (1.0, Scalar()), "Scalar[]"),
        ("add", (Diag((4,)), Scalar()), "Diag[4]"),
        ("sqrt", (Psd((4, 4)),), "Sym[4]"),
        ("inverse", (Diag((4,)), 0.1), "Diag[4]"),
        ("inverse", (Diag((4, 4)), 0.1, True), "Diag[4;4]"),
        ("gram", (Rows((None, None, 1, 3)),), "Psd[3]"),
        ("gram", (Rows((None, None, 4, 3), torch.bfloat16),), "Psd[4;3]"),
        ("gram", (Rows((None, None, 4, 3), torch.float64),), "Psd[4;3]:f64"),
        ("mean_positions", (Rows((None, None, 4, 3)),), "Rows[?,1,4,3]"),
        ("dot", (Mat((3, 4), torch.bfloat16), Mat((3, 4), torch.bfloat16)), "Scalar[]"),
    ],
)
def test_type_rule_gives(name: str, operands: tuple[Any, ...], expected: str) -> None:
    assert str(OPS[name].infer(*operands)) == expected


def test_cost_of_unknown_rows_counts_them_once() -> None:
    gram = OPS["gram"]
    known, unknown = Rows((10, 1, 1, 3)), Rows((None, None, 1, 3))
    assert gram.cost(gram.infer(known), known).flops == 10 * gram.cost(gram.infer(unknown), unknown).flops == 180


def test_cost_counts_the_tensors_of_a_list() -> None:
    pack = OPS["pack"]
    types = [Mat((3, 4)), Vec((5,))]
    assert pack.cost(pack.infer(types), types).bytes == 4 * (17 + 17)
