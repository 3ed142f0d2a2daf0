"""Taps: no-op nodes on a layer's output whose backward delivers statistics.

``y = tap(layer(x), x, ..., slots)`` is the identity on y. Its backward passes the gradient g through and returns, *as
the gradient of each slot*, one reduced statistic of the rows of x and g. Slots are leaf tensors outside the model's
parameters. Because a statistic is a gradient, autograd does the bookkeeping: sums over the uses of a tied weight and
over accumulated micro-batches, exactly one reduction under activation checkpointing, no hook that fires twice.

The tap returns ``y.detach()``: a view of y would break an in-place operation after the layer, a clone would cost as
much as a ReLU. The backward is pure; which slots it fills depends only on which ones the running backward pass asks for
(so the plain gradient pass after a curvature pass measures nothing twice), and on the switch of :func:`disarmed`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from fxcurv.ir.op import OPS
from fxcurv.ir.ranges import profiling, ranged, title
from fxcurv.ir.statistic import Call, RowsOf, StateOf, Whole, evaluate, leaves
from fxcurv.layers.form import Form

Reduction = Callable[[Form, Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]], "Tensor | None"]
REDUCTIONS: dict[str, list[tuple[str | None, Reduction]]] = {}
"""Faster ways by statistic pattern such as "gram(a)", each with the backend that it belongs to, ``None`` for any."""


def reduction(pattern: str, backend: str | None = None) -> Callable[[Reduction], Reduction]:
    """Register a way to compute ``pattern`` straight from (form, x, g, aux, states), without building rows.

    It returns ``None`` to decline. One that belongs to a backend is a kernel: it is used with that backend alone.
    """

    def add(function: Reduction) -> Reduction:
        REDUCTIONS.setdefault(pattern, []).append((backend, function))
        return function

    return add


@dataclass(frozen=True)
class TapSpec:
    """What one tap measures: ``statistics[i]`` fills slot i.

    form: normal form of the use. aux: number of auxiliary operands of the form. swapped: whether this use has the
    sides "a2" and "g2". states: keys of the states that the statistics read, in operand order. kernels: function by
    (index of the statistic, number of the call in it, innermost first) where a kernel claimed the op for the types at
    that place; else its reference runs. backends: those whose reductions may be used.
    """

    form: Form
    statistics: tuple[Call | RowsOf, ...]
    aux: int = 0
    states: tuple[str, ...] = ()
    kernels: tuple[tuple[tuple[int, int], Callable[..., Any]], ...] = ()
    backends: tuple[str, ...] = ("aten",)

    def title(self, index: int) -> str:
        """What a profiler calls the measurement of statistic ``index``."""
        expression = self.statistics[index]
        layers = dict.fromkeys(leaf.layer for leaf in leaves(expression) if isinstance(leaf, RowsOf))
        return title(expression.op if isinstance(expression, Call) else "rows", layers)

    def measure(self, index: int, x: Tensor, g: Tensor, extra: tuple[Tensor, ...]) -> Tensor:
        """Statistic ``index`` from the layer's input and output gradient."""
        expression, aux = self.statistics[index], extra[: self.aux]
        dtype = torch.promote_types(g.dtype, torch.float32)  # states keep theirs when a model changes its own
        g, x = g.to(dtype), x.to(dtype) if x.is_floating_point() else x
        states = tuple(state.to(dtype) for state in extra[self.aux :])
        read_states = tuple(states[self.states.index(x.key)] for x in leaves(expression) if isinstance(x, StateOf))
        for backend, fast in REDUCTIONS.get(pattern(expression), ()):
            usable = backend is None or backend in self.backends
            result = fast(self.form, x, g, aux, read_states) if usable else None
            if result is not None:
                return result
        chosen, calls = dict(self.kernels), count()

        def apply(op: str, operands: list[Any]) -> Any:
            return (chosen.get((index, next(calls))) or OPS[op].reference)(*operands)

        loose = self._loose_rows(expression, x, g, aux) if x.device.type == "cpu" or (index, 0) in chosen else None
        if loose is not None:
            gram = apply("gram", [loose])
            return gram if gram.shape[-1] == self._features(expression) else bordered(gram, loose)

        def read(leaf: RowsOf | StateOf) -> Tensor:
            if isinstance(leaf, StateOf):
                return states[self.states.index(leaf.key)]
            return self.form.rows_a(x, *aux) if leaf.side[0] == "a" else self.form.used_rows_g(x, g)

        return evaluate(expression, read, apply)

    def _loose_rows(self, expression: Any, x: Tensor, g: Tensor, aux: tuple[Tensor, ...]) -> Tensor | None:
        """Rows for a Gram by a kernel that need no copy: in any order, and without the constant coordinate."""
        side = pattern(expression)
        if side not in ("gram(a)", "gram(g)"):
            return None
        return self.form.loose_rows_a(x, *aux) if side == "gram(a)" else self.form.loose_rows_g(g)

    def _features(self, expression: Any) -> int:
        return self.form.d_in if pattern(expression) == "gram(a)" else self.form.d_out


