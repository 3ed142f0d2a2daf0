"""What is decided before a generated kernel of these families starts: claims, the choice of a form, the larger sizes.

The kernels themselves are proven variant by variant in ``test_triton_interpreter.py`` and ``test_aot.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fxcurv.ir.op import OPS
from fxcurv.ir.types import Diag, Mat, Orth, Psd, Rows, Type
from fxcurv.kernels.triton import conv_gram, conv_shifts, eig_apply, kron_apply
from fxcurv.kernels.triton.conv_gram import make
from fxcurv.kernels.triton.family import FAMILIES, normal
from fxcurv.layers.conv import ConvForm

HALF = torch.bfloat16


class Started:
    """Stands for ``specialise``: notes family and geometry, and answers with the family's own float64 definition."""

    def __init__(self) -> None:
        self.family, self.values = "", {}

    def __call__(self, family: Any, values: Any) -> Callable[[Tensor], Tensor]:
        self.family, self.values = family.name, values
        return self.answer

    def answer(self, x: Tensor) -> Tensor:
        v = self.values
        steps = v.get("stride", (1,) * len(v["kernel"]))
        channels = x.shape[1] // v["groups"]
        form = ConvForm(
            v["groups"], 1, channels * torch.Size(v["kernel"]).numel() + v["bias"], v["bias"], (), (), v["scale"],
            kernel=v["kernel"], stride=steps, dilation=v["dilation"], pads=v["pads"],
        )  # fmt: skip
        return conv_gram.naive(x, form)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    found = Started()
    monkeypatch.setattr(conv_gram, "specialise", found)
    return found


def grams(x: Tensor, form: ConvForm) -> tuple[Tensor, Tensor]:
    """By what ``conv_gram`` starts, and of the rows, both in float64."""
    result = conv_gram.conv_gram(x, form)
    assert result is not None
    return result, OPS["gram"].reference(form.rows_a(form.batched(x).double()))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("case", ["3x3", "strided", "grouped", "1d", "3d"])
def test_borders_are_laid_before_or_masked(case: str, mode: str, started: Started) -> None:
    x, form = conv_gram.images(conv_gram.CASES[case], torch.float32)
    form = dataclasses.replace(form, mode=mode)
    torch.testing.assert_close(*grams(x, form), rtol=1e-10, atol=1e-10)
    assert any(map(any, started.values["pads"])) == (mode == "zeros")


def test_an_image_without_batch_axis(started: Started) -> None:
    x, form = conv_gram.images(conv_gram.CASES["3x3"], torch.float32)
    torch.testing.assert_close(*grams(x[0], form), rtol=1e-10, atol=1e-10)


LARGE = {"size": (16, 64, 32, 32), "kernel": (3, 3), "pads": ((1, 1), (1, 1))}


@pytest.mark.parametrize(
    ("change", "family"),
    [
        ({}, "conv_shifts"),
        ({"stride": (2, 2)}, "conv_gram"),
        ({"size": (1, 64, 8, 8)}, "conv_gram"),  # too few pixels for the products of so many parts
        ({"size": (64, 3, 32, 32)}, "conv_gram"),  # a tile of channels would be mostly empty
        ({"kernel": (1, 1), "pads": ((0, 0), (0, 0)), "bias": False}, "conv_gram"),  # one tap: nothing is shared
        ({"size": (4096, 64, 2, 2), "kernel": (5, 5), "pads": ((2, 2), (2, 2))}, "conv_gram"),  # no inner part
    ],
)
def test_shifts_are_chosen_where_they_are_worth_it(change: dict[str, Any], family: str, started: Started) -> None:
    case = LARGE | change
    assert conv_gram.conv_gram(torch.empty(case["size"], device="meta"), make(**case)) is not None
    assert started.family == family


