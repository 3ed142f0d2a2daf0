"""EKFAC: K-FAC's eigenbasis with the right eigenvalues."""

from __future__ import annotations

from types import SimpleNamespace

from fxcurv.errors import FxcurvError
from fxcurv.methods.method import Method, Source
from fxcurv.methods.parts.estimate import Kron
from fxcurv.methods.parts.rescale import rescaling
from fxcurv.methods.parts.schemes import SPECTRAL, scheme
from fxcurv.methods.parts.scope import Layers
from fxcurv.methods.parts.solve import Corrected, Running
from fxcurv.methods.parts.track import EMA
from fxcurv.methods.registry import published

BASES = ("eigh", "qr")
SPECTRA = {"examples": Corrected, "gradient": Running}


@published(
    "ekfac",
    papers=(5,),
    fisher="mc",
    fisher_samples=1,
    damping=1e-3,
    damping_scheme="eigenvalue",
    trace_floor=1e-3,
    ema=0.95,
    kl_clip=1e-3,
    rescale="kl",
    basis="eigh",
    spectrum="examples",
)
def ekfac(o: SimpleNamespace) -> Method:
    """EKFAC: precondition in K-FAC's eigenbasis with the second moment of every example's gradient measured there.

    U = Q_G [ (Q_G^T V Q_A) / (S + damping) ] Q_A^T with S = E[(Q_G^T grad Q_A)^2], grad the gradient of one example,
    summed over its positions before squaring. The basis is refreshed every solve_every steps (there S restarts from the
    eigenvalue products: with solve_every=1 this is K-FAC with eigenvalue damping), S follows every batch. No diagonal
    in this basis is closer to the Fisher in Frobenius norm. basis: "eigh" decomposes the factors at every refresh; "qr"
    at the first, and then follows them by one step of orthogonal iteration, with S restarting as before
    (``due(refresh=True)`` decomposes again). damping_scheme: "eigenvalue" as above; "floor", max(S, damping);
    "relative", damping times the mean of S, at least trace_floor / dim S; "mask", no step where S < 1e-10 max S.
    spectrum: "examples" as above; "gradient" is EKFAC-ra, S <- ema S + (1 - ema) N (Q_G^T V Q_A)^2 in every step, V the
    mean gradient of N terms: no rows are needed, and factor_every may be as long as solve_every.

    Cost: kfac's statistics, and n d_in d_out (d_in + d_out) more for S, which sees the rows themselves; d_in^3 +
    d_out^3 at a refresh, times the constant of an eigendecomposition with "eigh"; four products a step in place of two.
    Memory: two more matrices of the factors' sizes, and one of d_in d_out. Choose it over kfac where the curvature's
    diagonal in the basis moves faster than the basis does, with a long solve_every.

    Source: George et al. 2018, sections 3-4; the tracked basis as in Vyas et al. 2024 (SOAP), algorithm 4. Damping, the
    moving average and the KL clip are those of kfac (the reference code of EKFAC-ra has ema = 0.75).
    """
    if o.spectrum not in SPECTRA:
        raise FxcurvError(f"spectrum='{o.spectrum}' is unknown; choose one of {', '.join(SPECTRA)}.")
    if o.basis not in BASES:
        raise FxcurvError(f"basis='{o.basis}' is unknown; choose one of {', '.join(BASES)}.")
    return Method(
        name="ekfac",
        source=Source(o.fisher, o.fisher_samples),
        scope=Layers(),
        estimate=Kron(),
        track=EMA(),
        damp=scheme(o.damping_scheme, SPECTRAL)[0],
        solve=SPECTRA[o.spectrum](o.basis),
        rescale=rescaling(o),
    )
