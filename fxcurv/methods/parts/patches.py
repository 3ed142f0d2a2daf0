"""Cheaper input factors of convolutions: fewer patches, or none (sheet kronecker-1, kfc).

The Gram of patches, (C K)^2 numbers a patch, is what a convolution costs; its inverse is the largest one of a network.
Both parts leave every layer that is no convolution with K > 1 taps as K-FAC has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxcurv.errors import FxcurvError
from fxcurv.ir.program import REFRESH, Builder
from fxcurv.methods.dense import full, kron
from fxcurv.methods.facts import Facts, Target
from fxcurv.methods.method import Estimate, Method, Solve, flag
from fxcurv.methods.parts.estimate import Kron, output_factor
from fxcurv.methods.parts.solve import Inverse, Parts


@dataclass(frozen=True)
class Subsampled(Kron):
    """K-FAC's factors, with A of a convolution from every ``step``-th position alone, and divided by their number."""

    step: int = 2

    def rows_a(self, b: Builder, facts: Facts, target: Target) -> fx.Node:
        rows = super().rows_a(b, facts, target)
        return b.every_position(rows, self.step) if target.convolution else rows


@dataclass(frozen=True)
class Uncorrelated(Kron):
    """Pixels of a patch uncorrelated: A = kron(Sigma, I_K) + m m^T of a convolution, kept as its channel moments "P".

    P = E[p p^T], p = [x; 1] of the channels x at a tap, over positions and taps: one C x C Gram of pixels, each counted
    as often as patches hold it, padding included.
    """

    def measure(self, b: Builder, facts: Facts, target: Target) -> dict[str, fx.Node]:
        if target.taps == 1:
            return super().measure(b, facts, target)
        rows = target.rows(b, "a", alone=True)
        moments = b.mean(b.channel_gram(rows, target.taps), b.count(rows))
        return {"P": moments, "G": output_factor(b, facts, target)}

    def block(self, parts: dict[str, Tensor]) -> Tensor | None:
        if "P" not in parts:
            return super().block(parts)
        moments, (_, _, d_in, constant) = parts["P"], parts["shape"].tolist()
        mean = moments[..., :-1, -1]
        covariance = moments[..., :-1, :-1] - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        taps = (d_in - constant) // covariance.shape[-1]
        m = torch.cat([mean.repeat_interleave(taps, -1), torch.ones_like(mean[..., :constant])], -1)
        spread = kron(covariance, torch.eye(taps).to(covariance).expand(*covariance.shape[:-2], taps, taps))
        factor = F.pad(spread, (0, constant, 0, constant)) + m.unsqueeze(-1) * m.unsqueeze(-2)
        return kron(full(parts["G"], parts["G"].shape[-1]), factor)


@dataclass(frozen=True)
class PerTap(Solve):
    """U = (G + dG I)^-1 V (kron(Sigma, I_K) + m m^T + dA I)^-1: one C x C inverse, applied at every tap."""

    def direction(
        self, b: Builder, method: Method, facts: Facts, target: Target, gradient: fx.Node, parts: Parts
    ) -> fx.Node:
        if "P" not in parts:
            return Inverse().direction(b, method, facts, target, gradient, parts)
        assert method.damp is not None
        with b.within(at=REFRESH):
            diagonal = b.patch_diagonal(parts["P"], target.taps, int(target.homogeneous))
            damping = method.damp.split(b, facts, {"A": diagonal, "G": parts["G"]})
            pair = b.centred(parts["P"])
            covariance, mean = b.item(pair, 0), b.item(pair, 1)
            inverse_a = b.inverse(covariance, damping["A"])
            inverse_g = b.inverse(parts["G"], damping["G"], *flag(parts["G"]))
        return b.uncorrelated_apply(gradient, inverse_g, inverse_a, mean, damping["A"], target.taps)


def patches(spatial: str, every: int, estimate: Estimate, solve: Solve) -> tuple[Estimate, Solve]:
    """What takes the place of an estimate and a solve; raises :class:`FxcurvError` for settings at odds.

    spatial: "correlated" or "uncorrelated". every: 1 for all positions.
    """
    if spatial not in ("correlated", "uncorrelated"):
        raise FxcurvError(f"spatial='{spatial}' is unknown; choose 'correlated' or 'uncorrelated'.")
    if every < 1 or every != int(every):
        raise FxcurvError(f"position_every={every} must be a whole number, at least 1.")
    if spatial == "correlated" and every == 1:
        return estimate, solve
    if type(estimate) is not Kron or (spatial == "uncorrelated" and every > 1):
        raise FxcurvError(
            "spatial='uncorrelated', position_every and blocks='tridiagonal' are three ways to another input factor; "
            "choose one of them."
        )
    if every > 1:
        return Subsampled(int(every)), solve
    if not isinstance(solve, Inverse):
        raise FxcurvError(
            "spatial='uncorrelated' has no eigenbasis; choose damping_scheme 'pi', 'sqrt' or 'replicated'."
        )
    return Uncorrelated(), PerTap()
