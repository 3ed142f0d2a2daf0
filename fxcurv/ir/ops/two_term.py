"""Inverse of a sum of two Kronecker products by simultaneous diagonalisation of either side.

For positive definite D_A, D_G and symmetric C_A, C_G with D^-1/2 C D^-1/2 = E diag(s) E^T and K = D^-1/2 E,

    (D_A (x) D_G + sign C_A (x) C_G)^-1 vec(V) = vec( K_G [ (K_G^T V K_A) / (1 + sign s_G s_A^T) ] K_A^T ).

The sum may be indefinite: then some 1 + sign s_G s_A^T are not positive, and a safeguard has to say what to do there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import Op
from fxcurv.ir.ops.chain import whitened
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.linalg import STACKABLE, decompose, symmetric
from fxcurv.ir.ops.rules import accumulator, need, need_scalar, need_shape, promote, spread
from fxcurv.ir.types import Mat, Psd, Sym, Type, Vec

SAFEGUARDS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "floor": lambda x, floor: torch.maximum(1.0 + x, floor),
    "absolute": lambda x, floor: 1.0 + x.abs(),
    "drop": lambda x, floor: torch.where(1.0 + x < floor, 1.0, 1.0 + x),
}
"""What stands for 1 + x, x = sign s_G s_A^T: at least the floor; with every eigenvalue of the second term taken as
positive (then the sign of the correction is lost); or 1 where it is below the floor (there without the second term)."""


def _pencil_modes(D: Tensor, C: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """(K, s) of one side: K^T (D + damping I) K = I and K^T C K = diag(s), s ascending. NaN where D is not positive.

    D: Psd (d, d) or (G, d, d), C: Sym like it, s: Vec (d,) or (G, d); damping: number, Scalar or one a group.
    """
    wide = accumulator(D.dtype)
    half, _, middle = whitened(D.to(wide), C.to(wide), damping)
    values, vectors = decompose(symmetric(middle))
    return (half @ vectors).to(D.dtype).contiguous(), values.to(D.dtype)


def _two_term_gain(sG: Tensor, sA: Tensor, floor: Tensor, sign: int = 1, safeguard: str = "floor") -> Tensor:
    """1 / (1 + sign sG sA^T), Mat (o, i) or (G, o, i): the middle factor of the inverse of a sum of Kronecker products.

    sG: Vec (o,), sA: Vec (i,), each with a leading G; floor: number or Scalar. safeguard, for what is not positive:
    "floor" takes at least ``floor``, "absolute" 1 + |sG sA^T|, "drop" 1 where it is below ``floor``.
    """
    x = sign * sG.unsqueeze(-1) * sA.unsqueeze(-2)
    least = spread(torch.as_tensor(floor, device=x.device), x).to(x.dtype)
    return 1.0 / SAFEGUARDS[safeguard](x, least)


def _infer_modes(D: Type, C: Type, damping: Any) -> tuple[Type, Type]:
    need("pencil_modes", "D", D, Psd)
    need_shape("pencil_modes", "C", need("pencil_modes", "C", C, Sym), D.shape)
    need_scalar("pencil_modes", "damping", damping, D.batch)
    return Mat(D.shape, D.dtype), Vec(D.shape[:-1], D.dtype)


def _infer_gain(sG: Type, sA: Type, floor: Any, sign: int = 1, safeguard: str = "floor") -> Type:
    need("two_term_gain", "sG", sG, Vec)
    need_shape("two_term_gain", "sA", need("two_term_gain", "sA", sA, Vec), (*sG.batch, sA.shape[-1]))
    need_scalar("two_term_gain", "floor", floor)
    if sign not in (-1, 1) or safeguard not in SAFEGUARDS:
        known = ", ".join(SAFEGUARDS)
        raise FxcurvError(f"op 'two_term_gain' takes a sign of -1 or 1 and one of {known}; got {sign}, '{safeguard}'.")
    return Mat((*sG.shape, sA.shape[-1]), promote(sG, sA))


def _mode_samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(74)
    for d, groups in ((1, ()), (5, ()), (9, ()), (3, (4,)), (3, (3,))):
        yield draw.psd(d, *groups), symmetric(draw.normal(*groups, d, d)), draw.number(0.1)
    yield draw.psd(3, 2), symmetric(draw.normal(2, 3, 3)), draw.number(0.1, 2)


def _gain_samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(75)
    for groups, o, i in (((), 3, 5), ((), 1, 1), ((4,), 3, 2)):
        for safeguard in SAFEGUARDS:
            for sign in (1, -1):
                yield draw.normal(*groups, o), draw.normal(*groups, i), draw.number(0.1), sign, safeguard


pencil_modes = Op(
    "pencil_modes",
    "(Tensor D, Tensor C, Tensor damping) -> (Tensor, Tensor)",
    _pencil_modes,
    _infer_modes,
    _mode_samples,
    flops=lambda D, C, damping: 28.0 * D.numel * (D.shape[-1] or 1),
    traits=STACKABLE,
)
two_term_gain = Op(
    "two_term_gain",
    '(Tensor sG, Tensor sA, Tensor floor, int sign=1, str safeguard="floor") -> Tensor',
    _two_term_gain,
    _infer_gain,
    _gain_samples,
    flops=lambda sG, sA, floor, sign=1, safeguard="floor": 4.0 * sG.numel * (sA.shape[-1] or 1),
)
