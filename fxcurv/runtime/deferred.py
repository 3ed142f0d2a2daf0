"""Deferred taps: what small layers' statistics are made of, noted in the forward pass and reduced all at once.

A tap that the pass ``defer`` chose is no node of the graph. In the forward pass it notes its input, by reference, and
where the gradient of its output will be found. An empirical source reads that in the user's own backward pass, through
a hook on the node that made the output, and reduces when the pass is over. A sampled or exact source asks autograd for
the gradients at all noted places, behind the outputs that it back-propagates columns from. Taps of one kind are stacked
along the axis of groups, for which every reduction has a formula already, and the results stay in stacks: the program
may want them so (:mod:`fxcurv.passes.batch`).

What is noted lives as long as the graph: hooks hang on its nodes, and the notes of a forward pass on the node of its
output. So a forward pass that nobody goes back through leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from fxcurv.ir.op import OPS
from fxcurv.ir.statistic import RowsOf, StateOf, evaluate, leaves
from fxcurv.kernels.triton.family import Specialised
from fxcurv.kernels.triton.grouped import together
from fxcurv.layers.tap import pattern
from fxcurv.passes.defer import DeferredTap

Deliver = Callable[[tuple[str, ...], Tensor], None]
"""(keys of statistics, their values in a stack, a row for each key)."""


@dataclass(frozen=True)
class Noted:
    """One use of a layer: its tap, input and the states that its statistics read."""

    tap: DeferredTap
    x: Tensor
    states: tuple[Tensor, ...]


@dataclass(frozen=True)
class Found:
    """A noted use and the gradient of its output."""

    noted: Noted
    g: Tensor


@dataclass(eq=False)
class Notes:
    """What one forward pass noted, for sources that ask: the uses, the places of their gradients, and the nodes that
    the forward's inputs come from (other forward passes may lie behind them)."""

    noted: list[Noted] = field(default_factory=list)
    edges: list[GradientEdge] = field(default_factory=list)
    before: tuple[Node, ...] = ()

    def note(self, tap: DeferredTap, y: Tensor, x: Tensor, states: tuple[Tensor, ...]) -> Tensor:
        """Note a use; returns y, or a copy that in-place operations cannot cut from its gradient."""
        # Within a backward pass a checkpoint computes the forward again: gradients arrive where it was first computed.
        if not y.requires_grad or torch._C._current_graph_task_id() != -1:
            return y
        y = of_its_own(y)
        self.noted.append(Noted(tap, x.detach(), states))
        self.edges.append(GradientEdge(y.grad_fn, y.output_nr))  # type: ignore[arg-type]
        return y


class Arrivals:
    """What backward passes of the user's leave at noted uses; ``deliver`` takes every statistic when one is over."""

    def __init__(self, deliver: Deliver) -> None:
        self.deliver = deliver
        self.found: list[Found] = []
        self.task = -1
        self.wanted = False

    def note(self, tap: DeferredTap, y: Tensor, x: Tensor, states: tuple[Tensor, ...]) -> Tensor:
        """Note a use; see :meth:`Notes.note`."""
        if not y.requires_grad:
            return y
        y = of_its_own(y)
        node: Any = y.grad_fn
        node.register_prehook(partial(self.arrive, Noted(tap, x.detach(), states), node.next_functions, y.output_nr))
        return y

    def arrive(self, noted: Noted, behind: Any, index: int, gradients: tuple[Tensor | None, ...]) -> None:
        """Called by autograd with the gradients of a noted output."""
        task = torch._C._current_graph_task_id()
        if task != self.task:  # the first one of this backward pass; what a failed pass left is dropped
            self.found, self.task, self.wanted = [], task, _accumulates(behind)
            if self.wanted:
                torch.autograd.Variable._execution_engine.queue_callback(self.reduce)  # type: ignore[attr-defined]
        g = gradients[index]
        if self.wanted and g is not None:
            self.found.append(Found(noted, g.detach()))

    def reduce(self) -> None:
        """Turn what has arrived into statistics."""
        found, self.found, self.task = self.found, [], -1
        reduce_together(found, self.deliver)


