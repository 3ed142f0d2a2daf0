"""Linear products in every spelling, through both front-ends, against autograd in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.layers.check import FRONTENDS, Fn, assert_exact

pytestmark = pytest.mark.usefixtures("float64")

# name: (forward, parameter shapes, data shape, expected (groups, d_out, d_in))
SPELLINGS = {
    "F.linear": (lambda m, x: F.linear(x, m.w, m.b), {"w": (4, 3), "b": (4,)}, (5, 3), (1, 4, 4)),
    "F.linear keywords": (lambda m, x: F.linear(input=x, weight=m.w), {"w": (4, 3)}, (5, 3), (1, 4, 3)),
    "F.linear vector weight": (lambda m, x: F.linear(x, m.w), {"w": (3,)}, (5, 2, 3), (1, 1, 3)),
    "x @ w": (lambda m, x: x @ m.w, {"w": (3, 4)}, (5, 2, 3), (1, 4, 3)),
    "x @ w.T + b": (lambda m, x: x @ m.w.T + m.b, {"w": (4, 3), "b": (4,)}, (5, 3), (1, 4, 4)),
    "b + x @ w": (lambda m, x: m.b + x @ m.w, {"w": (3, 4), "b": (4,)}, (5, 2, 3), (1, 4, 4)),
    "x @ w.mT": (lambda m, x: torch.matmul(x, m.w.mT), {"w": (4, 3)}, (5, 3), (1, 4, 3)),
    "w @ x": (lambda m, x: m.w @ x, {"w": (4, 3)}, (3, 5), (1, 4, 3)),
    "w @ x batched + b": (lambda m, x: m.w @ x + m.b, {"w": (4, 3), "b": (4, 1)}, (2, 3, 5), (1, 4, 4)),
    "w @ vector": (lambda m, x: m.w @ x, {"w": (4, 3)}, (3,), (1, 4, 3)),
    "vector @ w": (lambda m, x: x @ m.w, {"w": (3, 4)}, (3,), (1, 4, 3)),
    "x @ vector weight": (lambda m, x: x @ m.w, {"w": (3,)}, (5, 2, 3), (1, 1, 3)),
    "square both ways": (lambda m, x: x @ m.w, {"w": (3, 3)}, (5, 3), (1, 3, 3)),
    "torch.mm": (lambda m, x: torch.mm(x, m.w), {"w": (3, 4)}, (5, 3), (1, 4, 3)),
    "mm left": (lambda m, x: torch.mm(m.w, x), {"w": (4, 3)}, (3, 5), (1, 4, 3)),
    "mv": (lambda m, x: torch.mv(m.w, x), {"w": (4, 3)}, (3,), (1, 4, 3)),
    "mv weight": (lambda m, x: torch.mv(x, m.w), {"w": (3,)}, (5, 3), (1, 1, 3)),
    "dot": (lambda m, x: torch.dot(x, m.w), {"w": (3,)}, (3,), (1, 1, 3)),
    "addmm": (lambda m, x: torch.addmm(m.b, x, m.w.t()), {"w": (4, 3), "b": (4,)}, (5, 3), (1, 4, 4)),
    "addmm alpha": (lambda m, x: torch.addmm(m.b, x, m.w, alpha=0.5), {"w": (3, 4), "b": (4,)}, (5, 3), (1, 4, 4)),
    "addmm left": (lambda m, x: torch.addmm(m.b, m.w, x), {"w": (4, 3), "b": (4, 1)}, (3, 5), (1, 4, 4)),
    "bmm": (lambda m, x: torch.bmm(x, m.w), {"w": (2, 3, 4)}, (2, 5, 3), (2, 4, 3)),
    "bmm bias": (lambda m, x: torch.bmm(x, m.w) + m.b, {"w": (2, 3, 4), "b": (2, 1, 4)}, (2, 5, 3), (2, 4, 4)),
    "bmm left": (lambda m, x: torch.bmm(m.w, x), {"w": (2, 4, 3)}, (2, 3, 5), (2, 4, 3)),
    "bmm expanded": (
        lambda m, x: torch.bmm(x, m.w.unsqueeze(0).expand(x.shape[0], -1, -1)),
        {"w": (3, 4)},
        (2, 5, 3),
        (1, 4, 3),
    ),
    "einsum": (lambda m, x: torch.einsum("bi,oi->bo", x, m.w), {"w": (4, 3)}, (5, 3), (1, 4, 3)),
    "einsum bias": (lambda m, x: torch.einsum("bi,oi->bo", x, m.w) + m.b, {"w": (4, 3), "b": (4,)}, (5, 3), (1, 4, 4)),
    "einsum implicit": (lambda m, x: torch.einsum("bi,io", x, m.w), {"w": (3, 4)}, (5, 3), (1, 4, 3)),
    "einsum ellipsis": (lambda m, x: torch.einsum("...i,oi->...o", x, m.w), {"w": (4, 3)}, (5, 2, 2, 3), (1, 4, 3)),
    "einsum first": (lambda m, x: torch.einsum("oi,bsi->bos", m.w, x), {"w": (4, 3)}, (5, 2, 3), (1, 4, 3)),
    "einsum heads": (lambda m, x: torch.einsum("bsd,hkd->bhsk", x, m.w), {"w": (2, 4, 3)}, (5, 6, 3), (1, 8, 3)),
    "einsum heads out": (lambda m, x: torch.einsum("bshk,hkd->bsd", x, m.w), {"w": (2, 4, 3)}, (5, 6, 2, 4), (1, 3, 8)),
    "einsum mixed in": (lambda m, x: torch.einsum("bkhs,hkd->sbd", x, m.w), {"w": (2, 4, 3)}, (5, 4, 2, 6), (1, 3, 8)),
    "einsum group": (lambda m, x: torch.einsum("bshi,hoi->bsho", x, m.w), {"w": (2, 4, 3)}, (5, 6, 2, 3), (2, 4, 3)),
    "einsum group last": (lambda m, x: torch.einsum("bhi,iho->boh", x, m.w), {"w": (3, 2, 4)}, (5, 2, 3), (2, 4, 3)),
    "einsum group bias": (
        lambda m, x: torch.einsum("bhi,hoi->bho", x, m.w) + m.b,
        {"w": (2, 4, 3), "b": (2, 4)},
        (5, 2, 3),
        (2, 4, 4),
    ),
    "einsum sum over data": (lambda m, x: torch.einsum("bsi,oi->bo", x, m.w), {"w": (4, 3)}, (5, 6, 3), (1, 4, 3)),
    "einsum broadcast group": (
        lambda m, x: torch.einsum("gni,gio->gno", x, m.w),
        {"w": (2, 3, 4)},
        (1, 5, 3),
        (2, 4, 3),
    ),
    "einsum vector": (lambda m, x: torch.einsum("i,oi->o", x, m.w), {"w": (4, 3)}, (3,), (1, 4, 3)),
    "tensordot": (lambda m, x: torch.tensordot(x, m.w, dims=1), {"w": (3, 2, 4)}, (5, 6, 3), (1, 8, 3)),
    "tensordot lists": (lambda m, x: torch.tensordot(x, m.w, ([-1], [1])), {"w": (4, 3)}, (5, 6, 3), (1, 4, 3)),
    "scaled": (lambda m, x: F.linear(x, 0.5 * m.w, m.b), {"w": (4, 3), "b": (4,)}, (5, 3), (1, 4, 4)),
    "divided": (lambda m, x: x @ (-m.w / 4), {"w": (3, 4)}, (5, 3), (1, 4, 3)),
    "viewed heads": (
        lambda m, x: torch.einsum("bd,hkd->bhk", x, m.w.view(2, 4, 3)),
        {"w": (8, 3)},
        (5, 3),
        (1, 8, 3),
    ),
    "viewed group": (
        lambda m, x: torch.einsum("bhi,hoi->bho", x, m.w.view(2, 4, 3)),
        {"w": (8, 3)},
        (5, 2, 3),
        (2, 4, 3),
    ),
    "flattened": (lambda m, x: F.linear(x, m.w.flatten(1)), {"w": (4, 3, 2)}, (5, 6), (1, 4, 6)),
    "permuted": (lambda m, x: F.linear(x, m.w.permute(2, 0, 1).reshape(2, 12)), {"w": (4, 3, 2)}, (5, 12), (1, 2, 12)),
    "one input": (lambda m, x: F.linear(x, m.w, m.b), {"w": (4, 1), "b": (4,)}, (5, 1), (1, 4, 2)),
    "one output": (lambda m, x: F.linear(x, m.w, m.b), {"w": (1, 3), "b": (1,)}, (5, 3), (1, 1, 4)),
    "leading ones in b": (lambda m, x: x @ m.w + m.b, {"w": (3, 4), "b": (1, 1, 4)}, (5, 2, 3), (1, 4, 4)),
    "in place after": (lambda m, x: torch.relu_(F.linear(x, m.w, m.b)), {"w": (4, 3), "b": (4,)}, (5, 2, 3), (1, 4, 4)),
}


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name, frontend):
    function, shapes, data, expected = SPELLINGS[name]
    detection = assert_exact(Fn(function, **shapes), torch.randn(data), frontend=frontend)
    assert len(detection.layers) == 1
    assert detection.layers[0].kind == "linear"
    assert detection.layers[0].shape == expected
    assert not detection.uncovered


STACKS = {
    "stack": (lambda m, x: x @ m.w, {"w": (2, 3, 4)}, (5, 2, 6, 3), (2, 4, 3)),
    "stack, data without group": (lambda m, x: x @ m.w, {"w": (2, 3, 4)}, (6, 3), (1, 8, 3)),
    "stack, vector": (lambda m, x: x @ m.w, {"w": (2, 3, 4)}, (3,), (1, 8, 3)),
    "stack left": (lambda m, x: m.w @ x, {"w": (2, 4, 3)}, (5, 2, 3, 6), (2, 4, 3)),
    "stack of two axes": (lambda m, x: x @ m.w, {"w": (2, 3, 4, 5)}, (7, 2, 3, 6, 4), (6, 5, 4)),
}


@pytest.mark.parametrize("name", STACKS)
def test_stack_of_matrices_with_known_shapes(name):
    function, shapes, data, expected = STACKS[name]
    detection = assert_exact(Fn(function, **shapes), torch.randn(data), shapes=True)
    assert detection.layers[0].shape == expected


@pytest.mark.parametrize("frontend, shape", [
    *((frontend, shape) for frontend in FRONTENDS for shape in [(3,), (5, 3), (5, 2, 3), (5, 2, 4, 3)]),
    ("symbolic", (0, 3)),  # export refuses an empty batch
])  # fmt: skip
@pytest.mark.parametrize("bias", [True, False])
def test_module(frontend, shape, bias):
    model = nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Tanh())
    detection = assert_exact(model, torch.randn(shape), frontend=frontend)
    (layer,) = detection.layers
    assert (layer.name, layer.kind, layer.weight) == ("0", "linear", "0.weight")
    assert layer.bias == ("0.bias" if bias else None)
    rows = layer.form.rows_a(torch.randn(shape))
    assert rows.shape == (*(shape[:-1][:1] or (1,)), math.prod(shape[1:-1]) if len(shape) > 1 else 1, 1, 3 + bias)


def test_equal_rows_have_equal_tags():
    def forward(m, x):
        heads = torch.einsum("bsd,hkd->bshk", x, m.q)
        return heads.flatten(2) + F.linear(x, m.k) + torch.einsum("bsd,de->bse", x, m.v) + F.linear(x, m.o, m.b)

    detection = assert_exact(Fn(forward, q=(2, 4, 3), k=(8, 3), v=(3, 8), o=(8, 3), b=(8,)), torch.randn(5, 6, 3))
    keys = {layer.name: layer.input_key for layer in detection.layers}
    assert keys["q"] == keys["k"] == keys["v"] != keys["o"]
