"""MKOR: K-FAC's inverses, kept by rank-one updates."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from fxcurv.errors import FxcurvError
from fxcurv.methods.method import Method, Source
from fxcurv.methods.parts.hybrid import Fading, Hybrid
from fxcurv.methods.parts.rankone import Inverses, MeanRows, Sides
from fxcurv.methods.parts.rescale import rescaling
from fxcurv.methods.parts.scope import Layers
from fxcurv.methods.registry import published

UPDATES = ("exact", "printed", "package")
DEFAULTS = {
    "update": "exact",
    "ema": 0.95,
    "limit": 2.0,
    "zeta": 0.9,
    "kl_clip": 1e-3,
    "rescale": "graft",
    "factor_every": 10,
}


def inverses_of_means(o: SimpleNamespace) -> Method:
    """The parts of MKOR, from its hyper-parameters."""
    if o.update not in UPDATES:
        raise FxcurvError(f"update='{o.update}' is unknown; choose one of {', '.join(UPDATES)}.")
    if not o.ema > 0:
        raise FxcurvError(f"ema={o.ema} of MKOR must be more than 0: a rank-one factor alone has no inverse.")
    return Method(
        name="mkor",
        source=Source("empirical"),
        scope=Layers(exact_norms=False),
        estimate=MeanRows(per_example=True),
        track=Inverses(o.update),
        solve=Sides(),
        rescale=rescaling(o),
        hyper={"limit": o.limit},
    )


@published("mkor", papers=(15,), **DEFAULTS)
def mkor(o: SimpleNamespace) -> Method:
    """MKOR: K-FAC whose factors are running sums of rank-one terms, so that their inverses are updated, never computed.

    Every factor_every steps the mean input abar and the mean output gradient gbar of the batch (of single examples'
    losses) enter the inverses GI and AI, which start as the identity; every step they precondition:

        update="exact":   GI = inverse of ema GI^-1 + (1 - ema) gbar gbar^T
                             = [GI - (1 - ema) / (ema + (1 - ema) gbar^T GI gbar) GI gbar gbar^T GI] / ema
        update="printed": GI = ema GI + (1 - ema) / (ema^2 (1 + ema (1 - ema) gbar^T GI gbar)) GI gbar gbar^T GI
        update="package": GI = inverse of (ema GI + (1 - ema) I)^-1 + gbar gbar^T
        U = GI V AI, then each layer's U gets the length of its V.

    AI likewise with abar. Stabiliser, before an update: where an entry of an inverse is above ``limit`` it becomes
    zeta GI + (1 - zeta) I. "printed" is the formula of the paper: positive definite for every sequence of vectors, but
    with the opposite sign, so that the direction of gbar is amplified relative to the others where "exact" damps it;
    "package" is what the authors' code computes. rescale: "graft" (above), "kl" (with kl_clip), "match" or "none". A
    layer whose inverses or update are not finite falls back to its gradient and keeps what it had. A side wider than
    max_factor_dim, and that of one-hot rows, keeps the inverse diagonal of its factor. Norm layers get an inverse for
    each unit, a weight that is also an embedding the vectors of its use as a projection. sharing="reduce" sums output
    gradients over positions where "expand" takes their mean. Needs ``loss.backward()`` and no loss object. As with eva,
    gbar fades near a minimum: GI then approaches a multiple of the identity.

    Cost: n (d_in + d_out) flops for statistics and 6 (d_in^2 + d_out^2) for an update, where kfac has n (d_in^2 +
    d_out^2) and a cubic factorisation; the direction and the memory are kfac's, d_in^2 + d_out^2. Choose it over kfac
    for wide layers whose factorisations are too dear, over eva where memory allows the history of many batches.

    Source: Mozaffari et al. 2023 (MKOR), algorithm 1 with the sign corrected, which is our default. ema, limit, zeta
    and the interval of 10 steps are those of the authors' code (0.95, 2, 0.9); the paper's own are not known. The code
    also clips entries at 100, which is not needed here.
    """
    return inverses_of_means(o)


@published("mkor_h", papers=(15,), **DEFAULTS, switch_below=0.1, switch_after=100)
def mkor_h(o: SimpleNamespace) -> Method:
    """MKOR-H: MKOR while the loss falls fast, then the plain gradient.

    Second-order steps pay early in training. Two averages of the loss, with weights 0.9 and 0.98 on the old value, say
    how fast it falls: rate = slow average - fast average. Every factor_every steps, after the first ``switch_after``
    losses, the rate is compared with the largest one so far, and once

        rate < switch_below * (largest rate)

    all layers go over to U = V for good: nothing is measured, updated or preconditioned from then on, and a step costs
    what it costs without fxcurv. Lengths do not jump, since every U has the length of its V (rescale="graft"). The rule
    reads the loss that ``model.backward(loss, outputs)`` is given, so that ``loss.backward()`` is not enough here; over
    several processes it is their mean, over micro-batches their sum. It compares differences alone, so the loss may
    have any unit and zero. A single layer whose update is not finite falls back to its gradient as with every method.

    Cost: mkor's until the switch, none after it. Choose it over mkor for long runs whose late phase gains nothing from
    curvature.

    Source: Mozaffari et al. 2023, section 3.4, which switches when second-order updates bring less than a threshold,
    but gives no rule: the averages, the comparison and both numbers are ours. All else is mkor's.
    """
    method = inverses_of_means(o)
    numbers = {"switch_below": o.switch_below, "switch_after": o.switch_after}
    scope, track = Hybrid(exact_norms=False), Fading(o.update)
    return replace(method, name="mkor_h", scope=scope, track=track, hyper={**method.hyper, **numbers})