def test_shifts_save_two_thirds_of_a_kernel_of_three() -> None:
    values = conv_shifts.geometry(make(**LARGE), torch.float32)
    assert values is not None and conv_shifts.shifts(values) == 13 and conv_shifts.parts(values) == 9


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_other_dtypes_are_left_to_others(dtype: torch.dtype) -> None:
    x, form = conv_gram.images(conv_gram.CASES["3x3"], torch.float32)
    assert conv_gram.conv_gram(x.to(dtype), form) is None


def claims(family: str, *types: Any) -> bool:
    """Whether a family takes a node of these operand types."""
    return FAMILIES[family].geometry(None, *types) is not None


def matrices(cls: type[Type], o: int, i: int, batch: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Any:
    square = [cls((*batch, n, n), dtype) for n in (o, i)]
    return Mat((*batch, o, i), dtype), *square


@pytest.mark.parametrize("op", ["kron_apply", "rotate", "rotate_back"])
def test_claims_of_small_matrices(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = Psd if op == "kron_apply" else Orth
    V, left, right = matrices(cls, 32, 7)
    assert claims(op, V, left, right)
    assert claims(op, *matrices(cls, 32, 7, (5,)))
    assert not claims(op, V, Diag((32,)), right)
    assert not claims(op, V, left, cls((7, 7), HALF))
    assert not claims(op, *matrices(cls, 32, 7, dtype=torch.float64))
    assert not claims(op, *matrices(cls, 33, 7))  # in full float32
    assert claims(op, *matrices(cls, 64, 7, dtype=HALF)) and not claims(op, *matrices(cls, 65, 7, dtype=HALF))
    monkeypatch.setattr(kron_apply, "precision", lambda dtype: "tf32")
    assert claims(op, *matrices(cls, 64, 7))


def test_claims_of_rows() -> None:
    a, g = Rows((None, None, 2, 5)), Rows((None, None, 2, 300))
    bases = Orth((2, 5, 5)), Diag((2, 300))
    assert claims("grad_square", a, g) and claims("second_moment", a, g, *bases)
    values = FAMILIES["second_moment"].geometry(None, a, g, *bases)
    assert (values["turn_a"], values["turn_g"], values["hold_i"]) == ("before", "scale", 0)
    values = FAMILIES["second_moment"].geometry(None, a, Rows((None, 1, 2, 64)), Orth((2, 5, 5)), Orth((2, 64, 64)))
    assert (values["turn_a"], values["turn_g"], values["hold_i"], values["hold_o"]) == ("inside", "inside", 16, 64)
    assert not claims("grad_square", a, Rows((None, None, 2, 300), HALF))
    assert not claims("grad_square", Rows((None, None, 2, 5), torch.float64), g)
    assert not claims("grad_square", Rows((None, None, 2, None)), g)


def operands(o: int, i: int, groups: tuple[int, ...]) -> tuple[Tensor, ...]:
    V, left, right = kron_apply.operands(o, i, groups, torch.float64)
    return V, left, right, normal(*groups, o, i, seed=3).double().square() + 0.1


@pytest.mark.parametrize("groups", [(), (3,)])
def test_in_full_precision_the_parts_run_as_they_are(groups: tuple[int, ...]) -> None:
    """What no kernel is worth is the ops one by one: the same result from the same call."""
    V, left, right, S = operands(7, 5, groups)
    damping = torch.tensor(0.3, dtype=torch.float64) if not groups else torch.tensor([0.3, 0.1, 2.0]).double()
    U, dot = kron_apply.kron_apply_dot(V, left, right)
    torch.testing.assert_close(U, OPS["kron_apply"].reference(V, left, right))
    torch.testing.assert_close(dot, OPS["dot"].reference(U, V))
    U, dot = eig_apply.eig_apply(V, left, right, S, damping)
    inside = OPS["damped_divide"].reference(OPS["rotate"].reference(V, left, right), S, damping)
    torch.testing.assert_close(U, OPS["rotate_back"].reference(inside, left, right))
    torch.testing.assert_close(dot, OPS["dot"].reference(U, V))
