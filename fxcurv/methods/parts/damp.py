"""Dampings (sheet kronecker-1, Damping): how a strength lambda is split over the factors of a layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fxcurv.ir.program import Builder
from fxcurv.methods.facts import Facts
from fxcurv.methods.method import Damp, hyper, is_diagonal


@dataclass(frozen=True)
class PiSplit(Damp):
    """Factored Tikhonov, scheme 2: A + pi sqrt(lambda) I and G + sqrt(lambda)/pi I with the trace-norm pi."""

    def split(self, b: Builder, facts: Facts, factors: dict[str, fx.Node]) -> dict[str, fx.Node]:
        root = b.sqrt(hyper(b, facts, "damping"))
        diagonal = [is_diagonal(factors[part]) for part in ("A", "G")]
        pi = b.pi_split(factors["A"], factors["G"], *(diagonal if any(diagonal) else ()))
        return {"A": b.mul(pi, root), "G": b.div(root, pi)}


@dataclass(frozen=True)
class Factored(Damp):
    """Factored Tikhonov with pi = 1, scheme 5: sqrt(lambda) on either factor."""

    def split(self, b: Builder, facts: Facts, factors: dict[str, fx.Node]) -> dict[str, fx.Node]:
        root = b.sqrt(hyper(b, facts, "damping"))
        return dict.fromkeys(factors, root)


@dataclass(frozen=True)
class Tikhonov(Damp):
    """lambda itself, on the one factor or on the whole block (scheme 1)."""

    def split(self, b: Builder, facts: Facts, factors: dict[str, fx.Node]) -> dict[str, fx.Node]:
        return dict.fromkeys(factors, hyper(b, facts, "damping"))
