"""Running the tapped forward: one capture for every kind of call, made when first needed."""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxcurv.capture import Call, Captured, Runner, capture
from fxcurv.capture.structure import flatten_output
from fxcurv.errors import FxcurvError, FxcurvWarning
from fxcurv.layers.aggregate import aggregated
from fxcurv.layers.layer import Detection, Layer
from fxcurv.passes.defer import Note
from fxcurv.passes.detect import find_layers
from fxcurv.passes.tap import Tapped, insert_taps
from fxcurv.runtime.deferred import Notes
from fxcurv.runtime.engine import Engine
from fxcurv.runtime.statistics import OutputTap, Statistics, count_terms

LIMIT = 32  # forwards kept for one kind of call whose graphs assume sizes


class TappedForward:
    """The tapped graph for one kind of call, ready to run with the user's module as ``self``.

    A forward in pieces (``dynamo``) has one tapped graph for each, and gets more when it takes another branch.
    """

    def __init__(self, captured: Captured, tapped: Tapped) -> None:
        self.captured, self.tapped = captured, tapped
        self.runner = Runner(captured.graphs[0], tapped.graph)
        self.unmeasured = None if tapped.unmeasured is None else Runner(captured, tapped.unmeasured)
        self.parts = {
            id(part): (part, mine, Runner(part, mine.graph))
            for part, mine in zip(captured.graphs, tapped.graphs, strict=True)
        }

    def __call__(self, engine: Engine, leaves: list[Tensor]) -> Any:
        """The model's output; statistics arrive when a backward pass reaches the taps."""
        if self.unmeasured is not None and not engine.wants_statistics:
            return self.unmeasured(engine.model, engine.keep, *leaves)
        if self.captured.stitched is not None:
            output, notes = self.run_pieces(engine, leaves)
        else:
            notes = new_notes(engine, self.tapped, leaves)
            output = self.runner(engine.model, *self.extras(engine, self.tapped, notes), *leaves)
        return self.count_outputs(engine, output, leaves, notes)

    def extras(self, engine: Engine, tapped: Tapped, notes: Notes | None) -> list[Any]:
        """Values of a tapped graph's slots and states, behind what deferred taps and kept rows are noted with."""
        statistics, device = engine.statistics, engine.device_of("")
        values: list[Any] = [_note(engine, notes)] if tapped.deferred else []
        values += [] if tapped.unmeasured is None else [engine.keep]
        if torch.compiler.is_compiling():
            values += slots_of(statistics, tapped, device)
        else:  # the same ones as before: found once, for looking up each costs as much as making one
            key = id(tapped), device
            if key not in statistics.ready:
                statistics.ready[key] = tapped, slots_of(statistics, tapped, device)
            values += statistics.ready[key][1]
        return values + [engine.states.read(key) for key in tapped.states]

    @torch.compiler.disable
    def run_pieces(self, engine: Engine, leaves: list[Tensor]) -> tuple[Any, Notes | None]:
        """The output of a forward in pieces, and what they noted; a graph that is new is tapped before it runs."""
        notes = new_notes(engine, self.tapped, leaves)

        def run(part: Captured, inputs: Sequence[Any]) -> Any:
            if id(part) not in self.parts:
                self.add_piece(engine, part)
            _, tapped, runner = self.parts[id(part)]
            return runner(engine.model, *self.extras(engine, tapped, notes), *inputs)

        assert self.captured.stitched is not None
        return self.captured.stitched(run, engine.model, leaves), notes

    def add_piece(self, engine: Engine, part: Captured) -> None:
        """Tap a graph that was not there before. Layers are looked for in all graphs: a use may rule one out."""
        options = engine.compilation.options
        together = replace(self.captured, pieces=(*(known for known, _, _ in self.parts.values()), part))
        layers = known_layers(engine, find_layers(together, engine.model, None, options.get("fused")))
        tapped = insert_taps(part.graph, layers, engine.lowered.program, options["backend"], True)
        if "defer" in options:
            options["defer"].apply(tapped)
        self.parts[id(part)] = part, tapped, Runner(part, tapped.graph)

    def count_outputs(self, engine: Engine, output: Any, leaves: list[Tensor], notes: Notes | None = None) -> Any:
        """Tap every differentiable tensor of the output (but for those in objects) with the number of its loss terms.

        A scalar is a loss that the model computed by itself: its terms are those of the outputs beside it, and without
        any the examples of the first input.
        """
        values, structure = flatten_output(output, lambda value: isinstance(value, Tensor), objects=False)
        tapped = [i for i, value in enumerate(values) if value.requires_grad]
        counts = {i: count_terms(engine.loss, values[i]) for i in tapped if values[i].ndim}
        scalars = list(counts.values()) or [count_terms(None, x) for x in leaves if x.ndim][:1]
        for index, i in enumerate(tapped):
            value = values[i]
            terms = counts[i] if i in counts else torch.stack([n.to(value.device) for n in scalars]).amax()
            known = engine.loss is not None and not engine.loss.needs_targets and i in counts
            loss = engine.loss if known and value.ndim > 2 else None  # its gradient tells where the classes are
            values[i] = OutputTap.apply(terms, value, engine.statistics.terms_slot(value.device, index), notes, loss)
        return structure(values) if tapped else output


