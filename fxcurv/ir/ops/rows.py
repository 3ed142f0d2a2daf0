"""A layer's gradient kept as rows: V = sum over rows of g x^T, with the gradient of a bias as its last column.

With n rows, ``L^T V R`` can be had as ``(g L)^T (x R)``: n (o^2 + i^2) products in place of o i (o + i), and V itself
is never formed. The pass ``order`` writes these ops where that is less.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fxcurv.ir.op import Op
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.rules import align, need, need_rows, need_shape, need_square, promote
from fxcurv.ir.types import Mat, Orth, Psd, Rows, Sym, Tri, Type


def _row_product(g: Tensor, x: Tensor) -> Tensor:
    """A weight's gradient, the sum over examples and positions of g x^T -> Mat (o, i).

    g: Rows (b, s, 1, o); x: Rows (b, s, 1, i).
    """
    g, x = align(g, x)
    return g.flatten(0, 2).mT @ x.flatten(0, 2)


def _sides_rows(g: Tensor, x: Tensor, v: Sequence[Tensor], left: Sequence[Tensor], right: Tensor) -> Tensor:
    """L^T [sum g x^T, v] R -> Mat (o, i), the gradient given by its rows.

    g: Rows (b, s, 1, o); x: Rows (b, s, 1, i - len(v)); v: none, or the gradient of the bias with o elements; left:
    none (the identity) or L (o, o); right: R (i, i). With symmetric sides it is ``kron_apply``, with orthogonal ones
    ``rotate``.
    """
    V, right = align(_row_product(g, x), right)
    if v:
        V = torch.cat([V, v[0].to(V.dtype).reshape(-1, 1)], dim=1)
    return (left[0].to(V.dtype).mT @ V if left else V) @ right


def _infer_row_product(g: Type, x: Type) -> Type:
    need_rows("row_product", ("g", g), ("x", x))
    return Mat((g.shape[3], x.shape[3]), promote(g, x))


def _infer_sides_rows(g: Type, x: Type, v: Sequence[Type], left: Sequence[Type], right: Type) -> Type:
    need_rows("sides_rows", ("g", g), ("x", x))
    outputs, inputs = g.shape[3], (x.shape[3] or 0) + len(v)
    for given in v:
        need("sides_rows", "v", given, Type)
        need_shape("sides_rows", "v", given, (outputs,))
    for given in left:
        need("sides_rows", "left", given, Sym, Orth, Tri)
        need_square("sides_rows", "left", given, outputs, (), Sym, Orth, Tri)
    need("sides_rows", "right", right, Sym, Orth, Tri)
    need_square("sides_rows", "right", right, inputs, (), Sym, Orth, Tri)
    return Mat((outputs, inputs), promote(g, x, *v, *left, right))


SHAPES = ((5, 1, 3, 4), (2, 3, 4, 3), (1, 1, 1, 1), (0, 1, 2, 3), (40, 1, 3, 2))  # examples, positions, o, i


def _pairs() -> Iterator[tuple[Any, ...]]:
    draw = Draw(41)
    for b, s, o, i in SHAPES:
        yield draw.normal(b, s, 1, o), draw.normal(b, s, 1, i)


def _samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(42)
    for g, x in _pairs():
        o, i = g.shape[3], x.shape[3]
        yield g, x, [], [draw.psd(o)], draw.psd(i)
        yield g, x, [draw.normal(o)], [draw.orth(o)], draw.orth(i + 1)
        yield g, x, [draw.normal(o)], [], draw.psd(i + 1)


row_product = Op(
    "row_product",
    "(Tensor g, Tensor x) -> Tensor",
    _row_product,
    _infer_row_product,
    _pairs,
    flops=lambda g, x: 2.0 * g.numel * (x.shape[3] or 1),
)


def _flops(g: Rows, x: Rows, v: Sequence[Type], left: Sequence[Psd], right: Psd) -> float:
    """Of the order of products that takes fewer."""
    n, o, i = float(g.numel // (g.shape[3] or 1)), g.shape[3] or 1, right.shape[-1] or 1
    product = n * o * i
    sides = min(n * i * i, o * i * i) if not left else min(n * (o * o + i * i), float(o * i * (o + i)))
    return 2.0 * (product + sides)


sides_rows = Op(
    "sides_rows",
    "(Tensor g, Tensor x, Tensor[] v, Tensor[] left, Tensor right) -> Tensor",
    _sides_rows,
    _infer_sides_rows,
    _samples,
    flops=_flops,
)
