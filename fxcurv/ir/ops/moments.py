"""Second moments of the gradients of single examples: what EKFAC, diagonal and unit-wise methods measure.

An example's gradient is a sum over its positions, so positions are summed *before* the square. Examples are
taken in chunks: for a convolution the per-example gradients of a batch would be larger than the network.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fxcurv.ir.op import Op
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.rules import accumulator, align, count_of, grouped, need_rows, need_square, promote, times
from fxcurv.ir.ops.statistics import ADDITIVE, ungroup, wide
from fxcurv.ir.types import Diag, Mat, Orth, Psd, Type

CHUNK = 1 << 21
"""Most elements of the per-example gradients that exist at one time."""


def _pair_samples() -> Iterator[tuple[Tensor, Tensor]]:
    draw = Draw(2)
    for b, s, groups, i, o in ((5, 1, 1, 3, 2), (3, 4, 1, 2, 5), (3, 2, 4, 3, 2), (1, 1, 1, 1, 1), (4, 1, 3, 2, 3)):
        yield draw.normal(b, s, groups, i), draw.normal(b, s, groups, o)


def per_example(a: Tensor, g: Tensor) -> Iterator[Tensor]:
    """Gradients sum_s g a^T of one example each, (chunk, G, o, i), in chunks of at most ``CHUNK`` elements."""
    size = g.shape[2] * g.shape[3] * a.shape[3]
    step = max(1, CHUNK // max(1, size))
    a, g = align(wide(a), wide(g))
    for a_part, g_part in zip(a.split(step), g.split(step), strict=True):
        yield torch.einsum("bsgo,bsgi->bgoi", g_part, a_part)


def _zeros(a: Tensor, g: Tensor, *shape: int) -> Tensor:
    return a.new_zeros(shape, dtype=accumulator(torch.promote_types(a.dtype, g.dtype)))


def _grad_square(a: Tensor, g: Tensor) -> Tensor:
    """Sum over examples of the squared gradients of single examples, (o, i) or (G, o, i).

    sum_b (sum_s g a^T)^2 elementwise: the diagonal of the Fisher in the parameters' own basis.
    a: (b, s, G, i), g: (b, s, G, o). With one position this is (g^2)^T (a^2) and no example's gradient is formed.
    """
    if a.shape[1] == 1:
        a, g = align(wide(a), wide(g))
        return ungroup(torch.einsum("bsgo,bsgi->goi", g.square(), a.square()))
    total = _zeros(a, g, g.shape[2], g.shape[3], a.shape[3])
    for gradient in per_example(a, g):
        total = total + gradient.square().sum(dim=0)
    return ungroup(total)


def turn(rows: Tensor, basis: Tensor) -> Tensor:
    """Rows in another basis, Q^T r; a diagonal ``basis`` scales (ones: the identity)."""
    x = wide(rows)
    basis = basis.to(x.dtype)
    groups = x.shape[2]
    if basis.ndim == (2 if groups > 1 else 1):
        return x * basis
    return torch.einsum("bsgd,gde->bsge", x, basis if groups > 1 else basis.unsqueeze(0))


def _second_moment(a: Tensor, g: Tensor, QA: Tensor, QG: Tensor) -> Tensor:
    """Sum over examples of (sum_s (QG^T g)(QA^T a)^T)^2 elementwise, Mat (o, i) or (G, o, i).

    The eigenvalues of EKFAC in the Kronecker eigenbasis, before division by the count (George et al. 2018):
    positions are summed before the square. a: (b, s, G, i), g: (b, s, G, o); QA, QG: Orth, or Diag (ones: identity).
    """
    return _grad_square(turn(a, QA), turn(g, QG))


def _infer_pair(name: str, a: Type, g: Type) -> Type:
    need_rows(name, ("a", a), ("g", g))
    return Mat(grouped(a.shape[2], g.shape[3], a.shape[3]), accumulator(promote(a, g)))


def _infer_second_moment(a: Type, g: Type, QA: Type, QG: Type) -> Type:
    result = _infer_pair("second_moment", a, g)
    for operand, basis, rows in (("QA", QA, a), ("QG", QG, g)):
        need_square("second_moment", operand, basis, rows.shape[3], grouped(rows.shape[2]), Orth)
    return result


def _second_moment_samples() -> Iterator[tuple[Tensor, ...]]:
    draw = Draw(3)
    for a, g in _pair_samples():
        groups = a.shape[2:3] if a.shape[2] > 1 else ()
        i, o = a.shape[3], g.shape[3]
        ones_a, ones_g = a.new_ones(*groups, i), g.new_ones(*groups, o)
        yield a, g, draw.orth(i, *groups), draw.orth(o, *groups)
        yield a, g, ones_a, draw.orth(o, *groups)
        yield a, g, ones_a, ones_g


def _outer_flops(a: Type, g: Type) -> float:
    return 2.0 * a.numel * count_of(g.shape[3])


def _basis_flops(rows: Type, basis: Type) -> float:
    return rows.numel * (1.0 if isinstance(basis, Diag) else 2.0 * count_of(rows.shape[3]))


second_moment = Op(
    "second_moment",
    "(Tensor a, Tensor g, Tensor QA, Tensor QG) -> Tensor",
    _second_moment,
    _infer_second_moment,
    _second_moment_samples,
    flops=lambda a, g, QA, QG: _outer_flops(a, g) + _basis_flops(a, QA) + _basis_flops(g, QG),
    traits=ADDITIVE,
)
grad_square = Op(
    "grad_square",
    "(Tensor a, Tensor g) -> Tensor",
    _grad_square,
    lambda a, g: _infer_pair("grad_square", a, g),
    _pair_samples,
    flops=_outer_flops,
    traits=ADDITIVE,
)


def _grad_gram(a: Tensor, g: Tensor) -> Tensor:
    """Sum over examples of vec(E) vec(E)^T with E = sum_s g a^T, Psd (o i, o i) or (G, o i, o i), vec row-major.

    The exact block of a small layer (unit-wise scale and shift of a norm; Osawa et al. 2020).
    a: (b, s, G, i), g: (b, s, G, o).
    """
    size = g.shape[3] * a.shape[3]
    total = _zeros(a, g, g.shape[2], size, size)
    for gradient in per_example(a, g):
        flat = gradient.flatten(2).transpose(0, 1)
        total = total + flat.mT @ flat
    return ungroup(total)


def _infer_grad_gram(a: Type, g: Type) -> Type:
    need_rows("grad_gram", ("a", a), ("g", g))
    size = times(g.shape[3], a.shape[3])
    return Psd(grouped(a.shape[2], size, size), accumulator(promote(a, g)))


def _grad_gram_flops(a: Type, g: Type) -> float:
    b, _, groups, i = a.shape
    return _outer_flops(a, g) + 2.0 * count_of(b) * count_of(groups) * count_of(times(g.shape[3], i)) ** 2


grad_gram = Op(
    "grad_gram",
    "(Tensor a, Tensor g) -> Tensor",
    _grad_gram,
    _infer_grad_gram,
    _pair_samples,
    flops=_grad_gram_flops,
    traits=ADDITIVE,
)