def slots_of(statistics: Statistics, tapped: Tapped, device: torch.device) -> list[Any]:
    """The leaves of a tapped graph's slots, in order; for rows functions that make one."""
    return [
        partial(statistics.fresh_slot, slot.key, slot.dtype) if slot.shape is None else statistics.slot(slot, device)
        for slot in tapped.slots
    ]


def new_notes(engine: Engine, tapped: Tapped, leaves: list[Tensor]) -> Notes | None:
    """Where a forward pass notes deferred statistics that its source will ask for; an empirical source need not."""
    if torch.compiler.is_compiling() or engine.method.source.kind == "empirical":
        return None
    if not any(part.deferred for part in tapped.graphs):
        return None
    return Notes(before=tuple(x.grad_fn for x in leaves if x.grad_fn is not None))


def _note(engine: Engine, notes: Notes | None) -> Note | None:
    """What deferred taps of a forward pass are noted with; ``None`` in compiled graphs, where they are ordinary."""
    if torch.compiler.is_compiling():
        return None
    if engine.method.source.kind == "empirical":
        return engine.statistics.arrivals.note
    return None if notes is None else notes.note


class Forwards:
    """Tapped forwards by call key; several for a key where graphs assume sizes.

    frontend: what the user asked for; chosen: the front-end of the transform's own capture, tried first.
    """

    def __init__(self, frontend: str) -> None:
        self.frontend = self.chosen = frontend
        self.known: dict[Hashable, list[TappedForward]] = {}
        self.latest: tuple[Hashable, TappedForward] | None = None

    def clone(self) -> Forwards:
        """Tapped forwards hold no tensor of the model, so a copied model shares them."""
        other = Forwards(self.frontend)
        other.chosen, other.known = self.chosen, {key: list(found) for key, found in self.known.items()}
        return other

    def add(self, call: Call, captured: Captured, tapped: Tapped) -> TappedForward:
        """Keep the forward of a capture; the newest ``LIMIT`` of a kind of call stay."""
        forward = TappedForward(captured, tapped)
        found = self.known.setdefault(call.key, [])
        found.append(forward)
        del found[:-LIMIT]
        return forward

    def get(self, call: Call) -> TappedForward | None:
        """The forward that is valid for a call, if it is there already."""
        return next((f for f in reversed(self.known.get(call.key, [])) if f.captured.accepts(call.leaves)), None)

    @torch.compiler.disable
    def find(self, engine: Engine, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[TappedForward, list[Tensor]]:
        """The forward for a call and the call's tensors; captures again when the call is of a new kind.

        Raises :class:`FxcurvError` when the model cannot be captured for such a call.
        """
        sketch = None if kwargs else sketch_of(engine.model, args)
        known, latest = self.latest or (None, None)
        if latest is not None and known == sketch and sketch is not None and latest.captured.accepts(args):
            return latest, list(args)
        call = Call.of(engine.model, args, kwargs)
        forward = self.get(call)
        if forward is None:
            captured, options = self._capture(engine.model, call), engine.compilation.options
            layers = known_layers(engine, find_layers(captured, engine.model, call, options.get("fused")))
            program, backend = engine.lowered.program, options["backend"]
            tapped, *rest = (insert_taps(part.graph, layers, program, backend, True) for part in captured.graphs)
            tapped.rest = tuple(rest)
            if "defer" in options:
                for part in tapped.graphs:
                    options["defer"].apply(part)
            forward = self.add(call, captured, tapped)
        if sketch is not None and len(call.leaves) == len(args) and all(map(operator.is_, call.leaves, args)):
            self.latest = sketch, forward
        return forward, call.leaves

    def _capture(self, model: nn.Module, call: Call) -> Captured:
        if self.chosen != self.frontend:
            with contextlib.suppress(FxcurvError):
                return capture(model, call, self.chosen)
        return capture(model, call, self.frontend)


def sketch_of(model: nn.Module, args: tuple[Any, ...]) -> Hashable:
    """What tells calls of a model with a few plain tensors apart, found faster than a :class:`Call`: their number, and
    every mode and dtype in the model; ``None`` for another kind of call. Equal sketches have equal keys."""
    if any(type(x) is not Tensor or x.layout is not torch.strided for x in args):
        return None
    modes: list[bool] = []
    dtypes: list[torch.dtype] = []
    stack: list[nn.Module | None] = [model]
    while stack:
        module = stack.pop()
        if module is not None:
            modes.append(module.training)
            dtypes += [p.dtype for p in module._parameters.values() if p is not None]
            stack += module._modules.values()
    return len(args), tuple(modes), tuple(dtypes)


def known_layers(engine: Engine, detection: Detection) -> tuple[Layer, ...]:
    """The layers of a later capture that the program measures; warns, once, of what it does not know.

    Raises :class:`FxcurvError` when layers whose input is measured once for all of them read different ones now.
    """
    targets = {target.name: target for target in engine.facts.targets}
    before = engine.compilation.detection or Detection((), ())
    listed = {place.name for layer in before.layers for place in layer.places}
    listed |= {item.parameter for item in before.uncovered if item.chain}
    layers = []
    for layer in detection.layers:
        target = targets.get(layer.name)
        if target is not None and (target.groups, target.d_out, target.d_in) == layer.shape:
            layers.append(aggregated(layer, engine.model) if engine.method.aggregated else layer)
        elif target is not None:
            _warn(engine, f"layer '{layer.name}' is used otherwise than at transform: that is not measured.")
        new = sorted({place.name for place in layer.places} - listed)
        if new:
            names = " and ".join(f"'{name}'" for name in new)
            _warn(engine, f"{names} is used, unlike at transform: such a parameter keeps its gradient.")
    owners = {key: target.name for target in targets.values() for key in (target.weight, target.bias)}
    for item in detection.uncovered:
        if item.chain and item.parameter in owners:
            _warn(engine, f"layer '{owners[item.parameter]}' is not measured here: '{item.parameter}': {item.reason}")
    rows = {layer.name: [(use.x, use.form.tag, use.form.scale, use.aux) for use in layer.uses] for layer in layers}
    for target in targets.values():
        if target.name in rows and target.input in rows and rows[target.name] != rows[target.input]:
            raise FxcurvError(
                f"layers '{target.input}' and '{target.name}' read the same input at transform and different ones in "
                "this call; transform with example inputs of this kind."
            )
    return tuple(layers)


def _warn(engine: Engine, what: str) -> None:
    if what not in engine.warned:
        engine.warned.add(what)
        warnings.warn(f"In a call of another kind or with another branch, {what}", FxcurvWarning, stacklevel=2)
