"""THOR's parts: factors of diagonal blocks, and the rule that says when a layer's curvature is taken over.

Sheet kronecker-2, thor (Chen et al. 2021).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from fxcurv.ir.ops.blocks import block_loss, dense_blocks
from fxcurv.ir.program import REFRESH, Builder
from fxcurv.ir.schedule import RETIRED
from fxcurv.ir.types import Scalar
from fxcurv.methods.dense import full, kron
from fxcurv.methods.facts import Facts, Target
from fxcurv.methods.method import Estimate, Method, Solve, curvature_weight, flag, hyper
from fxcurv.methods.parts.estimate import Kron, moment, shared_rows
from fxcurv.methods.parts.solve import Parts
from fxcurv.methods.parts.track import EMA


@dataclass(frozen=True)
class BlockKron(Estimate):
    """K-FAC's factors A and G with nothing but diagonal blocks of ``size`` features.

    A side of at most ``size`` features is one whole matrix; one that is diagonal, by construction or beyond
    max_factor_dim, stays so. A tied embedding and projection has both terms of :class:`Kron`, whose factors are whole.
    """

    size: int = 128

    def measure(self, b: Builder, facts: Facts, target: Target) -> dict[str, fx.Node]:
        if target.swapped:
            return Kron().measure(b, facts, target)
        rows = {"A": shared_rows(b, facts, target, "a"), "G": shared_rows(b, facts, target, "g")}
        inputs = self._moment(b, facts, rows["A"], target.d_in, target.diagonal_input)
        outputs = self._moment(b, facts, rows["G"], target.d_out)
        return {"A": b.mean(inputs, b.count(rows["A"])), "G": b.scale(outputs, curvature_weight(b, facts))}

    def _moment(self, b: Builder, facts: Facts, rows: fx.Node, size: int, diagonal: bool = False) -> fx.Node:
        if diagonal or not self.size < size <= facts.max_factor_dim:
            return moment(b, facts, rows, size, diagonal)
        return b.block_gram(rows, self.size)

    def block(self, parts: dict[str, Tensor]) -> Tensor | None:
        groups, d_out, d_in = parts["shape"].tolist()[:3]
        a, g = (_dense(parts[side], d, groups) for side, d in (("A", d_in), ("G", d_out)))
        return kron(g, a)


def _dense(factor: Tensor, d: int, groups: int) -> Tensor:
    return dense_blocks(factor, d) if factor.ndim - (groups > 1) == 3 else full(factor, d)


@dataclass(frozen=True)
class BlockInverse(Solve):
    """U = (G + dG I)^-1 V (A + dA I)^-1 with sides that may be block-diagonal, all blocks of one inverted at once."""

    def direction(
        self, b: Builder, method: Method, facts: Facts, target: Target, gradient: fx.Node, parts: Parts
    ) -> fx.Node:
        assert method.damp is not None
        with b.within(at=REFRESH):
            damping = method.damp.split(b, facts, parts)
            left, right = (b.inverse(parts[side], damping[side], *flag(parts[side])) for side in ("G", "A"))
        core = len(gradient.meta["type"].shape)
        blocks = any(len(side.meta["type"].shape) > core for side in (left, right))
        return b.block_apply(gradient, left, right) if blocks else b.kron_apply(gradient, left, right)


@dataclass(frozen=True)
class TraceRule(EMA):
    """Takes a layer's batch over only if the trace of its damped block, tr A tr G + lambda d_in d_out, has moved.

    D = |trace - accepted| / accepted, against the trace of the last batch that was taken over: above ``trace_move`` the
    batch counts as in :class:`EMA`; below ``trace_settle`` the layer is retired, that is, never measured or factorised
    again; in between the batch counts as none. The first batch always counts.
    """

    def counted(self, b: Builder, facts: Facts, target: Target, parts: dict[str, fx.Node]) -> fx.Node:
        name, scalar = target.name, facts.scalar()
        count = super().counted(b, facts, target, parts)
        factors = [value for value in parts.values() if not isinstance(value.meta["type"], Scalar)]
        trace = b.block_trace(factors, target.groups)
        size = float(target.groups * target.d_in * target.d_out)
        trace = b.add(trace, b.mul(hyper(b, facts, "damping"), size))
        accepted = b.input("state", f"{name}.trace", scalar, init="zeros")
        retired = b.input("state", f"{name}.{RETIRED}", scalar, init="zeros")
        limits = hyper(b, facts, "trace_move"), hyper(b, facts, "trace_settle")
        found = b.trace_rule(trace, accepted, retired, count, *limits)
        take, accepted, retired = (b.item(found, i) for i in range(3))
        b.give("state", f"{name}.trace", accepted)
        b.give("state", f"{name}.{RETIRED}", retired)
        return b.mul(count, take)


SIZES = (1, 16, 32, 64, 128, 256, 512, 1024, 2048)


def block_size_table(
    factors: dict[str, Tensor], sizes: tuple[int, ...] = SIZES, tolerance: float = 0.01
) -> list[tuple[int, float, float]]:
    """How a block size trades quality for work: (size, share of factors that lose less than ``tolerance``, work).

    factors: dense matrices (d, d) by name. The loss of one is 1 - sqrt(lmax(B B^T) / lmax(A A^T)) with B its diagonal
    blocks; work is the flops of inverting all blocks, d size^2 each, in units of inverting the whole factors. The two
    curves cross where a size is worth choosing: at about 106 in the paper, hence 128 (Chen et al. 2021, section 5).
    """
    matrices = [m for m in factors.values() if m.ndim == 2]
    whole = sum(len(m) ** 3 for m in matrices)
    table = []
    for size in sizes:
        good = [float(block_loss(m, size)) < tolerance for m in matrices]
        work = sum(len(m) * min(size, len(m)) ** 2 for m in matrices)
        table.append((size, sum(good) / max(len(good), 1), work / max(whole, 1)))
    return table
