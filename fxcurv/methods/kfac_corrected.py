"""KFAC-CORRECTED: K-FAC, and the Kronecker product that it lacks most."""

from __future__ import annotations

from types import SimpleNamespace

from fxcurv.methods.kpsvd import TWO, corrected
from fxcurv.methods.method import Method
from fxcurv.methods.parts.top_kron import Correction, rows_of
from fxcurv.methods.registry import published


@published("kfac_corrected", papers=(26,), iterations=20, **TWO)
def kfac_corrected(o: SimpleNamespace) -> Method:
    """KFAC-CORRECTED: K-FAC's factors and one more Kronecker product, the best one for what K-FAC leaves of the Fisher.

    F ~ A (x) G + R2 (x) S2 with A = E[a a^T], G = E[g g^T] as in kfac, and R2, S2 the leading singular triplet of
    Z - vec(A) vec(G)^T, Z the rearranged block (see kpsvd). The second term is the largest part of the covariance of
    a a^T with g g^T, which K-FAC takes to be 0; the sum is inverted exactly, as in deflation:

        (A' (x) G' + R2 (x) S2)^-1 vec(V):  U = K_G [ (K_G^T V K_A) ./ (1 + s_G s_A^T) ] K_A^T,

    A' = A + sqrt(damping) I, G' = G + sqrt(damping) I. Never farther from F than K-FAC. ``model.factors`` has "A", "G"
    and R2, S2 as "A2", "G2".

    - share: A and G are those of the whole batch; the second term is fitted on a share of its examples, to what the
      K-FAC product of the same examples leaves.
    - safeguard, floor, damping_scheme: as in deflation. iterations, window, kernel: as in kpsvd.

    Cost: kfac's statistics and one fit of kpsvd; the solve as in deflation. Choose it over deflation to stay close to
    K-FAC, whose part follows every example; where the covariance is nothing it is K-FAC.

    Source: Koroko et al. 2022, algorithm KFAC-CORRECTED. Defaults as in deflation; the two samples are ours.
    """
    return corrected(o, "kfac_corrected", Correction(**rows_of(o), iterations=o.iterations))
