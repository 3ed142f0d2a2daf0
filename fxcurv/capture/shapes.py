"""Shapes and dtypes of every value of a captured graph, for reports and cost models.

The graph is run once on fake tensors (no memory, no arithmetic). Where that is impossible it is run for real,
without gradients, and everything it touched is put back.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxcurv.capture.captured import Captured
from fxcurv.capture.interpreter import Interpreter
from fxcurv.capture.state import preserved


def propagate(captured: Captured, model: nn.Module, leaves: Sequence[torch.Tensor]) -> None:
    """Set ``node.meta["shape"]`` (a tuple) and ``node.meta["dtype"]`` of each node whose value is a tensor.

    ``leaves`` are the tensor leaves of an example call. Parameters, buffers, gradients and random number
    generators are left as they were.
    """
    with preserved(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if captured.stitched is not None:  # in which graphs follow is known only by running them
            captured.stitched(lambda part, inputs: _Recorder(model, part, part.constants).run(*inputs), model, leaves)
            return
        try:
            _propagate_fake(captured, model, leaves)
        except Exception:  # an operation without fake support, or one that depends on values: any error there is
            _Recorder(model, captured, captured.constants).run(*leaves)


def _propagate_fake(captured: Captured, model: nn.Module, leaves: Sequence[torch.Tensor]) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Any] = {}

    def fake(tensor: torch.Tensor) -> Any:
        if id(tensor) not in made:
            made[id(tensor)] = mode.from_tensor(tensor.detach())
        return made[id(tensor)]

    state = {f"model.{name}": fake(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    constants = {name: fake(tensor) for name, tensor in captured.constants.items()}
    with mode:
        host = _Host(model, captured, constants)
        torch.func.functional_call(host, state, tuple(fake(leaf) for leaf in leaves), tie_weights=True)


class _Recorder(Interpreter):
    """Interprets the graph on the user's model and records what every node returns."""

    def __init__(self, model: nn.Module, captured: Captured, constants: dict[str, Any]) -> None:
        super().__init__(model, graph=captured.graph)
        self._constants = constants

    def fetch_attr(self, target: str) -> Any:
        return self._constants[target] if target in self._constants else super().fetch_attr(target)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            n.meta["shape"] = tuple(int(size) for size in value.shape)
            n.meta["dtype"] = value.dtype
        return value


class _Host(nn.Module):
    """Gives ``functional_call`` a module whose forward interprets the graph on ``model``."""

    def __init__(self, model: nn.Module, captured: Captured, constants: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self._captured, self._constants = captured, constants

    def forward(self, *leaves: Any) -> Any:
        return _Recorder(self.model, self._captured, self._constants).run(*leaves)
