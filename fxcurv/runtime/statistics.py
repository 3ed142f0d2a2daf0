"""Statistics between a backward pass and the step that consumes them.

Slots are leaves that live outside the model's parameters; autograd adds each statistic to their ``.grad``. A sampled or
exact source runs its own backward passes and takes the gradients out at once (``collect``); after a plain
``loss.backward()`` they are found in the slots. So what lies where tells which call produced it, and a wrong source is
an error that says what to call instead of a curvature of the wrong kind.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.ir.statistic import Call, RowsOf, StateOf, leaves, parse_statistic
from fxcurv.ir.types import Type
from fxcurv.layers.tap import wanted_slots
from fxcurv.losses import Loss
from fxcurv.passes.tap import Slot
from fxcurv.runtime.deferred import Arrivals, Notes
from fxcurv.runtime.stacks import Stacks

TERMS = "terms"


class Statistics:
    """The statistics that have arrived since the last step.

    types: the program's statistic inputs that taps deliver, by key.
    """

    def __init__(self, types: dict[str, Type]) -> None:
        self.types = types
        self.measured: frozenset[str] | None = None
        self.slots: dict[tuple[str, torch.device], Tensor] = {}
        self.latest: dict[str, Tensor] = {}
        self.ready: dict[Any, tuple[Any, list[Any]]] = {}
        self.arrivals = Arrivals(self.deliver)
        self.fresh: list[tuple[str, Tensor]] = []
        self.sums: dict[str, Tensor] = {}
        self.pending = Stacks()
        self.stacks = Stacks()
        self.rows: dict[str, list[Tensor]] = {}
        self.terms: Tensor | float = 0.0
        self.collected = False

    def fresh_slot(self, key: str, dtype: torch.dtype, rows: Tensor) -> Tensor:
        """A new leaf shaped like ``rows``, for rows that are kept as they are."""
        self.fresh.append((key, leaf(rows.shape, dtype, rows.device)))
        return self.fresh[-1][1]

    def slot(self, slot: Slot, device: torch.device) -> Tensor:
        """The leaf of a slot of fixed size."""
        assert slot.shape is not None
        key = (slot.key, device)
        if key not in self.slots:
            made = leaf(slot.shape, slot.dtype, device)
            self.slots[key] = made if self.measured is None or slot.key in self.measured else made.detach()
        found = self.slots[key]
        if self.latest.get(slot.key) is not found:
            self.latest[slot.key] = found
        return found

    def measure_only(self, keys: frozenset[str] | None) -> None:
        """Measure the statistics of these keys alone, ``None`` for all: taps skip a slot that needs no gradient."""
        if keys != self.measured:
            self.measured = keys
            for known in [known for known in self.slots if not known[0].startswith(TERMS)]:
                del self.slots[known]
            self.latest.clear()
            self.ready.clear()

    def deliver(self, keys: tuple[str, ...], value: Tensor) -> None:
        """Take what deferred taps have measured: statistics of one type in a stack."""
        type_ = self.types[keys[0]]
        self.pending.add(keys, value.to(type_.dtype).reshape(len(keys), *type_.shape))  # type: ignore[arg-type]

    def terms_slot(self, device: torch.device, index: int = 0) -> Tensor:
        """The slot that counts loss terms at one of the model's outputs."""
        key = (f"{TERMS}/{index}", device)
        if key not in self.slots:
            self.slots[key] = leaf((), torch.float64, device)
        return self.slots[key]

    @property
    def arrived(self) -> bool:
        """Whether any statistic is there."""
        return self.collected or self.plain

    @property
    def plain(self) -> bool:
        """Whether a backward pass that nobody collected from has filled slots."""
        if self.pending:
            return True
        return any(s.grad is not None for s in self.slots.values()) or any(s.grad is not None for _, s in self.fresh)

    def targets(self, first: bool) -> list[Tensor]:
        """Slots that one backward pass of a source fills.

        The input side of a reduction is the same in every pass, so only the first one asks for it, unless rows are
        kept: then each pass delivers pairs.
        """
        everything = first or bool(self.fresh)
        kept = [s for (key, _), s in self.slots.items() if not key.startswith(TERMS) and (everything or _reads_g(key))]
        kept = [s for s in kept if s.requires_grad]
        return kept + [s for _, s in self.fresh]

    def collect(self) -> None:
        """Take what the slots hold."""
        for (key, _), slot in self.slots.items():
            if slot.grad is not None and not key.startswith(TERMS):
                known = self.sums.get(key)
                self.sums[key] = slot.grad if known is None else known + slot.grad.to(known.device)
            slot.grad = None
        self.stacks.take(self.pending)
        self.collect_rows()
        self.collected = True

    def collect_rows(self) -> None:
        """Take the rows that the fresh slots hold, in the order of the passes."""
        for key, slot in self.fresh:
            if slot.grad is not None:
                self.rows.setdefault(key, []).append(slot.grad)
                slot.grad = None

    def take_plain(self) -> None:
        """Accept what a plain backward pass left: sums and the number of loss terms counted at the outputs.

        Raises :class:`FxcurvError` when the backward reached the layers, but none of the model's outputs.
        """
        counts = [float(s.grad) for (key, _), s in self.slots.items() if key.startswith(TERMS) and s.grad is not None]
        if not counts:
            raise FxcurvError(
                "the loss reached layers of the model but none of its outputs, so its terms could not be counted: call "
                "model.backward(loss, outputs) in place of loss.backward()."
            )
        self.terms = self.terms + max(counts)
        self.collect()

    def forget_slots(self) -> None:
        """Drop what a plain gradient pass left in the slots after a collected one."""
        for slot in self.slots.values():
            slot.grad = None
        self.pending.clear()
        self.fresh.clear()

    def discard(self) -> None:
        """Drop everything."""
        self.forget_slots()
        self.sums.clear()
        self.stacks.clear()
        self.rows.clear()
        self.terms, self.collected = 0.0, False

    def value(self, key: str, device: torch.device) -> Tensor:
        """A statistic; zeros (or no rows) of a layer that was not reached.

        Raises :class:`FxcurvError` when kept rows have different numbers of positions.
        """
        type_ = self.types[key]
        if key in self.rows:
            positions = sorted({rows.shape[1] for rows in self.rows[key]})
            if len(positions) > 1:
                raise FxcurvError(
                    f"the rows '{key}' have {' and '.join(map(str, positions))} positions in different uses or "
                    "micro-batches, so they cannot be kept side by side; leave the pass 'sink' on, or give every use "
                    "and micro-batch the same number."
                )
            return torch.cat([rows.to(device) for rows in self.rows[key]])
        found = self.stacks.rows(key)
        if key in self.sums:
            found.append(self.sums[key])
        if found:
            return sum((other.to(device) for other in found[1:]), found[0].to(device))
        shape = tuple(1 if size is None and i else (size or 0) for i, size in enumerate(type_.shape))
        return torch.zeros(shape, dtype=type_.dtype, device=device)

    def together(self, keys: tuple[str, ...], device: torch.device) -> Tensor:
        """The statistics of these keys in a stack: as it was measured, or put together now."""
        found = None if self.rows else self.stacks.only(keys, self.sums)
        return torch.stack([self.value(key, device) for key in keys]) if found is None else found.to(device)


