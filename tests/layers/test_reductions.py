"""Every shortcut equals the same statistic of the rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxcurv.ir.statistic import parse_statistic
from fxcurv.layers.conv import ConvForm
from fxcurv.layers.embedding import EmbeddingForm
from fxcurv.layers.reductions import _sum_of_products
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
    for text in ("gram(c.a)", "gram(c.g)", "count(c.a)"):
        check(form, text, x, g)


def test_products_of_columns_in_batches():
    columns = torch.randn(7, 700, 3, dtype=torch.float64)
    assert torch.allclose(_sum_of_products(columns), torch.einsum("bdp,bep->de", columns, columns))
    columns = torch.randn(7, 1100, 3, dtype=torch.float64)
    assert torch.allclose(_sum_of_products(columns), torch.einsum("bdp,bep->de", columns, columns))


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_embedding(padding: int | None, scale: float):
    torch.set_default_dtype(torch.float64)
    form = EmbeddingForm(1, 3, 6, False, (1, 0), (6, 3), scale, padding)
    x = torch.tensor([[0, 2, 2, 5], [1, 1, 1, 1], [2, 2, 2, 2]])
    g = torch.randn(3, 4, 3)
    basis = torch.linalg.qr(torch.randn(3, 3))[0]
    for text in ("diag_gram(e.a)", "grad_square(e.a, e.g)", "gram(e.g)"):
        check(form, text, x, g)
    check(form, "second_moment(e.a, e.g, $s0, $s1)", x, g, torch.ones(6), basis)
    counted = TapSpec(form, (parse_statistic("count(e.a)"),)).measure(0, x, g, ())  # type: ignore[arg-type]
    assert float(counted) == (12 if padding is None else 6)
