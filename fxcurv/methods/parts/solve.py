"""Solves: from tracked curvature and a gradient to a direction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, fx

from fxcurv.ir.program import REFRESH, STATISTICS, Builder
from fxcurv.ir.schedule import FIRST, NEVER
from fxcurv.ir.types import Diag, Orth, Type
from fxcurv.methods.dense import full, kron
from fxcurv.methods.facts import Facts, Target
from fxcurv.methods.method import Damp, Method, Solve, curvature_weight, flag, hyper, is_diagonal, loss_terms
from fxcurv.methods.parts.damp import Tikhonov, sides_of

Parts = dict[str, fx.Node]


@dataclass(frozen=True)
class Inverse(Solve):
    """U = (G + dG I)^-1 V (A + dA I)^-1 by Cholesky factorisations; a side without a factor is left alone.

    An estimate c kron(G, A) has sqrt(c) in either factor before it is damped.
    """

    def direction(
        self, b: Builder, method: Method, facts: Facts, target: Target, gradient: fx.Node, parts: Parts
    ) -> fx.Node:
        assert method.damp is not None
        with b.within(at=REFRESH):
            sides, scale = sides_of(parts), scale_of(b, method, parts)
            if scale is not None:
                root = b.sqrt(scale)
                sides = {side: b.mul(factor, root) for side, factor in sides.items()}
            damping = method.damp.split(b, facts, {**parts, **sides})
            inverse = {side: b.inverse(sides[side], damping[side], *flag(sides[side])) for side in sides}
        if "G" not in inverse:
            return b.right_apply(gradient, inverse["A"])
        return b.kron_apply(gradient, inverse["G"], inverse["A"])


@dataclass(frozen=True)
class Eigen(Solve):
    """The whole block damped exactly: U = Q_G [ (Q_G^T V Q_A) / (e_G e_A^T + lambda) ] Q_A^T (damping scheme 1).

    Other spectral schemes put something else in the place of the sum. A block of one factor is put together again,
    U = V Q_A diag(1 / (e_A + lambda)) Q_A^T.
    """

    def direction(
        self, b: Builder, method: Method, facts: Facts, target: Target, gradient: fx.Node, parts: Parts
    ) -> fx.Node:
        if "G" not in parts:
            with b.within(at=REFRESH):
                values, basis = eigenpairs(b, parts["A"])
                inverse = b.recompose(damping_of(method).divide(b, facts, b.one_like(values), values), basis)
            return b.right_apply(gradient, inverse)
        with b.within(at=REFRESH):
            (e_a, q_a), (e_g, q_g) = eigenpairs(b, parts["A"]), eigenpairs(b, parts["G"])
            spectrum = products(b, method, parts, e_g, e_a)
        return in_basis(b, method, facts, gradient, q_g, q_a, spectrum)


@dataclass(frozen=True)
class Corrected(Solve):
    """EKFAC: the eigenbasis of A and G, with the second moment of each example's gradient in it (George et al. 2018).

    The basis is refreshed with the factorisations; there the second moment S restarts from the eigenvalue products, so
    that it is never read in a basis in which it was not measured. Between refreshes S follows the batches.
    basis: "eigh" decomposes at every refresh; "qr" in the first (and when a refresh is asked for), and then follows the
    factor by one step of orthogonal iteration. ema: name of the number that is the weight of the old S.
    """

    basis: str = "eigh"
    ema: str = "ema"

    def direction(
        self, b: Builder, method: Method, facts: Facts, target: Target, gradient: fx.Node, parts: Parts
    ) -> fx.Node:
        name = target.name
        if self.basis == "qr":
            b.program.cadences.setdefault(FIRST, NEVER)
        with b.within(at=FIRST if self.basis == "qr" else REFRESH):
            (e_a, new_a), (e_g, new_g) = eigenpairs(b, parts["A"]), eigenpairs(b, parts["G"])
            renewed = [(new_a, new_g, products(b, method, parts, e_g, e_a))]
        old_a = b.input("state", f"{name}.QA", new_a.meta["type"], init=_identity(new_a.meta["type"]))
        old_g = b.input("state", f"{name}.QG", new_g.meta["type"], init=_identity(new_g.meta["type"]))
        if self.basis == "qr":
            with b.within(at=REFRESH):
                (e_a, new_a), (e_g, new_g) = tracked(b, parts["A"], old_a), tracked(b, parts["G"], old_g)
                renewed = [(new_a, new_g, products(b, method, parts, e_g, e_a)), *renewed]
        second = b.input("state", f"{name}.S", renewed[0][2].meta["type"], init="zeros")
        q_a, q_g = old_a, old_g
        for new_a, new_g, _ in renewed:  # what is due less often comes first
            q_a, q_g = b.latest(new_a, q_a), b.latest(new_g, q_g)
        spectrum = self.followed(b, facts, target, second, (old_g, old_a), lambda: b.rotate(gradient, q_g, q_a))
        for *_, restart in renewed:
            spectrum = b.latest(restart, spectrum)
        b.give("state", f"{name}.QA", q_a)
        b.give("state", f"{name}.QG", q_g)
        b.give("state", f"{name}.S", spectrum)
        return in_basis(b, method, facts, gradient, q_g, q_a, spectrum)

    def followed(
        self,
        b: Builder,
        facts: Facts,
        target: Target,
        second: fx.Node,
        basis: tuple[fx.Node, fx.Node],
        rotated: Callable[[], fx.Node],
    ) -> fx.Node:
        """S of a step without refresh, from the last one: averaged over batches, in the last step's ``basis``.

        rotated: writes the gradient in the coming basis.
        """
        updates = b.input("state", f"{target.name}.S_updates", facts.scalar(), init="zeros")
        with b.within(at=STATISTICS):
            rows_a, rows_g = target.rows(b, "a"), target.rows(b, "g")
            count = b.count(rows_a)
            measured = b.scale(b.second_moment(rows_a, rows_g, *reversed(basis)), curvature_weight(b, facts))
            weight = b.ema_weight(updates, count, hyper(b, facts, self.ema))
            followed, ticked = b.ema(second, measured, weight), b.tick(updates, count)
        with b.within(at=REFRESH):
            one = b.one_like(updates)
        b.give("state", f"{target.name}.S_updates", b.latest(one, b.latest(ticked, updates)))
        return b.latest(followed, second)

    def block(self, parts: dict[str, Tensor]) -> Tensor | None:
        d_out, d_in = parts["S"].shape[-2:]
        basis = kron(full(parts["QG"], d_out), full(parts["QA"], d_in))
        return basis @ (parts["S"].flatten(-2).unsqueeze(-1) * basis.mT)


@dataclass(frozen=True)
class Running(Corrected):
    """EKFAC-ra: S follows N times the square of the *mean* gradient in the basis, in every step and without rows.

    A mean of N independent terms has a variance N times smaller than one of them, and that is all it measures.
    """

    def followed(
        self,
        b: Builder,
        facts: Facts,
        target: Target,
        second: fx.Node,
        basis: tuple[fx.Node, fx.Node],
        rotated: Callable[[], fx.Node],
    ) -> fx.Node:
        key = f"{target.name}.terms"  # a step without statistics does not count its terms
        terms = b.latest(loss_terms(b, facts), b.input("state", key, facts.scalar(), init="zeros"))
        b.give("state", key, terms)
        return b.moving(second, b.scale(b.square(rotated()), terms), hyper(b, facts, self.ema))


@dataclass(frozen=True)
class Divide(Solve):
    """U = V / (D + lambda), elementwise."""

    def direction(
        self, b: Builder, method: Method, facts: Facts, target: Target, gradient: fx.Node, parts: Parts
    ) -> fx.Node:
        return b.damped_divide(gradient, parts["D"], hyper(b, facts, "damping"))


def eigenpairs(b: Builder, factor: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Eigenvalues and basis of a factor."""
    pairs = b.eigh(factor, *flag(factor))
    return b.item(pairs, 0), b.item(pairs, 1)


