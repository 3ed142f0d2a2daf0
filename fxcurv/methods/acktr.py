"""ACKTR: K-FAC with a trust region, for actor and critic."""

from __future__ import annotations

from types import SimpleNamespace

from fxcurv.methods.method import Method, Source
from fxcurv.methods.parts.estimate import Kron
from fxcurv.methods.parts.rescale import rescaling
from fxcurv.methods.parts.schemes import scheme
from fxcurv.methods.parts.scope import Layers
from fxcurv.methods.parts.track import EMA
from fxcurv.methods.parts.warm import ColdStart
from fxcurv.methods.registry import published


@published(
    "acktr",
    papers=(3,),
    fisher="mc",
    fisher_samples=1,
    damping=0.01,
    damping_scheme="eigenvalue",
    ema=0.99,
    kl_clip=1e-3,
    rescale="trust",
    lr=0.25,
    momentum=0.0,
    cold_steps=10,
    cold_clip=0.5,
)
def acktr(o: SimpleNamespace) -> Method:
    """ACKTR: K-FAC of a policy and its value function together, with a trust region in KL divergence.

    The Fisher is that of the joint distribution pi(a|s) N(v; V(s), 1): with a loss of
    :mod:`fxcurv.losses.actor_critic` and fisher="mc", actions are drawn anew from the policy and values around V(s), so
    that a shared trunk and both heads get one curvature. Factors as in kfac, the block damped in its eigenbasis, and
    one factor on all layers bounds the divergence of a step:

        U = Q_G [ (Q_G^T V Q_A) / (e_G e_A^T + damping) ] Q_A^T
        U <- U min(1, sqrt(2 kl_clip / (lr^2 sum <U, V>))),   theta <- theta - lr U

    where sum <U, V> = u^T F u of the damped operator that was inverted: 1/2 lr^2 u^T F u <= kl_clip, and lr is the
    longest step, the paper's eta_max. In the first ``cold_steps`` steps, while the factors are plain averages of few
    batches, U is the gradient, no longer than ``cold_clip`` over all layers. damping_scheme, rescale: as in kfac; "kl"
    in place of "trust" bounds lr^2 u^T F u, twice that, as the reference code does.

    Momentum adds up steps: with momentum m the displacement tends to 1/(1 - m) times a step, and the bound of a step is
    none of their sum. The reference code bounds by lr, then steps with lr (1 - m): that is momentum=m, rescale="kl",
    and lr (1 - m), kl_clip (1 - m)^2 in place of its lr and kl_clip. Its Fisher term of the critic is a squared error
    without one half, four times a unit-variance Gaussian's: vf_fisher_coef=4 in the loss. Separate networks for policy
    and value are layers of one module here.

    Cost: kfac's, with eigendecompositions in place of inverses. Choose it over adam for policy gradients, where a batch
    is expensive and a step that goes too far spoils the next batch.

    Source: Wu et al. 2017, section 3 and appendix; kl_clip = 0.001, damping 0.01, ema 0.99, lr 0.25 and the cold start
    (10 steps, norm 0.5) from its reference code for Atari, there with lr falling linearly to 0. No momentum by default,
    so that the bound holds (there 0.9).
    """
    damp, solve = scheme(o.damping_scheme)
    cold = o.cold_steps > 0
    return Method(
        name="acktr",
        source=Source(o.fisher, o.fisher_samples),
        scope=ColdStart() if cold else Layers(),
        estimate=Kron(),
        track=EMA(),
        damp=damp,
        solve=solve,
        rescale=rescaling(o),
        hyper={"cold_steps": o.cold_steps, "cold_clip": o.cold_clip} if cold else {},
    )
