"""Every shortcut equals the same statistic of the rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxcurv.layers.reductions  # noqa: F401  (registers them)
from fxcurv.ir.statistic import parse_statistic
from fxcurv.layers.blocks import BlockForm
from fxcurv.layers.conv import ConvForm
from fxcurv.layers.embedding import EmbeddingForm
from fxcurv.layers.linear import LinearForm
from fxcurv.layers.norm import NormForm
from fxcurv.layers.recurrence.products import SequenceForm
from fxcurv.layers.tap import REDUCTIONS, TapSpec


def conv(bias: bool = True, **options: object) -> ConvForm:
    from fxcurv.capture.captured import Captured
    from fxcurv.layers.detect import detect

    net = nn.Sequential(nn.Conv2d(3, 4, (3, 2), bias=bias, **options)).double()  # type: ignore[arg-type]
    captured = Captured(torch.fx.symbolic_trace(net).graph, "symbolic")
    form = detect(captured, net).layers[0].form
    assert isinstance(form, ConvForm)
    return form


def check(form: object, text: str, x: torch.Tensor, g: torch.Tensor, *states: torch.Tensor) -> None:
    expression = parse_statistic(text)
    spec = TapSpec(form, (expression,), 0, tuple(f"s{i}" for i in range(len(states))))  # type: ignore[arg-type]
    fast = spec.measure(0, x, g, states)
    saved = dict(REDUCTIONS)
    REDUCTIONS.clear()
    try:
        slow = spec.measure(0, x, g, states)
    finally:
        REDUCTIONS.update(saved)
    assert torch.allclose(fast.double(), slow.double(), rtol=1e-11, atol=1e-12) and fast.shape == slow.shape


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"padding": (2, 1), "padding_mode": "reflect"},
        {"dilation": 2, "padding": "same"},
        {"padding": 1, "padding_mode": "circular"},
    ],
)
def test_convolution(bias: bool, options: dict[str, object]):
    form = conv(bias, **options)
    x = torch.randn(5, 3, 7, 6, dtype=torch.float64)
    module = nn.Conv2d(3, 4, (3, 2), bias=bias, **options).double()  # type: ignore[arg-type]
    g = torch.randn_like(module(x))
    for text in ("gram(c.a)", "gram(c.g)", "count(c.a)", "row_sum(c.a)"):
        check(form, text, x, g)


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_embedding(padding: int | None, scale: float):
    torch.set_default_dtype(torch.float64)
    form = EmbeddingForm(1, 3, 6, False, (1, 0), (6, 3), scale, padding)
    x = torch.tensor([[0, 2, 2, 5], [1, 1, 1, 1], [2, 2, 2, 2]])
    g = torch.randn(3, 4, 3)
    basis = torch.linalg.qr(torch.randn(3, 3))[0]
    for text in ("diag_gram(e.a)", "row_sum(e.a)", "grad_square(e.a, e.g)", "gram(e.g)"):
        check(form, text, x, g)
    for text in ("weighted_diag_gram(e.a, e.g)", "weighted_gram(e.g, e.a)", "weighted_diag_gram(e.g, e.a)"):
        check(form, text, x, g)
    check(form, "second_moment(e.a, e.g, $s0, $s1)", x, g, torch.ones(6), basis)
    counted = TapSpec(form, (parse_statistic("count(e.a)"),)).measure(0, x, g, ())  # type: ignore[arg-type]
    assert float(counted) == (12 if padding is None else 6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kind", "shape", "weight", "more"),
    [
        ("layer_norm", (5, 3, 6), (6,), {}),
        ("layer_norm", (4, 2, 3), (2, 3), {}),
        ("rms_norm", (5, 6), (6,), {"scale": 0.5}),
        ("batch_norm", (5, 4, 3, 2), (4,), {}),
        ("batch_norm", (7, 4), (4,), {}),
        ("group_norm", (3, 4, 5), (4,), {"parts": 2}),
        ("instance_norm", (4, 5), (4,), {"rank": 2}),
    ],
)
def test_norm(kind: str, shape: tuple[int, ...], weight: tuple[int, ...], more: dict[str, object], bias: bool):
    groups = int(torch.tensor(weight).prod())
    form = NormForm(groups, 1, 1 + bias, bias, tuple(range(len(weight))), weight, kind=kind, **more)  # type: ignore[arg-type]
    x, g = torch.randn(shape, dtype=torch.float64) + 0.3, torch.randn(shape, dtype=torch.float64)
    check(form, "grad_gram(n.a, n.g)", x, g)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", [LinearForm, SequenceForm, BlockForm])
@pytest.mark.parametrize("shape", [(5, 4, 6), (1, 3, 6), (300, 1, 6), (2, 0, 6)])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_grams_of_loose_rows(make: type, shape: tuple[int, ...], bias: bool, scale: float):
    """No ones beside the rows, and none put in order: the same Gram as that of the rows."""
    common = {"groups": 1, "d_out": 3, "d_in": 6 + bias, "bias": bias, "permutation": (0, 1), "weight_shape": (3, 6)}
    inner = (LinearForm if make is BlockForm else make)(**common, scale=scale)
    form = BlockForm(**{**common, "d_out": 2}, inner=inner, start=1) if make is BlockForm else inner
    x = torch.randn(shape, dtype=torch.float64).transpose(0, 1) if make is SequenceForm else torch.randn(shape).double()
    g = torch.randn(*x.shape[:-1], 3, dtype=torch.float64)
    for side, rows in (("a", form.rows_a(x)), ("g", form.used_rows_g(x, g))):
        found = TapSpec(form, (parse_statistic(f"gram(l.{side})"),)).measure(0, x, g, ())  # type: ignore[arg-type]
        assert torch.allclose(found, torch.einsum("bsgi,bsgj->ij", rows, rows), rtol=1e-12, atol=1e-12)
    assert (form.loose_rows_a(x) is not None) == (scale == 1.0)


def test_loose_rows_of_unequal_sequences_are_refused():
    form = SequenceForm(1, 3, 7, True, (0, 1), (3, 6))
    assert form.loose_rows_a(torch.randn(4, 2, 6), torch.ones(4, 2)) is None