def leaf(shape: Iterable[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A slot: an expanded zero needs no memory, and its gradient is stolen by autograd, not added to a buffer."""
    return torch.zeros((), dtype=dtype, device=device).expand(tuple(shape)).requires_grad_()


def tap_types(types: dict[str, Type]) -> dict[str, Type]:
    """The statistics that taps deliver, among all statistic inputs."""
    return {key: type_ for key, type_ in types.items() if parse_statistic(key) is not None}


def _reads_g(key: str) -> bool:
    expression: Call | RowsOf | StateOf | None = parse_statistic(key)
    return expression is None or any(isinstance(x, RowsOf) and x.side[0] == "g" for x in leaves(expression))


class OutputTap(torch.autograd.Function):
    """The identity on a model output; its backward leaves the number of loss terms in a slot.

    terms: their number as far as the output tells; loss: asked again when the gradient is there.
    """

    @staticmethod
    def forward(
        ctx: Any, terms: Tensor, output: Tensor, slot: Tensor, notes: Notes | None = None, loss: Loss | None = None
    ) -> Tensor:
        ctx.save_for_backward(terms)
        ctx.notes, ctx.loss = notes, loss
        return output.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (terms,) = ctx.saved_tensors
        if not wanted_slots(ctx, 1)[0]:
            return None, g, None, None, None
        count = None
        if ctx.loss is not None:
            with suppress(FxcurvError):  # an output that the loss cannot read
                count = ctx.loss.count_behind(g.detach())
        return None, g, terms.clone() if count is None else count, None, None


def _is_output_tap(node: Any) -> bool:
    return isinstance(node, OutputTap._backward_cls)  # type: ignore[attr-defined]


def notes_behind(outputs: Tensor) -> list[Notes]:
    """What the forward passes behind ``outputs`` noted for deferred statistics, each once."""
    found: dict[Notes, None] = {}
    stack: list[Any] = [outputs.grad_fn]
    seen: set[Any] = set()
    while stack:
        node: Any = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if not _is_output_tap(node):
            stack += [following for following, _ in node.next_functions]
        elif node.notes is not None and node.notes not in found:
            found[node.notes] = None
            stack += node.notes.before
    return list(found)


def count_terms(loss: Loss | None, output: Tensor) -> Tensor:
    """Loss terms in a model output, as far as the output alone tells: dimension 0 without a loss object, and for an
    output that the loss cannot read, which is some other one.

    0-dim float64 on the output's device; nothing waits for the device.
    """
    if loss is not None and not loss.needs_targets:
        with suppress(FxcurvError):
            return loss.count(output.detach())
    rows = output.shape[0] if output.ndim else 1
    return torch.full((), float(rows), dtype=torch.float64, device=output.device)
