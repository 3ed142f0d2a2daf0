"""Block-tridiagonal inverse: layers in a row as a chain of Gaussians (sheet kronecker-1, kfac, step 6).

The curvature of neighbours i and j = i + 1 is taken to be kron(G_ij, A_ij), A_ij = E[a_i a_j^T], G_ij = E[g_i g_j^T],
and that of layers further apart to be what follows from it: the gradient of a layer given those of all later ones
depends on the next alone. The inverse is then Xi^T Lambda Xi, Xi unit upper bidiagonal in blocks with -Psi_i beside the
diagonal, and Lambda block-diagonal:

    P_A = A_ij A_j^-1,  P_G = G_ij G_j^-1,  Psi_i V = P_G V P_A^T,
    Lambda_i^-1 = kron(G_i, A_i) - kron(P_G G_ij^T, P_A A_ij^T), and kron(G, A) for the last layer of a row.

A_i and G_i stand for the damped factors. Each term is at most the first one, side by side, so that the difference is
positive: it is diagonalised on either side, K^T A_i K = I and K^T P_A A_ij^T K = diag(s) with 0 <= s < 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from fxcurv.errors import FxcurvError
from fxcurv.ir.program import REFRESH, Builder
from fxcurv.methods.facts import Facts, Target
from fxcurv.methods.method import Estimate, Scope, curvature_weight
from fxcurv.methods.parts.estimate import Kron, shared_rows
from fxcurv.methods.parts.scope import Layers, Problem
from fxcurv.methods.parts.solve import between

FLOOR = 1e-4
"""Smallest 1 - s_G s_A^T: averages of unequal age may be no second moments of anything."""
CROSS = {"A": "CA", "G": "CG"}
"""Names of the parts between a layer and the next, by side."""


def next_of(facts: Facts, target: Target) -> Target | None:
    """The layer that follows this one in a row; ``None`` where the row ends."""
    after = target.feeds if target.aligned else ""
    found = next((other for other in facts.targets if other.name == after), None)
    return found if found is not None and _may_join(facts, target) and _may_join(facts, found) else None


def _may_join(facts: Facts, target: Target) -> bool:
    """Whether both factors are whole matrices and the rows those of examples: patches of two convolutions differ."""
    odd = target.groups != 1 or target.diagonal_input or target.unitwise or target.swapped or target.convolution
    return not odd and max(target.d_in, target.d_out) <= facts.max_factor_dim


@dataclass(frozen=True)
class Neighbours(Kron):
    """K-FAC's factors, and "CA", "CG" between a layer and the next: mean of a_i a_j^T, weighted sum of g_i g_j^T."""

    def measure(self, b: Builder, facts: Facts, target: Target) -> dict[str, fx.Node]:
        parts, following = super().measure(b, facts, target), next_of(facts, target)
        if following is not None:
            (a, g), (next_a, next_g) = ([shared_rows(b, facts, t, s) for s in "ag"] for t in (target, following))
            parts["CA"] = b.mean(b.row_product(a, next_a), b.count(a))
            parts["CG"] = b.scale(b.row_product(g, next_g), curvature_weight(b, facts))
        return parts


@dataclass(frozen=True)
class Link:
    """Between a layer and the next: P_A, P_G (Psi_i V = P_G V P_A^T)."""

    left: fx.Node
    right: fx.Node

    def forth(self, b: Builder, value: fx.Node) -> fx.Node:
        """Psi_i V, from the next layer's shape to this one's."""
        return b.sides_apply(value, self.left, self.right)

    def back(self, b: Builder, value: fx.Node) -> fx.Node:
        """Psi_i^T V, from this layer's shape to the next one's."""
        return b.sides_apply_transposed(value, self.left, self.right)


@dataclass(frozen=True)
class Tridiagonal(Layers):
    """Layers in a row are preconditioned together, U = Xi^T Lambda Xi V; any other layer on its own."""

    def pairs(self, b: Builder, facts: Facts, problems: Iterator[Problem]) -> list[tuple[fx.Node, fx.Node]]:
        by_name = {problem.target.name: problem for problem in problems}
        links: dict[str, Link] = {}
        found: dict[str, fx.Node] = {}
        for name, one in by_name.items():
            following = next_of(facts, one.target)
            if following is None:
                found[name] = self.direction(b, facts, one)
                continue
            other = by_name[following.name]
            with b.within(owner=(name,)):
                links[name], modes, gain = _link(b, facts, one, other)
                ahead = b.sub(one.gradient, links[name].forth(b, other.gradient))
                found[name] = between(b, ahead, *modes, gain)
        middle = dict(found)
        for name, link in links.items():
            after = by_name[name].target.feeds
            with b.within(owner=(after,)):
                found[after] = b.sub(middle[after], link.back(b, middle[name]))
        return [(found[name], one.gradient) for name, one in by_name.items()]


def _link(b: Builder, facts: Facts, one: Problem, other: Problem) -> tuple[Link, tuple[fx.Node, fx.Node], fx.Node]:
    """Psi_i, and what inverts Lambda_i^-1: (K_G, K_A) and 1 / (1 - s_G s_A^T)."""
    (mine, own), (theirs, next_own) = ((p.parts, _damping(b, facts, p)) for p in (one, other))
    assert mine is not None and theirs is not None
    psi, modes = {}, {}
    with b.within(at=REFRESH):
        for side, cross in CROSS.items():
            psi[side] = b.right_apply(mine[cross], b.inverse(theirs[side], next_own[side]))
            explained = b.explained(psi[side], mine[cross])
            modes[side] = b.pencil_modes(mine[side], explained, own[side])
        (k_a, s_a), (k_g, s_g) = ([b.item(modes[side], i) for i in range(2)] for side in CROSS)
        gain = b.two_term_gain(s_g, s_a, FLOOR, -1)
    return Link(psi["G"], psi["A"]), (k_g, k_a), gain


def _damping(b: Builder, facts: Facts, one: Problem) -> dict[str, fx.Node]:
    assert one.method.damp is not None and one.parts is not None
    with b.within(at=REFRESH):
        return one.method.damp.split(b, facts, one.parts)


BLOCKS: dict[str, tuple[Scope, Estimate]] = {
    "diagonal": (Layers(), Kron()),
    "tridiagonal": (Tridiagonal(), Neighbours()),
}
"""Scope and estimate by the name of what is kept of the curvature between layers."""


def blocks(name: str) -> tuple[Scope, Estimate]:
    """The scope and the estimate of a name; raises :class:`FxcurvError` for an unknown one."""
    if name not in BLOCKS:
        raise FxcurvError(f"blocks='{name}' is unknown; choose one of {', '.join(BLOCKS)}.")
    return BLOCKS[name]
