"""KFLR: K-FAC with the exact Gauss-Newton output factor, and a step whose length comes out of the exact model."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from fxcurv.methods.kfac import kfac
from fxcurv.methods.method import Method, Rule
from fxcurv.methods.registry import published

OWN_LENGTH = {"fixed_momentum": 0.0, "damping_every": 0, "gamma_every": 0, "averaging": 0.0}
"""What a quadratic step is without momentum, adaptive damping and averaging: alpha alone."""
DEFAULTS: dict[str, Any] = {
    "fisher": "ggn",
    "fisher_samples": 1,
    "damping": 1e-3,
    "damping_scheme": "pi",
    "trace_floor": 1e-3,
    "ema": 0.9,
    "kl_clip": None,
    "rescale": "kl",
    "step": "quadratic",
    "solve_every": 1,
}


def with_own_length(name: str, o: SimpleNamespace) -> Method:
    """K-FAC under another name whose quadratic step has an alpha and nothing else by default."""
    composed = kfac.compose(SimpleNamespace(**{**kfac.defaults, **vars(o)}))
    return replace(composed, name=name, rule=Rule(options=OWN_LENGTH if o.step == "quadratic" else {}))


@published("kflr", papers=(65,), **DEFAULTS)
def kflr(o: SimpleNamespace) -> Method:
    """KFLR: K-FAC whose output factor is the exact Gauss-Newton one, with a step that needs no learning rate.

    For a layer s = W a the block is kron(G, A) with A = E[a a^T] and G = E[J^T H J], J = df/ds the Jacobian of the
    outputs, H the Hessian of the loss in them: H = sum_c b_c b_c^T is pushed back column by column, so that G has no
    sampling noise. D = -(G + sqrt(k)/pi I)^-1 V (A + pi sqrt(k) I)^-1 with pi^2 = (tr A / dim A) / (tr G / dim G) and
    k = damping + l2; the step is alpha D, alpha = -h'^T D / (D^T F D + k |D|^2) with the exact F of the batch.

    fisher: "ggn" as in the paper; "ggn_signs" is unbiased with one column for a loss whose outputs are independent
    (bce, mse) and one a class for the others. damping_scheme, rescale: see "kfac". step: "quadratic",
    through ``fxcurv.optimizer`` and a closure, is alpha alone: its options here are l2 = 1e-5, fixed_momentum = 0 (None
    takes the momentum out of the same model), damping_every = 0 (5: Levenberg-Marquardt), gamma_every = 0,
    averaging = 0, and lr = 1, a factor on the step; "fixed" is a learning rate and momentum, with kl_clip if given.

    Cost: one backward pass for every output column (d_f, and every position) in place of one, else as kfac; two
    Jacobian-vector products for alpha. Choose it over kfac for few outputs and a noisy G, or to have no rate to tune;
    over kfra where layers are no plain sequence.

    Source: Botev, Ritter & Barber 2017, sections 3-4; damping and ema (0.9; here it starts from min(1 - 1/k, ema)) are
    those of the authors' code, which also clips alpha at 1 and averages it; l2 and the period of 1 are ours.
    """
    return with_own_length("kflr", o)