def of_its_own(y: Tensor) -> Tensor:
    """y, copied where it is a view: an operation in place would give its base another history, and y's node none."""
    return y.clone() if y._is_view() else y


def _accumulates(behind: Any) -> bool:
    """Whether the running pass fills ``.grad`` of what lies behind a node: a call of ``autograd.grad`` does not."""
    stack, seen = [node for node, _ in behind], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            try:
                return torch._C._will_engine_execute_node(node)
            except RuntimeError:
                return False
        stack += [following for following, _ in node.next_functions]
    return True


def reduce_together(found: Iterable[Found], deliver: Deliver, input_side: bool = True) -> None:
    """Give ``deliver`` every statistic of the found uses, taps of one kind and size reduced as one, in graph order.

    input_side: whether to take also what depends on inputs alone, which is the same for every column of one batch.
    """
    groups: dict[Any, list[Found]] = {}
    for one in found:
        x, g = one.noted.x, one.g
        key = id(one.noted.tap.kind), x.shape, g.shape, x.dtype, g.dtype, x.device
        groups.setdefault(key, []).append(one)
    with torch.no_grad():
        for group in groups.values():
            group.sort(key=lambda one: one.noted.tap.order)
            with torch.autocast(group[0].g.device.type, enabled=False):
                _reduce(group, deliver, input_side)


def _reduce(group: Sequence[Found], deliver: Deliver, input_side: bool) -> None:
    first = group[0].noted
    spec = first.tap.spec
    dtype = torch.promote_types(group[0].g.dtype, torch.float32)
    sides: dict[str, Tensor] = {}

    def rows(side: str) -> Tensor:
        """Rows (b, s, layers, d) of one side."""
        if side not in sides:
            parts = torch.stack([one.noted.x if side == "a" else one.g for one in group]).to(dtype)
            flat = spec.form.rows_a(parts) if side == "a" else spec.form.rows_g(parts)  # (layers, b s, 1, d)
            b = parts.shape[1] if parts.dim() > 2 else 1
            sides[side] = flat.reshape(len(group), b, -1, flat.shape[-1]).permute(1, 2, 0, 3)
        return sides[side]

    def read(leaf: RowsOf | StateOf) -> Tensor:
        if isinstance(leaf, RowsOf):
            return rows(leaf.side[0])
        index = spec.states.index(leaf.key)
        states = [one.noted.states[index].to(dtype) for one in group]
        return states[0] if len(group) == 1 else torch.stack(states)

    for i, expression in enumerate(spec.statistics):
        if not input_side and all(isinstance(x, RowsOf) and x.side[0] == "a" for x in leaves(expression)):
            continue
        value = _grams(group, i, dtype) if len(group) > 1 else None
        if value is None:
            value = evaluate(expression, read, lambda op, operands: OPS[op].reference(*operands))
        if value.ndim == 0 or len(group) == 1:
            value = value.expand(len(group), *value.shape)
        deliver(tuple(one.noted.tap.keys[i] for one in group), value)


def _grams(group: Sequence[Found], index: int, dtype: torch.dtype) -> Tensor | None:
    """Statistic ``index`` of all layers where it is a Gram that a generated kernel takes from where the rows lie."""
    spec = group[0].noted.tap.spec
    form, side, kernel = spec.form, pattern(spec.statistics[index]), dict(spec.kernels).get((index, 0))
    if not isinstance(kernel, Specialised):  # before rows are laid out one by one, which is what costs on the CPU
        return None
    if side == "gram(a)":
        rows, d = [form.loose_rows_a(one.noted.x) for one in group], form.d_in
    elif side == "gram(g)":
        rows, d = [form.rows_g(one.g) for one in group], form.d_out
    else:
        return None
    found = [x.to(dtype) for x in rows if x is not None]
    return together(kernel, found, d) if len(found) == len(rows) else None
