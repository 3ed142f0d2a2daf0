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

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxcurv.ir.op import OPS
from fxcurv.ir.statistic import Call, RowsOf, StateOf, evaluate, leaves
from fxcurv.layers.form import Form

Reduction = Callable[[Form, Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]], "Tensor | None"]
REDUCTIONS: dict[str, Reduction] = {}  # statistic pattern such as "gram(a)" -> a faster way, or None to decline


def reduction(pattern: str) -> Callable[[Reduction], Reduction]:
    """Register a way to compute ``pattern`` straight from (form, x, g, aux, states), without building rows."""

    def add(function: Reduction) -> Reduction:
        REDUCTIONS[pattern] = function
        return function

    return add


@dataclass(frozen=True)
class TapSpec:
    """What one tap measures: ``statistics[i]`` fills slot i.

    form: normal form of the use. aux: number of auxiliary operands of the form. swapped: whether this use has the
    sides "a2" and "g2". states: keys of the states that the statistics read, in operand order. kernels: function by
    op name where a kernel claimed the op; else its reference runs.
    """

    form: Form
    statistics: tuple[Call | RowsOf, ...]
    aux: int = 0
    states: tuple[str, ...] = ()
    kernels: tuple[tuple[str, Callable[..., Any]], ...] = ()

    def measure(self, index: int, x: Tensor, g: Tensor, extra: tuple[Tensor, ...]) -> Tensor:
        """Statistic ``index`` from the layer's input and output gradient."""
        expression, aux = self.statistics[index], extra[: self.aux]
        dtype = torch.promote_types(g.dtype, torch.float32)  # states keep theirs when a model changes its own
        g, x = g.to(dtype), x.to(dtype) if x.is_floating_point() else x
        states = tuple(state.to(dtype) for state in extra[self.aux :])
        fast = REDUCTIONS.get(pattern(expression))
        read_states = tuple(states[self.states.index(x.key)] for x in leaves(expression) if isinstance(x, StateOf))
        result = None if fast is None else fast(self.form, x, g, aux, read_states)
        if result is not None:
            return result
        chosen = dict(self.kernels)

        def read(leaf: RowsOf | StateOf) -> Tensor:
            if isinstance(leaf, StateOf):
                return states[self.states.index(leaf.key)]
            return self.form.rows_a(x, *aux) if leaf.side[0] == "a" else self.form.used_rows_g(x, g)

        return evaluate(expression, read, lambda op, operands: (chosen.get(op) or OPS[op].reference)(*operands))


def pattern(expression: Call | RowsOf | StateOf) -> str:
    """The expression without layer names: ``gram(fc.a)`` gives ``gram(a)``."""
    if isinstance(expression, Call):
        return f"{expression.op}({', '.join(pattern(operand) for operand in expression.operands)})"
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
            return spec.measure(index, x.detach(), g.detach(), tuple(extra)).to(dtype).reshape(shape)

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
    try:
        return [node is not None and torch._C._will_engine_execute_node(node) for node in edges]
    except RuntimeError:  # the user runs autograd.grad on the model: nobody asks for a slot
        return [False] * count


def tap(spec: TapSpec, y: Tensor, x: Tensor, *rest: Tensor) -> Tensor:
    """The identity on y with statistics in the gradients of the slots that end ``rest``; see the module docstring."""
    return Tap.apply(spec, y, x, *rest)  # type: ignore[no-any-return]
