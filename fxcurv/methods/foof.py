"""FOOF: gradient descent on neurons."""

from __future__ import annotations

from types import SimpleNamespace

from fxcurv.methods.method import Method, Source
from fxcurv.methods.parts.damp import Tikhonov
from fxcurv.methods.parts.estimate import InputGram
from fxcurv.methods.parts.scope import Layers
from fxcurv.methods.parts.solve import Inverse
from fxcurv.methods.parts.track import EMA
from fxcurv.methods.registry import published


@published("foof", papers=(12,), damping=0.1, ema=0.95)
def foof(o: SimpleNamespace) -> Method:
    """FOOF: precondition with the input factor alone, a gradient step on the outputs of every layer.

    U = V (A + damping I)^-1 with A = E[a a^T] over examples and positions. Needs nothing from the backward pass but the
    gradient itself, so ``loss.backward()`` is right; the scale of U is that of 1/A, not of a curvature.

    Source: Benzing 2022, section 4; the damping is a re-implementation's (the sheet gives no published value).
    """
    return Method(
        name="foof",
        source=Source("empirical"),
        scope=Layers(exact_norms=False),
        estimate=InputGram(),
        track=EMA(),
        damp=Tikhonov(),
        solve=Inverse(),
    )
