"""Damping schemes by name: how a strength is put into a Kronecker product, and how the product is then inverted.

One table for every method of the family (sheet kronecker-1, Damping).
"""

from __future__ import annotations

from fxcurv.errors import FxcurvError
from fxcurv.methods.method import Damp, Solve
from fxcurv.methods.parts.damp import Factored, PiSplit, Tikhonov
from fxcurv.methods.parts.solve import Eigen, Inverse

SCHEMES: dict[str, tuple[Damp, Solve]] = {
    "pi": (PiSplit(), Inverse()),
    "sqrt": (Factored(), Inverse()),
    "eigenvalue": (Tikhonov(), Eigen()),
}


def scheme(name: str) -> tuple[Damp, Solve]:
    """Damping and solve of a named damping scheme."""
    if name not in SCHEMES:
        raise FxcurvError(f"damping_scheme='{name}' is unknown; choose one of {', '.join(SCHEMES)}.")
    return SCHEMES[name]
