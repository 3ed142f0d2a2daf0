"""Positions as a stationary chain: the parts of recurrent K-FAC (sheet kronecker-1, kfac-rnn).

A layer's gradient is a sum over the steps of a sequence, whose terms are correlated. With inputs independent of output
gradients and both stationary, E[w_{t+d} w_t^T] = kron(G_d, A_d), and a linear Gaussian model of w makes all d follow
from d = 0 and 1. So there are four factors: A, G as in K-FAC and A1, G1, the same between a step and the next. All are
divided as A and G are, by the number of *all* rows. G holds the sum over time, as everywhere here, so E[T] is
in it: the block of the mean loss is sum over |d| < T of (1 - |d|/T) kron(G_d, A_d).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fxcurv.ir.program import REFRESH, Builder
from fxcurv.methods.facts import Facts, Target
from fxcurv.methods.method import Method, Solve, curvature_weight
from fxcurv.methods.parts.estimate import Kron
from fxcurv.methods.parts.solve import Inverse, Parts, between


@dataclass(frozen=True)
class Lagged(Kron):
    """K-FAC's factors, and "A1", "G1" between neighbouring steps; with ``lengths`` also "T", the mean length.

    A layer whose positions are no sequence, or with a factor kept diagonal, gets K-FAC's factors alone.
    """

    lengths: bool = False

    def measure(self, b: Builder, facts: Facts, target: Target) -> dict[str, fx.Node]:
        parts = super().measure(b, facts, target)
        if not target.sequential or max(target.d_in, target.d_out) > facts.max_factor_dim:
            return parts
        rows_a, rows_g = target.rows(b, "a"), target.rows(b, "g")
        count = b.count(rows_a)
        parts["A1"] = b.mean(b.lagged_gram(rows_a), count)
        parts["G1"] = b.scale(b.lagged_gram(rows_g), curvature_weight(b, facts))
        if self.lengths:
            parts["T"] = b.mean(count, b.examples(rows_a))
        return parts


@dataclass(frozen=True)
class Symmetric(Solve):
    """Option 1: C1 counts as symmetric, and the inverse is exact for sequences of T steps.

    U = L_G [ (L_G^T V L_A) / f(psi_G psi_A^T) ] L_A^T with L, psi the modes of a damped side and f(x) the sum over
    |d| < T of (1 - |d|/T) x^|d|.
    """

    def direction(
        self, b: Builder, method: Method, facts: Facts, target: Target, gradient: fx.Node, parts: Parts
    ) -> fx.Node:
        if "A1" not in parts:
            return Inverse().direction(b, method, facts, target, gradient, parts)
        assert method.damp is not None
        with b.within(at=REFRESH):
            damping = method.damp.split(b, facts, parts)
            modes = {c: b.symmetric_chain_modes(parts[c], parts[f"{c}1"], damping[c]) for c in ("A", "G")}
            (l_a, psi_a), (l_g, psi_g) = ([b.item(modes[c], i) for i in range(2)] for c in ("A", "G"))
            gain = b.finite_chain_gain(psi_g, psi_a, parts["T"])
        return between(b, gradient, l_g, l_a, gain)


@dataclass(frozen=True)
class Stationary(Solve):
    """Option 2: no symmetry, and the limit of long sequences.

    Z = V - P_G V P_A^T; Z <- K_G [ (K_G^T Z K_A) / (1 - mu_G mu_A^T) ] K_A^T; U = Z - P_G^T Z P_A, with P, K, mu the
    modes of a damped side. The inverse of the sum over all d of kron(G_d, A_d).
    """

    def direction(
        self, b: Builder, method: Method, facts: Facts, target: Target, gradient: fx.Node, parts: Parts
    ) -> fx.Node:
        if "A1" not in parts:
            return Inverse().direction(b, method, facts, target, gradient, parts)
        assert method.damp is not None
        with b.within(at=REFRESH):
            damping = method.damp.split(b, facts, parts)
            modes = {c: b.chain_modes(parts[c], parts[f"{c}1"], damping[c]) for c in ("A", "G")}
            (p_a, k_a, mu_a), (p_g, k_g, mu_g) = ([b.item(modes[c], i) for i in range(3)] for c in ("A", "G"))
            gain = b.chain_gain(mu_g, mu_a)
        ahead = b.sub(gradient, b.sides_apply(gradient, p_g, p_a))
        middle = between(b, ahead, k_g, k_a, gain)
        return b.sub(middle, b.sides_apply_transposed(middle, p_g, p_a))
