"""EKFAC: K-FAC's eigenbasis with the right eigenvalues."""

from __future__ import annotations

from types import SimpleNamespace

from fxcurv.errors import FxcurvError
from fxcurv.methods.method import Method, Source
from fxcurv.methods.parts.damp import Tikhonov
from fxcurv.methods.parts.estimate import Kron
from fxcurv.methods.parts.rescale import rescaling
from fxcurv.methods.parts.scope import Layers
from fxcurv.methods.parts.solve import Corrected
from fxcurv.methods.parts.track import EMA
from fxcurv.methods.registry import published

BASES = ("eigh", "qr")


@published("ekfac", papers=(5,), fisher="mc", fisher_samples=1, damping=1e-3, ema=0.95, kl_clip=1e-3, basis="eigh")
def ekfac(o: SimpleNamespace) -> Method:
    """EKFAC: precondition in K-FAC's eigenbasis with the second moment of every example's gradient measured there.

    U = Q_G [ (Q_G^T V Q_A) / (S + damping) ] Q_A^T with S = E[(Q_G^T grad Q_A)^2], grad the gradient of one example,
    summed over its positions before squaring. The basis is refreshed every solve_every steps (there S restarts from the
    eigenvalue products: with solve_every=1 this is K-FAC with eigenvalue damping), S follows every batch. No diagonal
    in this basis is closer to the Fisher in Frobenius norm. basis: "eigh" decomposes the factors at every refresh; "qr"
    at the first, and then follows them by one step of orthogonal iteration, with S restarting as before
    (``due(refresh=True)`` decomposes again).

    Source: George et al. 2018, sections 3-4; the tracked basis as in Vyas et al. 2024 (SOAP), algorithm 4.
    """
    if o.basis not in BASES:
        raise FxcurvError(f"basis='{o.basis}' is unknown; choose one of {', '.join(BASES)}.")
    return Method(
        name="ekfac",
        source=Source(o.fisher, o.fisher_samples),
        scope=Layers(),
        estimate=Kron(),
        track=EMA(),
        damp=Tikhonov(),
        solve=Corrected(o.basis),
        rescale=rescaling(o),
    )
