"""What a neighbour explains: the algebra of two correlated layers, beside that of chains and of two-term inverses.

Of vectors x and y with second moments E[x y^T] = C and E[y y^T] = D the best linear prediction of x from y is Psi y,
Psi = C D^-1, and E[Psi y (Psi y)^T] = Psi C^T is the part of E[x x^T] that y explains.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fxcurv.ir.op import Op
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.linalg import STACKABLE, symmetric
from fxcurv.ir.ops.rules import align, need, need_shape, promote
from fxcurv.ir.types import Mat, Psd, Type


def _explained(Psi: Tensor, C: Tensor) -> Tensor:
    """Psi C^T, exactly symmetric: the part of a second moment that a neighbour explains, Psd (d, d) or (G, d, d).

    Psi, C: Mat (d, e) or (G, d, e), Psi = C D^-1 for a positive definite D. Martens & Grosse 2015, section 4.3.
    """
    Psi, C = align(Psi, C)
    return symmetric(Psi @ C.mT)


def _infer(Psi: Type, C: Type) -> Psd:
    need("explained", "Psi", Psi, Mat)
    need_shape("explained", "C", need("explained", "C", C, Mat), Psi.shape)
    return Psd((*Psi.batch, Psi.shape[-2], Psi.shape[-2]), promote(Psi, C))


def _samples() -> Iterator[tuple[Tensor, Tensor]]:
    draw = Draw(76)
    for d, e, groups in ((3, 5, ()), (5, 2, ()), (1, 1, ()), (2, 3, (4,)), (3, 2, (3,))):
        C = draw.normal(*groups, d, e)
        yield C @ draw.psd(e, *groups), C


explained = Op(
    "explained",
    "(Tensor Psi, Tensor C) -> Tensor",
    _explained,
    _infer,
    _samples,
    flops=lambda Psi, C: 2.0 * Psi.numel * (Psi.shape[-2] or 1),
    traits=STACKABLE,
)