def tracked(b: Builder, factor: fx.Node, basis: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The same from the last basis; a diagonal has one basis for ever."""
    if is_diagonal(factor):
        return eigenpairs(b, factor)
    pairs = b.track_basis(factor, basis)
    return b.item(pairs, 0), b.item(pairs, 1)


def scale_of(b: Builder, method: Method, parts: Parts) -> fx.Node | None:
    """The number c of an estimate c kron(G, A), ``None`` for 1."""
    return None if method.estimate is None else method.estimate.scale(b, parts)


def products(b: Builder, method: Method, parts: Parts, e_g: fx.Node, e_a: fx.Node) -> fx.Node:
    """Eigenvalues of the estimate c kron(G, A), Mat (o, i) or (G, o, i)."""
    spectrum, scale = b.outer(e_g, e_a), scale_of(b, method, parts)
    return spectrum if scale is None else b.mul(spectrum, scale)


def damping_of(method: Method) -> Damp:
    """The method's damping; the whole block's where it has none of its own."""
    return Tikhonov() if method.damp is None else method.damp


def in_basis(
    b: Builder, method: Method, facts: Facts, gradient: fx.Node, q_g: fx.Node, q_a: fx.Node, spectrum: fx.Node
) -> fx.Node:
    """Q_G [ (Q_G^T V Q_A) / (spectrum + lambda) ] Q_A^T, or as the method's damping puts lambda in."""
    scaled = damping_of(method).divide(b, facts, b.rotate(gradient, q_g, q_a), spectrum)
    return b.rotate_back(scaled, q_g, q_a)


def between(b: Builder, value: fx.Node, left: fx.Node, right: fx.Node, gain: fx.Node) -> fx.Node:
    """L [ gain * (L^T value R) ] R^T."""
    return b.sides_apply(b.mul(gain, b.sides_apply_transposed(value, left, right)), left, right)


def _identity(type_: Type) -> str:
    assert isinstance(type_, (Orth, Diag))
    return "eye" if isinstance(type_, Orth) else "ones"
