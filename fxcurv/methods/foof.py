"""FOOF: gradient descent on neurons."""

from __future__ import annotations

from types import SimpleNamespace

from fxcurv.methods.method import Method, Source
from fxcurv.methods.parts.estimate import InputGram
from fxcurv.methods.parts.rescale import rescaling
from fxcurv.methods.parts.schemes import ONE_FACTOR, scheme
from fxcurv.methods.parts.scope import Layers
from fxcurv.methods.parts.track import EMA
from fxcurv.methods.registry import published


@published(
    "foof",
    papers=(12,),
    damping=0.1,
    damping_scheme="eigenvalue",
    trace_floor=1e-3,
    ema=0.95,
    kl_clip=None,
    rescale="kl",
)
def foof(o: SimpleNamespace) -> Method:
    """FOOF: precondition with the input factor alone, a gradient step on the outputs of every layer.

    U = V (A + damping I)^-1 with A = E[a a^T] over examples and positions. Needs nothing from the backward pass but the
    gradient itself, so ``loss.backward()`` is right; the scale of U is that of 1/A, not of a curvature. damping_scheme:
    "eigenvalue" as above; "floor", max(e, damping) for the eigenvalues e of A; "relative", damping times their mean;
    "mask", no step along those below 1e-10 of the largest. rescale: see kfac; none by default. The amortised variant is
    burst=S with solve_every=tau: A follows the S batches up to each factorisation, from their own backward passes, and
    the steps in between run your own module, untapped.

    Cost: n d_in^2 for the statistics, d_in^3 at a refresh, d_in^2 d_out a step; memory one or two matrices d_in x d_in,
    about half of kfac's where layers are square. Choose it over kfac for its one factor and its plain backward pass,
    for layers of many outputs, and where output gradients say little; its learning rate is a gradient step's on the
    outputs and has to be tuned.

    Source: Benzing 2022, section 4; the damping is a re-implementation's (the sheet gives no published value).
    """
    damp, solve = scheme(o.damping_scheme, table=ONE_FACTOR)
    return Method(
        name="foof",
        source=Source("empirical"),
        scope=Layers(exact_norms=False),
        estimate=InputGram(),
        track=EMA(),
        damp=damp,
        solve=solve,
        rescale=rescaling(o),
    )
