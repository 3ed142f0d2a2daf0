"""DEFLATION: two Kronecker products, one after the other."""

from __future__ import annotations

from types import SimpleNamespace

from fxcurv.methods.kpsvd import TWO, corrected
from fxcurv.methods.method import Method
from fxcurv.methods.parts.top_kron import Deflated, rows_of
from fxcurv.methods.registry import published


@published("deflation", papers=(26,), iterations=20, **TWO)
def deflation(o: SimpleNamespace) -> Method:
    """DEFLATION: the sum of two Kronecker products that is nearest to a layer's Fisher block in Frobenius norm.

    F ~ R (x) S + R2 (x) S2: the first product is that of kpsvd, the second the best one of what the first leaves, by
    the same power iteration on Z - sigma u v^T. The two are the leading singular triplets of the rearranged block. With
    A = R + sqrt(damping) I, B = S + sqrt(damping) I, and the modes K, s of either side (K_A^T A K_A = I,
    K_A^T R2 K_A = diag(s_A), likewise K_B, s_B of B and S2) the direction is the exact inverse of their sum:

        (A (x) B + R2 (x) S2)^-1 vec(V):  U = K_B [ (K_B^T V K_A) ./ (1 + s_B s_A^T) ] K_A^T.

    The second term is symmetric, but indefinite. ``model.factors`` has R, S as "A", "G" and R2, S2 as "A2", "G2".

    - safeguard: where 1 + s_B s_A^T is not positive. "floor" takes at least ``floor`` (0.1) everywhere; "absolute"
      takes 1 + |s_B s_A^T|, which is no longer the inverse of the fitted sum; "drop" leaves the second term out where
      it is below the floor.
    - iterations, share, window, kernel: as in kpsvd; of every term.
    - damping_scheme: "sqrt", or one of kfac's that damp factors, "pi" and "replicated".

    Cost: kpsvd's fit twice and twice its memory; two eigendecompositions a side at each refresh where kpsvd inverts,
    and twice its products in a step. Choose it over kpsvd where one product leaves much (``fxcurv approx`` tells), and
    over lanczos where sigma1 is well above sigma2.

    Source: Koroko et al. 2022, algorithm DEFLATION. Defaults as in kpsvd; safeguard and floor are ours ("absolute" is
    the reference code's, in which the subtraction of the first term does not run).
    """
    return corrected(o, "deflation", Deflated(**rows_of(o), iterations=o.iterations))
