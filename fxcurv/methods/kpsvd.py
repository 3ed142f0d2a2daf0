"""KPSVD: the Kronecker product nearest to the Fisher, and what its three variants share."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from fxcurv.errors import FxcurvError
from fxcurv.methods.method import Estimate, Method, Source
from fxcurv.methods.parts.rescale import rescaling
from fxcurv.methods.parts.schemes import FACTORED, SCHEMES, scheme
from fxcurv.methods.parts.scope import Layers
from fxcurv.methods.parts.top_kron import OneTerm, TwoTerms, rows_of
from fxcurv.methods.parts.track import Reached
from fxcurv.methods.registry import published

FITTED: dict[str, Any] = {
    "fisher": "mc",
    "fisher_samples": 1,
    "share": 0.25,
    "window": 2,
    "kernel": "triangular",
    "damping": 1e-3,
    "damping_scheme": "sqrt",
    "ema": 0.95,
    "kl_clip": 1e-2,
    "rescale": "kl",
    "factor_every": 100,
    "solve_every": 100,
}
"""Hyper-parameters of every method that fits Kronecker products."""

TWO: dict[str, Any] = {**FITTED, "safeguard": "floor", "floor": 0.1}
"""Those of the methods with two terms."""


def fitted(o: SimpleNamespace, name: str, estimate: Estimate, schemes: Collection[str] = tuple(SCHEMES)) -> Method:
    """K-FAC's algorithm with another estimate of the factors, and one of these damping schemes."""
    damp, solve = scheme(o.damping_scheme, schemes)
    return Method(
        name=name,
        source=Source(o.fisher, o.fisher_samples),
        scope=Layers(),
        estimate=estimate,
        track=Reached(),
        damp=damp,
        solve=solve,
        rescale=rescaling(o),
    )


def corrected(o: SimpleNamespace, name: str, estimate: Estimate) -> Method:
    """The same with a second term beside the damped factors; raises :class:`FxcurvError` for a floor of 0."""
    if not o.floor > 0:
        raise FxcurvError(f"floor={o.floor} must be above 0: the sum of two terms would have no inverse there.")
    method = fitted(o, name, estimate, FACTORED)
    return replace(method, solve=TwoTerms(o.safeguard), hyper={"floor": o.floor})


@published("kpsvd", papers=(26,), iterations=20, **FITTED)
def kpsvd(o: SimpleNamespace) -> Method:
    """KPSVD: the one Kronecker product that is nearest to a layer's Fisher block in Frobenius norm.

    K-FAC swaps E[(a a^T) (x) (g g^T)] for E[a a^T] (x) E[g g^T]; here the left side itself is approximated by R (x) S.
    Rearranged, Z = E[vec(a a^T) vec(g g^T)^T], the best product is Z's leading singular triplet sigma, u, v, found by
    a power iteration on rows, without Z:

        u = Z v / |Z v|,      Z v = E[(g^T mat(v) g) vec(a a^T)],
        v = Z^T u / |Z^T u|,  Z^T u = E[(a^T mat(u) a) vec(g g^T)],
        R = sqrt(sigma) mat(u),  S = sqrt(sigma) mat(v),  sigma = |Z^T u|.

    Both are positive semidefinite, since it starts so: from the tracked S, at first from the identity (half an
    iteration from there gives an R in proportion to TKFAC's). The direction is
    U = (S + sqrt(damping) I)^-1 V (R + sqrt(damping) I)^-1. ``model.factors`` has R as "A" and S as "G".

    - iterations: of the power method, a fixed number, so that no step waits for the device; the error falls by
      (sigma2 / sigma1)^2 in each.
    - share: of the examples of a batch, evenly spaced, from which the products are fitted.
    - window: positions t, t' of one example (pixels in flat order, steps, tokens) are correlated up to this distance
      and enter as sum k(|t - t'|) (a_t a_t'^T) (x) (g_t g_t'^T); 0 takes positions as examples, as kfac does.
    - kernel: "triangular", k(d) = 1 - d / (window + 1), which keeps R and S positive semidefinite, or "hard", k = 1,
      where their negative eigenvalues are cut off. sharing="reduce" sums g and averages a over positions first.
    - damping_scheme: "sqrt" (no pi), or any other of kfac.

    Embeddings, layers with a side wider than max_factor_dim and weights used in both roles get K-FAC's factors; norm
    layers keep exact unit-wise blocks.

    Cost: rows are kept until the step. An iteration on n rows takes 4 n (window + 1) (d_in^2 + d_out^2) operations, or
    4 n^2 by the inner products of the rows where that is less (one position, or window 0); memory and inverses as kfac.
    Choose it over kfac where |a| and |g| are correlated, and batches are small beside the layers.

    Source: Koroko et al. 2022, algorithm KPSVD; share, ema, kl_clip and the periods of 100 steps are the paper's, as is
    a weight decay of 1e-3, which is left to the user here. Its clip has no lr^2, min(1, sqrt(0.01 / |sum <U, V>|)),
    which is kl_clip = 0.01 lr^2 here. window=2 is its reference code's for 3 x 3 kernels, min(kernel) - 1, there hard;
    the triangular kernel, 20 iterations in place of a test for convergence, and the damping are ours.
    """
    return fitted(o, "kpsvd", OneTerm(**rows_of(o), iterations=o.iterations))
