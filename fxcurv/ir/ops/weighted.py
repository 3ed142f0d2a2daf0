"""Weighted Grams: the partial traces of a layer's curvature, from the rows of both sides (TKFAC, Gao et al. 2021).

The Fisher block of pairs (a_n, g_n) is F = sum_n (g_n g_n^T) (x) (a_n a_n^T). Tracing out the output index leaves
sum_n |g_n|^2 a_n a_n^T, tracing out the input index sum_n |a_n|^2 g_n g_n^T: one op with its operands exchanged. One
operand of the product is scaled by rows, so nothing larger than the rows is formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from fxcurv.ir.op import Op
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.rules import accumulator, align, count_of, grouped, need_rows, promote
from fxcurv.ir.ops.statistics import ADDITIVE, ungroup, wide
from fxcurv.ir.types import Diag, Psd, Type


def _operands(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (G, b s, d) and their weights |w|^2 (G, b s, 1), in the accumulation type."""
    x, w = align(wide(x), wide(w))
    weights = w.square().sum(dim=3, keepdim=True)
    return x.flatten(0, 1).transpose(0, 1), weights.flatten(0, 1).transpose(0, 1)


def _weighted_gram(x: Tensor, w: Tensor) -> Tensor:
    """Sum over examples and positions of |w|^2 x x^T, Psd (d, d) or (G, d, d).

    x: Rows (b, s, G, d), w: Rows (b, s, G, m), of the same examples, positions and groups. The trace is
    sum |w|^2 |x|^2, whichever of the two is x.
    """
    rows, weights = _operands(x, w)
    return ungroup((rows * weights).mT @ rows)


def _weighted_diag_gram(x: Tensor, w: Tensor) -> Tensor:
    """Diagonal of ``weighted_gram``: sum of |w|^2 x^2, Diag (d,) or (G, d), never forming a matrix."""
    rows, weights = _operands(x, w)
    return ungroup((weights.mT @ rows.square()).squeeze(1))


def _infer(name: str, result: type[Type], copies: int) -> Callable[[Type, Type], Type]:
    def infer(x: Type, w: Type) -> Type:
        need_rows(name, ("x", x), ("w", w))
        groups, d = x.shape[2:]
        return result(grouped(groups, *(d,) * copies), accumulator(promote(x, w)))

    return infer


def _samples() -> Iterator[tuple[Tensor, Tensor]]:
    draw = Draw(71)
    for b, s, groups, d, m in ((5, 1, 1, 3, 2), (3, 4, 1, 2, 5), (3, 2, 4, 3, 2), (1, 1, 1, 1, 1), (0, 3, 1, 2, 2)):
        yield draw.normal(b, s, groups, d), draw.normal(b, s, groups, m)


weighted_gram = Op(
    "weighted_gram",
    "(Tensor x, Tensor w) -> Tensor",
    _weighted_gram,
    _infer("weighted_gram", Psd, 2),
    _samples,
    flops=lambda x, w: x.numel * (2.0 * count_of(x.shape[3]) + 1.0) + 2.0 * w.numel,
    traits=ADDITIVE,
)
weighted_diag_gram = Op(
    "weighted_diag_gram",
    "(Tensor x, Tensor w) -> Tensor",
    _weighted_diag_gram,
    _infer("weighted_diag_gram", Diag, 1),
    _samples,
    flops=lambda x, w: 3.0 * x.numel + 2.0 * w.numel,
    traits=ADDITIVE,
)
