"""K-FAC: one Kronecker product a layer."""

from __future__ import annotations

from types import SimpleNamespace

from fxcurv.methods.method import Method, Source
from fxcurv.methods.parts.estimate import Kron
from fxcurv.methods.parts.rescale import rescaling
from fxcurv.methods.parts.schemes import scheme
from fxcurv.methods.parts.scope import Layers
from fxcurv.methods.parts.track import EMA
from fxcurv.methods.registry import published


@published(
    "kfac",
    papers=(1, 2),
    fisher="mc",
    fisher_samples=1,
    damping=1e-3,
    damping_scheme="pi",
    ema=0.95,
    kl_clip=1e-3,
)
def kfac(o: SimpleNamespace) -> Method:
    """K-FAC: the Fisher block of a layer is the Kronecker product of its input and output-gradient second moments.

    For a layer s = W a the block is approximated by kron(G, A), A = E[a a^T], G = E[g g^T], g the gradient at s for a
    label sampled from the model; the direction is U = (G + sqrt(damping)/pi I)^-1 V (A + pi sqrt(damping) I)^-1 with
    pi^2 = (tr A / dim A) / (tr G / dim G). damping_scheme: "pi", "sqrt" (pi = 1) or "eigenvalue" (the whole block
    damped exactly, in its eigenbasis). Convolutions use patches (KFC); norm layers keep exact unit-wise blocks.

    Source: Martens & Grosse 2015, sections 3-6; Grosse & Martens 2016. Here with a fixed damping and a KL clip in place
    of the adaptive step of the complete algorithm.
    """
    damp, solve = scheme(o.damping_scheme)
    return Method(
        name="kfac",
        source=Source(o.fisher, o.fisher_samples),
        scope=Layers(),
        estimate=Kron(),
        track=EMA(),
        damp=damp,
        solve=solve,
        rescale=rescaling(o),
    )
