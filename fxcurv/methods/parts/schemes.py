"""Damping schemes by name: how a strength is put into a Kronecker product, and how the product is then inverted.

One table for every method of the family (sheet kronecker-1, Damping). F stands for kron(G, A), e for its eigenvalues:

    pi          (G + sqrt(damping)/pi I)^-1 V (A + pi sqrt(damping) I)^-1, pi^2 = (tr A / dim A) / (tr G / dim G)
    sqrt        the same with pi = 1
    replicated  the same with pi^2 = 1/T, T the rows of a loss term: pi = 1 for averages over positions
    eigenvalue  (F + damping I)^-1 V
    floor       1 / max(e, damping) in the eigenbasis
    relative    (F + damping m I)^-1 V, m = max(tr F, trace_floor) / dim F the mean eigenvalue
    mask        as eigenvalue, but no step along directions with e < 1e-10 max(e)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fxcurv.errors import FxcurvError
from fxcurv.methods.method import Damp, Solve
from fxcurv.methods.parts.damp import Factored, Floor, Mask, PiSplit, Replicated, Tikhonov
from fxcurv.methods.parts.solve import Eigen, Inverse
from fxcurv.methods.parts.strength import Relative

SCHEMES: dict[str, tuple[Damp, Solve]] = {
    "pi": (PiSplit(), Inverse()),
    "sqrt": (Factored(), Inverse()),
    "replicated": (Replicated(), Inverse()),
    "eigenvalue": (Tikhonov(), Eigen()),
    "floor": (Floor(), Eigen()),
    "relative": (Tikhonov(Relative()), Eigen()),
    "mask": (Mask(), Eigen()),
}
FACTORED = ("pi", "sqrt", "replicated")
"""Those that damp factors: for any algebra that needs inverses or roots of them."""
SPECTRAL = ("eigenvalue", "floor", "relative", "mask")
"""Those that damp eigenvalues of the whole block: for any spectrum in any basis."""
ONE_FACTOR: dict[str, tuple[Damp, Solve]] = {
    "eigenvalue": (Tikhonov(), Inverse()),
    "floor": (Floor(), Eigen()),
    "relative": (Tikhonov(Relative()), Inverse()),
    "mask": (Mask(), Eigen()),
}
"""For a block with one factor."""


def scheme(
    name: str,
    among: Collection[str] = tuple(SCHEMES),
    table: Mapping[str, tuple[Damp, Solve]] = SCHEMES,
) -> tuple[Damp, Solve]:
    """Damping and solve of a named damping scheme; ``among``: those that the method's algebra has a place for.

    Raises :class:`FxcurvError` for a name that is unknown or has no place, with those that have.
    """
    allowed = [known for known in table if known in among]
    if name not in allowed:
        what = "has no place in this method" if name in SCHEMES else "is unknown"
        raise FxcurvError(f"damping_scheme='{name}' {what}; choose one of {', '.join(allowed)}.")
    return table[name]
