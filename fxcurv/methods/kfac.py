"""K-FAC: one Kronecker product a layer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fxcurv.methods.method import Method, Source
from fxcurv.methods.parts.patches import patches
from fxcurv.methods.parts.rescale import rescaling
from fxcurv.methods.parts.schemes import FACTORED, SCHEMES, scheme
from fxcurv.methods.parts.track import EMA
from fxcurv.methods.parts.tridiagonal import blocks
from fxcurv.methods.registry import published

FAMILY: dict[str, Any] = {
    "fisher": "mc",
    "fisher_samples": 1,
    "damping": 1e-3,
    "damping_scheme": "pi",
    "trace_floor": 1e-3,
    "ema": 0.95,
    "kl_clip": 1e-3,
    "rescale": "kl",
}
"""Hyper-parameters of K-FAC that its next relatives have too."""


@published(
    "kfac",
    papers=(1, 2),
    **FAMILY,
    blocks="diagonal",
    spatial="correlated",
    position_every=1,
)
def kfac(o: SimpleNamespace) -> Method:
    """K-FAC: the Fisher block of a layer is the Kronecker product of its input and output-gradient second moments.

    For a layer s = W a the block is approximated by kron(G, A), A = E[a a^T], G = E[g g^T], g the gradient at s for a
    label sampled from the model; the direction is U = (G + sqrt(damping)/pi I)^-1 V (A + pi sqrt(damping) I)^-1 with
    pi^2 = (tr A / dim A) / (tr G / dim G). Convolutions use patches (KFC); norm layers keep exact unit-wise blocks.

    - damping_scheme: "pi" as above; "sqrt", pi = 1; "replicated", pi^2 = 1/T with T rows (positions) a loss term, that
      is pi = 1 for factors that are both averaged over positions; or of the whole block, in its eigenbasis with
      eigenvalues e = e_G e_A^T: "eigenvalue", e + damping; "floor", max(e, damping); "relative", e + damping times the
      mean of e (at least trace_floor / dim e); "mask", e + damping and no step along directions with e < 1e-10 max e.
    - rescale: "kl", all directions times min(1, sqrt(kl_clip / (lr^2 sum <U, V>))); "trust", the same with 2 kl_clip;
      "match", the joint norm of the gradient; "graft", each layer's; "none".

    - blocks: "diagonal" as above; "tridiagonal" keeps the correlation of neighbouring layers too, kron(G_ij, A_ij) with
      A_ij = E[a_i a_j^T], G_ij = E[g_i g_j^T], of linear layers in a row, each the only reader of the last one's output
      behind an elementwise function; other layers stay block-diagonal. With P_A = A_ij A_j^-1, P_G = G_ij G_j^-1 of the
      damped factors ("pi", "sqrt" or "replicated"): V_i <- V_i - P_G V_j P_A^T; U_i = Lambda_i V_i with
      Lambda_i^-1 = kron(G_i, A_i) - kron(P_G G_ij^T, P_A A_ij^T); U_j <- U_j - P_G^T U_i P_A.
    - spatial: of convolutions, "correlated" as above, or "uncorrelated": pixels of a patch do not depend on each other,
      A = kron(Sigma, I_K) + m m^T with the channels' covariance Sigma, and their mean at each of the K taps (and 1) for
      m. A C x C inverse, applied tap by tap, takes the place of a C K x C K one; no Gram of patches is formed.
    - position_every: of convolutions, A is the mean over every so many positions only.
    - step: "fixed", a learning rate and momentum with the KL clip; "quadratic", the complete algorithm of the paper,
      through ``fxcurv.optimizer`` and a closure (any method with a damping takes it): D = -U, the last step d0,
      d = alpha D + mu d0 minimises M(d) = d^T (F + (damping + l2) I) d / 2 + h'^T d with the exact F of the batch and
      h = loss + l2/2 |w|^2; damping follows (h(w + d) - h(w)) / M(d) every T1 steps; the factors are damped with
      gamma^2 in place of damping, gamma searched every T2 steps. Here damping = 150, solve_every = 20, no KL clip, and
      for the optimizer l2 = 1e-5, damping_every = T1 = 5, gamma_every = T2 = 20, damping_decay = w = 0.95 (w1 = w^T1,
      w2 = w^(T2/2)), averaging = 0.99 (``with opt.averaged():`` puts the averaged parameters in),
      fixed_momentum = None (else mu), warmup = 0 (first steps for statistics alone), min_damping = 1e-8. Choose it for
      large or growing batches: on small ones alpha and mu fit the noise.

    Cost: n (d_in^2 + d_out^2) for the statistics, d_in^3 + d_out^3 at a refresh, d_in d_out (d_in + d_out) a step; two
    matrices of each size. "tridiagonal": twice the statistics, whose rows are kept until the step, eigendecompositions
    for inverses, four times the products. "quadratic": one more backward pass and two Jacobian-vector products a step,
    three refreshes in a step of T2, one more forward in a step of T1.

    Source: Martens & Grosse 2015, sections 3-7 and algorithm 2, for damping, l2, T1, w1 and the moving average as in
    the authors' example; T2, T3 = solve_every, w2 and averaging not checked against it. The paper takes Fisher and F of
    parts of the batch; here they are of all of it. Grosse & Martens 2016 for
    convolutions and for spatial; their KFC-pre is kfac with the fixed step, momentum 0.9 and a KL clip. The fixed
    step's defaults are those of distributed K-FAC, not of the papers.
    """
    scope, estimate = blocks(o.blocks)
    damp, solve = scheme(o.damping_scheme, FACTORED if o.blocks == "tridiagonal" else SCHEMES)
    estimate, solve = patches(o.spatial, o.position_every, estimate, solve)
    return Method(
        name="kfac",
        source=Source(o.fisher, o.fisher_samples),
        scope=scope,
        estimate=estimate,
        track=EMA(),
        damp=damp,
        solve=solve,
        rescale=rescaling(o),
    )
