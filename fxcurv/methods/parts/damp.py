"""Dampings (sheet kronecker-1, Damping): how a strength lambda is put into the curvature of a layer.

Either every factor gets its share (:meth:`Damp.split`, for solves by inverses of factors), or the eigenvalues of the
whole block do (:meth:`Damp.divide`, for solves in an eigenbasis). How large lambda is in a layer is the
:class:`~fxcurv.methods.parts.strength.Strength`'s business.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from typing import TypeVar

from torch import fx

from fxcurv.ir.program import Builder
from fxcurv.ir.types import Mat
from fxcurv.methods.facts import Facts, Target
from fxcurv.methods.method import Damp, flag, is_diagonal, loss_terms
from fxcurv.methods.parts.estimate import shared_rows
from fxcurv.methods.parts.strength import Fixed, Strength, told

SIDES = ("A", "G")
Self = TypeVar("Self", bound="Strong")


@dataclass(frozen=True)
class Strong(Damp):
    """Abstract: a damping with a strength. layer: which one it is for, "" for any.

    A lambda that is not ``damping`` itself is given as ``info['lambda.<layer>']``.
    """

    strength: Strength = Fixed()
    layer: str = ""

    def at(self: Self, facts: Facts, target: Target) -> Self:
        return replace(self, strength=self.strength.at(facts, target), layer=target.name)

    def order(self, targets: tuple[Target, ...]) -> tuple[Target, ...]:
        return self.strength.order(targets)

    def of_factors(self, b: Builder, facts: Facts, factors: dict[str, fx.Node]) -> fx.Node:
        """lambda for a block that is the Kronecker product of its factors (or the one factor)."""
        sides = sides_of(factors)
        size = prod(factor.meta["type"].shape[-1] for factor in sides.values())
        return self._told(b, self.strength.of(b, facts, lambda: _product(b, means(b, sides)), size))

    def of_spectrum(self, b: Builder, facts: Facts, spectrum: fx.Node) -> fx.Node:
        """lambda for a block with these eigenvalues, Mat (o, i) or (G, o, i), or Vec of a one-factor block."""
        dims = dims_of(spectrum)
        size = prod(spectrum.meta["type"].shape[-dims:])
        return self._told(b, self.strength.of(b, facts, lambda: b.entries_mean(spectrum, dims), size))

    def _told(self, b: Builder, strength: fx.Node) -> fx.Node:
        if self.layer and strength.op != "placeholder":
            b.give("info", told(self.layer), strength)
        return strength

    def divide(self, b: Builder, facts: Facts, value: fx.Node, spectrum: fx.Node) -> fx.Node:
        return b.damped_divide(value, spectrum, self.of_spectrum(b, facts, spectrum))


@dataclass(frozen=True)
class PiSplit(Strong):
    """Factored Tikhonov, scheme 2: A + pi sqrt(lambda) I and G + sqrt(lambda)/pi I with the trace-norm pi.

    In general, of k factors with mean diagonals c_i and c their product, factor i gets c_i (lambda / c)^(1/k): each
    divided by its c_i gets the same. One factor gets lambda.
    """

    def split(self, b: Builder, facts: Facts, factors: dict[str, fx.Node]) -> dict[str, fx.Node]:
        if any(side not in factors for side in SIDES):
            return self._even(b, facts, factors)
        root = b.sqrt(self.of_factors(b, facts, factors))
        diagonal = [is_diagonal(factors[part]) for part in SIDES]
        pi = b.pi_split(factors["A"], factors["G"], *(diagonal if any(diagonal) else ()))
        return {"A": b.mul(pi, root), "G": b.div(root, pi)}

    def _even(self, b: Builder, facts: Facts, factors: dict[str, fx.Node]) -> dict[str, fx.Node]:
        sizes = {part: b.or_one(mean) for part, mean in means(b, factors).items()}
        ratio = b.div(self.of_factors(b, facts, factors), _product(b, sizes))
        share = b.power(ratio, 1.0 / len(factors))
        return {part: b.mul(size, share) for part, size in sizes.items()}


@dataclass(frozen=True)
class Factored(Strong):
    """Factored Tikhonov with pi = 1, scheme 5: sqrt(lambda) on either factor."""

    def split(self, b: Builder, facts: Facts, factors: dict[str, fx.Node]) -> dict[str, fx.Node]:
        root = b.sqrt(self.of_factors(b, facts, factors))
        return dict.fromkeys(factors, root)


@dataclass(frozen=True)
class Replicated(Strong):
    """Factored Tikhonov of the averaged split, scheme 3: sqrt(lambda / T) on A and on G / T, with T outside.

    T is the number of rows of a loss term, the positions of a convolution. G here is a sum over them: averaged,
    G / T + sqrt(lambda / T) I, times T, is G + sqrt(lambda T) I. With the trace-norm pi the same T cancels. T is at
    least 1: a loss that counts every output as a term does not make less than one position of a layer.
    """

    def measure(self, b: Builder, facts: Facts, target: Target) -> dict[str, fx.Node]:
        return {"repeats": b.mean(b.count(shared_rows(b, facts, target, "a")), loss_terms(b, facts))}

    def split(self, b: Builder, facts: Facts, factors: dict[str, fx.Node]) -> dict[str, fx.Node]:
        strength, repeats = self.of_factors(b, facts, factors), b.at_least(factors["repeats"], 1.0)
        return {"A": b.sqrt(b.div(strength, repeats)), "G": b.sqrt(b.mul(strength, repeats))}


@dataclass(frozen=True)
class Tikhonov(Strong):
    """lambda itself, on the one factor or on the whole block (scheme 1)."""

    def split(self, b: Builder, facts: Facts, factors: dict[str, fx.Node]) -> dict[str, fx.Node]:
        return dict.fromkeys(factors, self.of_factors(b, facts, factors))


@dataclass(frozen=True)
class Floor(Tikhonov):
    """max(e, lambda) in place of e + lambda: eigenvalues above lambda stay as they are (scheme 4)."""

    def divide(self, b: Builder, facts: Facts, value: fx.Node, spectrum: fx.Node) -> fx.Node:
        return b.div(value, b.at_least(spectrum, self.of_spectrum(b, facts, spectrum)))


@dataclass(frozen=True)
class Mask(Tikhonov):
    """e + lambda, without the directions whose e is below 1e-10 of the block's largest: these get no step (scheme 4).

    In float32 the bound is the rounding error, 1.2e-7: below it an eigenvalue is noise.
    """

    def divide(self, b: Builder, facts: Facts, value: fx.Node, spectrum: fx.Node) -> fx.Node:
        return b.masked_divide(value, spectrum, self.of_spectrum(b, facts, spectrum), dims_of(spectrum))


def sides_of(parts: dict[str, fx.Node]) -> dict[str, fx.Node]:
    """The Kronecker factors among the parts of an estimate."""
    return {side: parts[side] for side in SIDES if side in parts}


def means(b: Builder, factors: dict[str, fx.Node]) -> dict[str, fx.Node]:
    """Mean eigenvalue of every factor, a Scalar or one a group."""
    return {part: b.mean_diagonal(factor, *flag(factor)) for part, factor in factors.items()}


def dims_of(spectrum: fx.Node) -> int:
    """Dimensions of the eigenvalues of one block: a table (o, i), or a vector of those of one factor."""
    return 2 if isinstance(spectrum.meta["type"], Mat) else 1


def _product(b: Builder, numbers: dict[str, fx.Node]) -> fx.Node:
    return reduce(lambda x, y: b.mul(x, y), numbers.values())
