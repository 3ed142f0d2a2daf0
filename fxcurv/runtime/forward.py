"""Running the tapped forward: one capture for every kind of call, made when first needed."""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxcurv.capture import Call, Captured, Runner, capture
from fxcurv.capture.structure import flatten_output
from fxcurv.layers.detect import detect
from fxcurv.passes.tap import Tapped, insert_taps
from fxcurv.runtime.engine import Engine
from fxcurv.runtime.statistics import OutputTap, count_terms


class TappedForward:
    """The tapped graph for one kind of call, ready to run with the user's module as ``self``."""

    def __init__(self, captured: Captured, tapped: Tapped) -> None:
        self.tapped = tapped
        self.runner = Runner(captured, tapped.graph)

    def __call__(self, engine: Engine, leaves: list[Tensor]) -> Any:
        """The model's output; statistics arrive when a backward pass reaches the taps."""
        statistics, device = engine.statistics, engine.device_of("")
        extras: list[Any] = []
        for slot in self.tapped.slots:
            if slot.shape is None:
                extras.append(partial(statistics.fresh_slot, slot.key, slot.dtype))
            else:
                extras.append(statistics.slot(slot, device))
        extras += [engine.states.read(key) for key in self.tapped.states]
        return self.count_outputs(engine, self.runner(engine.model, *extras, *leaves), leaves)

    def count_outputs(self, engine: Engine, output: Any, leaves: list[Tensor]) -> Any:
        """Tap every differentiable tensor of the output with the number of its loss terms.

        A scalar is a loss that the model computed by itself: its terms are those of the outputs beside it, and without
        any the examples of the first input.
        """
        values, structure = flatten_output(output, lambda value: isinstance(value, Tensor))
        tapped = [i for i, value in enumerate(values) if value.requires_grad]
        counts = {i: count_terms(engine.loss, values[i]) for i in tapped if values[i].ndim}
        scalars = list(counts.values()) or [count_terms(None, x) for x in leaves if x.ndim][:1]
        for index, i in enumerate(tapped):
            value = values[i]
            terms = counts[i] if i in counts else torch.stack([n.to(value.device) for n in scalars]).amax()
            values[i] = OutputTap.apply(terms, value, engine.statistics.terms_slot(value.device, index))
        return structure(values) if tapped else output


class Forwards:
    """Tapped forwards by call key."""

    def __init__(self, frontend: str) -> None:
        self.frontend = frontend
        self.known: dict[Hashable, TappedForward] = {}

    def clone(self) -> Forwards:
        """Tapped forwards hold no tensor of the model, so a copied model shares them."""
        other = Forwards(self.frontend)
        other.known = dict(self.known)
        return other

    def add(self, call: Call, captured: Captured, tapped: Tapped) -> None:
        """Keep the forward of the capture that a model was transformed with."""
        self.known[call.key] = TappedForward(captured, tapped)

    @torch.compiler.disable
    def find(self, engine: Engine, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[TappedForward, list[Tensor]]:
        """The forward for a call and the call's tensors; captures again when the call is of a new kind.

        Raises :class:`FxcurvError` when the model cannot be captured for such a call.
        """
        call = Call.of(engine.model, args, kwargs)
        known = self.known.get(call.key)
        if known is None or not known.runner.captured.accepts(call.leaves):
            captured = capture(engine.model, call, self.frontend)
            program = engine.lowered.program
            names = {target.name for target in engine.facts.targets}
            layers = tuple(layer for layer in detect(captured, engine.model).layers if layer.name in names)
            known = TappedForward(
                captured, insert_taps(captured.graph, layers, program, engine.compilation.options["backend"], True)
            )
            self.known[call.key] = known
        return known, call.leaves
