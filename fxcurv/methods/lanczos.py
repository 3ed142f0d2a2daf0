"""LANCZOS: two Kronecker products at once."""

from __future__ import annotations

from types import SimpleNamespace

from fxcurv.methods.kpsvd import TWO, corrected
from fxcurv.methods.method import Method
from fxcurv.methods.parts.top_kron import Bidiagonal, rows_of
from fxcurv.methods.registry import published


@published("lanczos", papers=(26,), krylov=6, restarts=5, **TWO)
def lanczos(o: SimpleNamespace) -> Method:
    """LANCZOS: the two leading Kronecker products of a layer's Fisher block at once, by Golub-Kahan bidiagonalization.

    What is approximated, inverted and kept is as in deflation: F ~ R (x) S + R2 (x) S2, the two leading singular
    triplets of the rearranged block Z. They are found together, by Rayleigh and Ritz in Krylov spaces

        span{v, Z^T Z v, (Z^T Z)^2 v, ...}

    of few vectors, so that it does not matter how near sigma1 is to sigma2, and fewer products with Z are needed than
    by two power iterations. The first space starts from the sum of the tracked S and S2, each of norm 1; every further
    one from both Ritz vectors and the last residual.

    - krylov: vectors of a space, at least 3.
    - restarts: number of spaces; krylov + (restarts - 1) (krylov - 2) products with Z.
    - safeguard, floor, damping_scheme: as in deflation. share, window, kernel: as in kpsvd.

    Cost: 22 products with Z and its transpose by default where deflation takes 42; 2 krylov vectors of the size of the
    factors while it fits; an eigendecomposition of krylov x krylov for every space. Choose it over deflation where the
    singular values are close together.

    Source: Koroko et al. 2022, algorithm LANCZOS: there spaces of 2 vectors and at most 100 restarts (10 for
    convolutions) from the sum of both vectors. In such a restart a component along a third triplet does not shrink (to
    first order), so the thick restart and the numbers here are ours. Other defaults as in deflation.
    """
    return corrected(o, "lanczos", Bidiagonal(**rows_of(o), krylov=o.krylov, restarts=o.restarts))
