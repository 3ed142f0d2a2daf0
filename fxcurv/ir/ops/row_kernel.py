"""The kernel matrix of per-example gradients: their inner products, without forming one of them.

Methods that solve in the space of examples (SENG, HyLo, Sherman-Morrison-Woodbury natural gradients, Gram-Gauss-Newton)
need K[m, n] = <E_m, E_n> with E_m = sum_s g_ms a_ms^T, the gradient of example m. It is the Gram matrix of a Khatri-Rao
product of the rows. It is not additive: examples of two batches have products with one another.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fxcurv.ir.op import Op
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.rules import accumulator, align, count_of, grouped, need_rows, promote
from fxcurv.ir.ops.statistics import ungroup, wide
from fxcurv.ir.types import Psd, Type


def _row_kernel(a: Tensor, g: Tensor) -> Tensor:
    """K[m, n] = sum over positions s, t of (a_ms . a_nt)(g_ms . g_nt): the inner products of per-example gradients.

    a: Rows (b, s, G, i), g: Rows (b, s, G, o) -> Psd (b, b), or (G, b, b) for groups. With one position it is the
    Hadamard product (a a^T) * (g g^T); with several, products of different positions count (sums over each example's
    positions alone, sum_s (a_ms . a_ns)(g_ms . g_ns), would be wrong). Not divided by anything. Ren & Goldfarb 2019;
    Mu et al. 2022 (HyLo); Cai et al. 2019 (Gram-Gauss-Newton).
    """
    b, s, groups = a.shape[:3]
    left, right = align(wide(a), wide(g))
    x, y = (rows.permute(2, 0, 1, 3).reshape(groups, b * s, rows.shape[3]) for rows in (left, right))
    products = (x @ x.mT) * (y @ y.mT)
    return ungroup(products.reshape(groups, b, s, b, s).sum(dim=(2, 4)))


def _infer_row_kernel(a: Type, g: Type) -> Type:
    need_rows("row_kernel", ("a", a), ("g", g))
    examples, _, groups, _ = a.shape
    return Psd(grouped(groups, examples, examples), accumulator(promote(a, g)))


def _samples() -> Iterator[tuple[Tensor, Tensor]]:
    draw = Draw(40)
    for b, s, groups, i, o in ((5, 1, 1, 3, 2), (2, 7, 1, 4, 3), (3, 2, 5, 2, 1), (1, 1, 1, 1, 1), (4, 3, 2, 1, 6)):
        yield draw.normal(b, s, groups, i), draw.normal(b, s, groups, o)


def _flops(a: Type, g: Type) -> float:
    b, s, groups, i = a.shape
    rows = count_of(b) * count_of(s)
    return 2.0 * count_of(groups) * rows * rows * (count_of(i) + count_of(g.shape[3]) + 1)


row_kernel = Op("row_kernel", "(Tensor a, Tensor g) -> Tensor", _row_kernel, _infer_row_kernel, _samples, _flops)
