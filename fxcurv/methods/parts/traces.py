"""Partial traces: Kronecker factors that leave the trace of a block as it is (sheet kronecker-2, tkfac)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, fx

from fxcurv.errors import FxcurvError
from fxcurv.ir.program import Builder
from fxcurv.methods.dense import full, kron
from fxcurv.methods.facts import Facts, Target
from fxcurv.methods.method import Damp, Estimate, curvature_weight, flag
from fxcurv.methods.parts.damp import Strong
from fxcurv.methods.parts.estimate import shared_rows
from fxcurv.methods.parts.strength import ByKind, Fixed

CONV_DAMPINGS = ("trace", "fixed")


@dataclass(frozen=True)
class Traces(Estimate):
    """TKFAC: kron(G, A) / delta with A = E[|g|^2 a a^T], G = E[|a|^2 g g^T] and delta = tr A = tr G = E[|a|^2 |g|^2].

    A and G are what is left of the block sum_n (g_n g_n^T) (x) (a_n a_n^T) when its output or its input index is traced
    out, so that they add up over batches, uses and positions (of which different ones count as uncorrelated), and over
    the two roles of a weight that is both an embedding and an output projection. The averages are of A and G: delta is
    the trace of what is kept, never out of step with it.
    """

    def measure(self, b: Builder, facts: Facts, target: Target) -> dict[str, fx.Node]:
        a, g = (shared_rows(b, facts, target, side, alone=False) for side in ("a", "g"))
        inputs = weighted_moment(b, facts, a, g, target.d_in, target.diagonal_input)
        outputs = weighted_moment(b, facts, g, a, target.d_out)
        if target.swapped:
            tokens, gradients = target.rows(b, "a2"), target.rows(b, "g2")
            gram = weighted_moment(b, facts, gradients, tokens, target.d_in)
            if target.homogeneous:  # the embedding has no constant coordinate
                gram = b.border(gram)
            inputs = b.add(inputs, gram)
            outputs = b.add(outputs, weighted_moment(b, facts, tokens, gradients, target.d_out))
        weight = curvature_weight(b, facts)
        return {"A": b.scale(inputs, weight), "G": b.scale(outputs, weight)}

    def scale(self, b: Builder, parts: dict[str, fx.Node]) -> fx.Node | None:
        """1 / delta; 0 where nothing has been measured."""
        inputs = parts["A"]
        trace = b.mul(b.mean_diagonal(inputs, *flag(inputs)), float(inputs.meta["type"].shape[-1]))
        return b.safe_ratio(b.one_like(trace), trace)

    def block(self, parts: dict[str, Tensor]) -> Tensor | None:
        inputs, outputs = (full(parts[side], parts[side].shape[-1]) for side in ("A", "G"))
        delta = inputs.diagonal(dim1=-2, dim2=-1).sum(-1)
        return kron(outputs, inputs) / delta[..., None, None]


def weighted_moment(
    b: Builder, facts: Facts, rows: fx.Node, weights: fx.Node, size: int, diagonal: bool = False
) -> fx.Node:
    """Sum of |w|^2 x x^T over rows x and w; its diagonal where asked for, or where the factor would be too wide."""
    return (b.weighted_diag_gram if diagonal or size > facts.max_factor_dim else b.weighted_gram)(rows, weights)


def by_kind(damp: Damp, conv_damping: str) -> Damp:
    """A damping whose lambda is by the trace in convolutions, where it is fixed otherwise and ``conv_damping="trace"``.

    Raises :class:`FxcurvError` for another word than "trace" or "fixed".
    """
    if conv_damping not in CONV_DAMPINGS:
        raise FxcurvError(f"conv_damping='{conv_damping}' is unknown; choose one of {', '.join(CONV_DAMPINGS)}.")
    if conv_damping == "fixed" or not isinstance(damp, Strong) or damp.strength != Fixed():
        return damp
    return replace(damp, strength=ByKind())
