"""Factors in the scale of other libraries.

Here kron(G, A) is a block of the curvature of the *mean* loss: over all rows of a layer A is a mean, and G is the sum
over the positions of an example, averaged over the N loss terms. Others divide differently, so that equal numbers for
damping mean different things. With N and T (rows of the layer for a term: pixels of a convolution's output, 1 for a
linear layer on vectors), each convention is a power of N and of T on either side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fxcurv.errors import FxcurvError


@dataclass(frozen=True)
class Convention:
    """Theirs = ours * N**n * T**t on the sides A and G.

    sharing: the setting under which our factors are made of the same outer products. note: what else to know.
    """

    a: tuple[int, int] = (0, 0)
    g: tuple[int, int] = (0, 0)
    sharing: str = "expand"
    note: str = ""


CONVENTIONS: dict[str, Convention] = {
    "curvlinops": Convention(),
    "singd": Convention(),
    "asdl": Convention(),
    "curvlinops-reduce": Convention(sharing="reduce"),
    "nngeometry": Convention(a=(0, 1), g=(0, -1), note="convolutions and embeddings"),
    "kfac-jax": Convention(g=(0, -1), note="it multiplies the product by a fixed scale of T"),
    "kronfluence": Convention(g=(0, -1), note="its eigenvalues are fitted afresh, so the missing T cancels"),
    "kfac-pytorch": Convention(a=(0, -2), g=(-2, -3), note="linear layers on vectors are the case T = 1"),
    "kfac-pytorch-2019": Convention(a=(0, -1), g=(0, 1), note="batch_averaged=True"),
    "eva": Convention(g=(0, -2), sharing="reduce", note="linear layers on sequences"),
}


def convert(factors: Mapping[str, Tensor], to: str, *, terms: int, positions: int = 1) -> dict[str, Tensor]:
    """``model.factors(name)`` of a Kronecker method, "A" and "G", as the library ``to`` would have them.

    terms: N, the loss terms of the batch (``StepInfo.terms``). positions: T, rows of the layer for each of them. The
    model must have the convention's ``sharing``. Raises :class:`FxcurvError` on an unknown convention or without "A"
    and "G".
    """
    if to not in CONVENTIONS:
        raise FxcurvError(f"there is no convention '{to}'; there are {', '.join(CONVENTIONS)}.")
    missing = [side for side in ("A", "G") if side not in factors]
    if missing:
        raise FxcurvError(f"there is no factor '{missing[0]}' to convert; only Kronecker factors have a convention.")
    convention = CONVENTIONS[to]
    powers = {"A": convention.a, "G": convention.g}
    return {side: factors[side] * (float(terms) ** n * float(positions) ** t) for side, (n, t) in powers.items()}


def revert(factors: Mapping[str, Tensor], of: str, *, terms: int, positions: int = 1) -> dict[str, Tensor]:
    """The inverse of :func:`convert`: another library's "A" and "G" in the scale used here."""
    scale = convert({side: value.new_ones(()) for side, value in factors.items()}, of, terms=terms, positions=positions)
    return {side: factors[side] / scale[side] for side in ("A", "G")}
