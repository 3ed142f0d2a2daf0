"""The result of a front-end: the forward graph of the user's model, without any parameter of its own.

The graph's ``get_attr`` and ``call_module`` targets are attribute paths on the *user's* module, which is
passed as ``self`` when the graph runs. So the graph never holds a stale tensor (``load_state_dict`` with
``assign=True``, ``.to``), follows ``train()`` and ``eval()`` of modules, and needs no copy of the model.

A call is described by its *signature*: the tensors among ``(args, kwargs)`` in pytree order are the graph's
placeholders, everything else (``None``, flags, sizes) is baked into the graph and part of the key.

A pass must never call ``graph.eliminate_dead_code()``: in-place operations, buffer updates and switches of
the gradient or autocast mode have no users, yet they are part of the forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn


@dataclass(frozen=True)
class Captured:
    """A captured forward graph.

    graph: placeholders are the tensor leaves of the call, in pytree order; the output node returns the user's
        output structure, or the flat list that ``unflatten`` turns into it.
    frontend: "symbolic", "export" or "dynamo".
    constants: tensors created while tracing, by the ``get_attr`` target that reads them (targets that
        do not exist on the user's module); the runner supplies them.
    unflatten: turns what the graph returns into the user's output structure.
    notes: facts about the capture that a report should show.
    sizes: per tensor leaf the sizes that the graph assumes, ``None`` for a dimension that may change; empty when
        it assumes none (``symbolic``).
    guard: a condition on the leaves' shapes beyond ``sizes``.
    pieces: the graphs of a forward between which plain Python runs (``dynamo``), ``graph`` being the first; empty for
        an ordinary capture, whose one graph is the whole forward.
    stitched: runs a forward of several pieces: ``stitched(run, model, leaves)`` calls ``run(piece, inputs)`` for every
        graph that is due and returns the user's output. More pieces may come with other branches and shapes.
    """

    graph: fx.Graph
    frontend: str
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    unflatten: Callable[[Any], Any] = lambda output: output
    notes: tuple[str, ...] = ()
    sizes: tuple[tuple[int | None, ...], ...] = ()
    guard: Callable[[Sequence[torch.Tensor]], bool] = lambda leaves: True
    pieces: tuple[Captured, ...] = ()
    stitched: Callable[[RunPiece, nn.Module, Sequence[torch.Tensor]], Any] | None = None

    @property
    def graphs(self) -> tuple[Captured, ...]:
        """All graphs of the forward: its pieces, or the capture itself."""
        return self.pieces or (self,)

    def accepts(self, leaves: Sequence[torch.Tensor]) -> bool:
        """Whether the graph is valid for tensor leaves of these shapes; if not, capture this call anew."""
        return all(
            len(expected) == leaf.dim()
            and all(size is None or size == actual for size, actual in zip(expected, leaf.shape, strict=True))
            for expected, leaf in zip(self.sizes, leaves, strict=False)
        ) and self.guard(leaves)


RunPiece = Callable[[Captured, Sequence[Any]], Any]
"""Evaluates one piece on the values of its placeholders and returns what its graph returns."""


def parameter_names(model: nn.Module) -> dict[int, str]:
    """Full name by ``id`` of each parameter; a tied parameter has the first of its names."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def resolve(model: nn.Module, target: str) -> Any:
    """The attribute of ``model`` at a dotted path."""
    value: Any = model
    for part in target.split("."):
        value = getattr(value, part)
    return value