def bordered(gram: Tensor, rows: Tensor) -> Tensor:
    """The Gram of rows followed by a constant 1, from the Gram of the rows (n, m, 1, d) without it, (d + 1, d + 1)."""
    d = gram.shape[-1]
    full = gram.new_empty(d + 1, d + 1)
    full[:d, :d] = gram
    full[:d, d] = full[d, :d] = rows.sum((0, 1, 2), dtype=gram.dtype)
    full[d, d] = rows.shape[0] * rows.shape[1]
    return full


def pattern(expression: Call | RowsOf | StateOf | Whole) -> str:
    """The expression without layer names and sizes: ``block_gram(fc.a, 128)`` gives ``block_gram(a, #)``."""
    if isinstance(expression, Call):
        return f"{expression.op}({', '.join(pattern(operand) for operand in expression.operands)})"
    if isinstance(expression, Whole):
        return "#"
    return expression.side[0] if isinstance(expression, RowsOf) else "$"


_armed = True


@contextmanager
def disarmed() -> Iterator[None]:
    """Within this context no tap fills a slot: the plain gradient pass after a curvature pass."""
    global _armed
    before, _armed = _armed, False
    try:
        yield
    finally:
        _armed = before


_asked: frozenset[int] | None = None


@contextmanager
def asking(slots: Iterable[Tensor]) -> Iterator[None]:
    """Within this context ``autograd.grad`` may ask for these slots; otherwise it is the user who calls it."""
    global _asked
    before, _asked = _asked, frozenset(map(id, slots))
    try:
        yield
    finally:
        _asked = before


class Tap(torch.autograd.Function):
    """``Tap.apply(spec, y, x, *aux, *states, *slots) -> y``."""

    @staticmethod
    def forward(ctx: Any, spec: TapSpec, y: Tensor, x: Tensor, *rest: Tensor) -> Tensor:
        extras = rest[: spec.aux + len(spec.states)]
        slots = rest[len(extras) :]
        ctx.spec = spec
        ctx.slot_like = tuple((slot.shape, slot.dtype) for slot in slots)
        ctx.save_for_backward(*spec.form.kept(x, *extras[: spec.aux]), *extras[spec.aux :])
        return y.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *extra = ctx.saved_tensors
        spec: TapSpec = ctx.spec
        wanted = wanted_slots(ctx, len(spec.statistics))

        def value(index: int) -> Tensor:
            shape, dtype = ctx.slot_like[index]
            if not g.numel():  # an empty batch: forms need not know how to lay out its rows
                return g.new_zeros(shape, dtype=dtype)
            operands = (index, x.detach(), g.detach(), tuple(extra))
            found = ranged(spec.title(index), spec.measure, *operands) if profiling() else spec.measure(*operands)
            return found.to(dtype).reshape(shape)

        filled = [value(index) if want else None for index, want in enumerate(wanted)]
        return (None, g, None, *(None for _ in extra), *filled)


def wanted_slots(ctx: Any, count: int) -> list[bool]:
    """Which of a function's last ``count`` inputs, its slots, the running backward pass asks for.

    A compiled backward always computes all of them.
    """
    if torch.compiler.is_compiling():
        return [True] * count
    if not _armed:
        return [False] * count
    edges = [node for node, _ in ctx.next_functions][-count:] if count else []
    if _asked is not None:
        return [node is not None and id(node.variable) in _asked for node in edges]
    try:
        return [node is not None and torch._C._will_engine_execute_node(node) for node in edges]
    except RuntimeError:  # the user runs autograd.grad on the model: nobody asks for a slot
        return [False] * count


def tap(spec: TapSpec, y: Tensor, x: Tensor, *rest: Tensor) -> Tensor:
    """The identity on y with statistics in the gradients of the slots that end ``rest``; see the module docstring."""
    return Tap.apply(spec, y, x, *rest)  # type: ignore[no-any-return]
