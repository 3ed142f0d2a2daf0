"""The output factor of a layer from that of the next one: a matrix goes backwards, not gradients (Botev et al. 2017).

G_l = (W^T G_{l+1} W) .* E[f' f'^T], W the next layer's weight without its bias and f' the slopes of the function
between, one row an example. The exact recursion has the expectation outside; here the curvature behind is taken to be
independent of the slopes. Where layers are no plain sequence G is measured.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace

from torch import fx

from fxcurv.errors import FxcurvWarning
from fxcurv.ir.ops.recursion import SLOPES
from fxcurv.ir.program import Builder
from fxcurv.layers.sequence import IDENTITY
from fxcurv.methods.facts import Facts, Target
from fxcurv.methods.method import Method
from fxcurv.methods.parts.estimate import Kron, input_factor
from fxcurv.methods.parts.scope import Layers


def next_in_row(facts: Facts, target: Target) -> Target | None:
    """The layer through which a layer's curvature can be pushed back; ``None`` where it has to be measured."""
    following = next((other for other in facts.targets if other.name == target.feeds), None)
    if following is None or not target.aligned or target.activation not in (IDENTITY, *SLOPES):
        return None
    odd = target.swapped or following.swapped or following.diagonal_input
    return None if odd or max(target.d_out, following.d_in) > facts.max_factor_dim else following


@dataclass(frozen=True)
class Recursive(Kron):
    """K-FAC's A, and G by the recursion where there is a next layer.

    known: output factors of this batch, by layer, in one program.
    """

    known: dict[str, fx.Node] = field(default_factory=dict, compare=False)

    def measure(self, b: Builder, facts: Facts, target: Target) -> dict[str, fx.Node]:
        if next_in_row(facts, target) is None:
            parts = super().measure(b, facts, target)
            self.known.setdefault(target.name, parts["G"])
            return {**parts, "G": self.known[target.name]}
        return {"A": input_factor(b, facts, target), "G": self._output(b, facts, target)}

    def _output(self, b: Builder, facts: Facts, target: Target) -> fx.Node:
        """G of this batch: that of the end of the row, pushed back layer by layer."""
        row = [target]
        while row[-1].name not in self.known and (following := next_in_row(facts, row[-1])) is not None:
            row.append(following)
        if row[-1].name not in self.known:
            with b.within(owner=(row[-1].name,)):
                self.measure(b, facts, row[-1])
        for one, following in reversed(list(zip(row, row[1:], strict=False))):
            with b.within(owner=(one.name,)):
                slope: fx.Node | float = 1.0
                if one.activation != IDENTITY:
                    rows = following.rows(b, "a")
                    slopes = getattr(b, f"slopes_{one.activation}")(rows)
                    slope = b.mean(b.gram(slopes), b.count(rows))
                behind, weights = self.known[following.name], following.weights(b)
                self.known[one.name] = b.pull_back(behind, weights, slope, one.d_out)
        return self.known[target.name]


@dataclass(frozen=True)
class Backwards(Layers):
    """Layers on their own, with one estimate for the whole program, so that each step back is taken once."""

    def emit(self, b: Builder, method: Method, facts: Facts) -> None:
        norms = self.exact_norms
        ends = [t for t in facts.targets if next_in_row(facts, t) is None and not (norms and t.unitwise)]
        broken = [t.name for t in ends if not t.last]
        if broken:
            shown = f"{', '.join(broken[:5])}{' and others' if len(broken) > 5 else ''}"
            warnings.warn(
                f"'{method.name}' measures the output factor of {shown} by gradients, because what follows there is no "
                "known function before a single linear layer.",
                FxcurvWarning,
                stacklevel=2,
            )
        super().emit(b, replace(method, estimate=Recursive()), facts)
