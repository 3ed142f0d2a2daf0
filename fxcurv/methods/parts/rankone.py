"""Curvature from mean vectors: means stand for second moments (sheet kronecker-2, eva, mkor).

The mean input and the mean output gradient of a batch cost two vectors a layer where K-FAC's factors cost two matrices,
and make a rank-one Kronecker product, kron(gbar gbar^T, abar abar^T). It is inverted in closed form together with a
multiple of the identity (:class:`ShermanMorrison`), or added to inverses that are kept (:class:`Inverses`). Either way
a direction costs no factorisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxcurv.ir.program import Builder
from fxcurv.ir.types import Diag, Psd
from fxcurv.methods.dense import full, kron
from fxcurv.methods.facts import Facts, Target
from fxcurv.methods.method import Estimate, Method, Solve, Track, curvature_weight, hyper, loss_terms
from fxcurv.methods.parts.estimate import shared_rows

Parts = dict[str, fx.Node]


@dataclass(frozen=True)
class MeanRows(Estimate):
    """The mean input row "abar" and the mean output-gradient row "gbar", over examples and positions.

    outputs: whether "gbar" is measured at all. per_example: scale of its rows, the gradients of single examples' losses
    (True), or these divided by their number N, as backward of a mean loss leaves them (False).
    """

    outputs: bool = True
    per_example: bool = False

    def measure(self, b: Builder, facts: Facts, target: Target) -> Parts:
        inputs = shared_rows(b, facts, target, "a")
        count = b.count(inputs)
        parts = {"abar": b.mean(b.row_sum(inputs), count)}
        if self.outputs:
            weight, terms = curvature_weight(b, facts), loss_terms(b, facts)  # N and N for a mean loss, 1/N and N else
            with b.within(owner=()):
                scale = b.sqrt(b.mul(weight, terms) if self.per_example else b.safe_ratio(weight, terms))
            mean = b.mean(b.row_sum(shared_rows(b, facts, target, "g")), count)
            parts["gbar"] = b.scale(mean, scale)
        return parts

    def block(self, parts: dict[str, Tensor]) -> Tensor | None:
        if "gbar" not in parts:
            return None
        return kron(*(parts[side].unsqueeze(-1) * parts[side].unsqueeze(-2) for side in ("gbar", "abar")))


@dataclass(frozen=True)
class ShermanMorrison(Solve):
    """U = (kron(gbar gbar^T, abar abar^T) + lambda I)^-1 V; without "gbar" U = V (abar abar^T + lambda I)^-1."""

    def direction(
        self, b: Builder, method: Method, facts: Facts, target: Target, gradient: fx.Node, parts: Parts
    ) -> fx.Node:
        damping = hyper(b, facts, "damping")
        if "gbar" not in parts:
            return b.rank1_right_apply(gradient, parts["abar"], damping)
        return b.rank1_apply(gradient, parts["abar"], parts["gbar"], damping)


@dataclass(frozen=True)
class Inverses(Track):
    """Inverses "AI" and "GI" of factors that start as the identity and follow the outer products of "abar", "gbar".

    One measurement x, with weight ``ema`` on the old factor, first the stabiliser: X <- zeta X + (1 - zeta) I if an
    entry of X is larger than ``limit``. Then, by ``update``,
    - "exact": the inverse of ema X^-1 + (1 - ema) x x^T (Sherman-Morrison);
    - "printed": ema X + (1 - ema) / (ema^2 (1 + ema (1 - ema) x^T X x)) X x x^T X, as the paper has it;
    - "package": the inverse of (ema X + (1 - ema) I)^-1 + x x^T, as the authors' code has it.
    A side wider than max_factor_dim, or with one-hot rows, keeps the diagonal of its factor. A layer that was not
    reached keeps its inverses.
    """

    update: str = "exact"

    def follow(self, b: Builder, facts: Facts, target: Target, parts: Parts) -> Parts:
        seen = self.seen(b, facts, target)
        weight, zeta = (_or_one(b, seen, hyper(b, facts, name)) for name in ("ema", "zeta"))
        limit, followed = hyper(b, facts, "limit"), {}
        for side, vector in (("A", parts["abar"]), ("G", parts["gbar"])):
            (*groups, size), dtype = vector.meta["type"].shape, vector.meta["type"].dtype
            diagonal = size > facts.max_factor_dim or (side == "A" and target.diagonal_input)
            type_ = Diag((*groups, size), dtype) if diagonal else Psd((*groups, size, size), dtype)
            key = f"{target.name}.{side}I"
            old = b.input("state", key, type_, init="ones" if diagonal else "eye")
            calm = b.stabilize(old, limit, zeta, diagonal)
            followed[f"{side}I"] = self._updated(b, calm, vector, weight, diagonal)
            b.give("state", key, followed[f"{side}I"])
        return followed

    def seen(self, b: Builder, facts: Facts, target: Target) -> fx.Node:
        """1 where this batch counts, 0 where everything stays as it was."""
        rows = b.count(target.rows(b, "a"))
        return b.safe_ratio(rows, rows)

    def _updated(self, b: Builder, inverse: fx.Node, vector: fx.Node, weight: fx.Node, diagonal: bool) -> fx.Node:
        if self.update != "package":
            return b.rank1_update(inverse, vector, weight, self.update == "printed")
        mixed = b.stabilize(inverse, -1.0, weight, diagonal)  # always above the limit
        return b.scale(b.rank1_update(mixed, vector, 0.5), 0.5)  # 2 (X + x x^T)^-1, exactly twice what is wanted


@dataclass(frozen=True)
class Sides(Solve):
    """U = GI V AI, with inverses that the track keeps."""

    def direction(
        self, b: Builder, method: Method, facts: Facts, target: Target, gradient: fx.Node, parts: Parts
    ) -> fx.Node:
        return b.kron_apply(gradient, parts["GI"], parts["AI"])

    def block(self, parts: dict[str, Tensor]) -> Tensor | None:
        return kron(*(torch.linalg.inv(full(parts[side], parts[side].shape[-1])) for side in ("GI", "AI")))


def _or_one(b: Builder, seen: fx.Node, weight: fx.Node) -> fx.Node:
    """The weight of an old value, and 1 (no change) where nothing was measured: ``seen`` is 1 or 0."""
    return b.sub(1.0, b.mul(seen, b.sub(1.0, weight)))
