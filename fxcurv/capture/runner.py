"""Run a captured graph as plain Python with the user's module as ``self``.

The graph's generated code is compiled once. It is a function, not a module: nothing here owns a parameter.
"""

from __future__ import annotations

import hashlib
import linecache
from typing import Any, final

import torch
from torch import fx, nn

from fxcurv.capture.captured import Captured
from fxcurv.errors import FxcurvError


@final
class Runner:
    """``runner(model, *extras, *leaves)`` evaluates a graph and returns the user's output structure.

    graph: the graph to run, by default ``captured.graph``; it may have additional placeholders (``extras``) before
        the tensor leaves. Later changes of it have no effect.
    source: the generated code, which tracebacks show.
    """

    def __init__(self, captured: Captured, graph: fx.Graph | None = None) -> None:
        self.captured = captured
        self.graph = captured.graph if graph is None else graph
        own, names = _constants_as_inputs(self.graph, captured.constants)
        code = own.python_code("self")
        self.source: str = code.src
        digest = hashlib.sha256(code.src.encode()).hexdigest()[:12]
        filename = f"<fxcurv {captured.frontend} {digest}>"
        linecache.cache[filename] = (len(code.src), None, code.src.splitlines(keepends=True), filename)
        namespace = dict(code.globals)
        exec(compile(code.src, filename, "exec"), namespace)
        self._function = namespace["forward"]
        self._leaf_count = sum(node.op == "placeholder" for node in captured.graph.nodes)
        self._constants: tuple[torch.Tensor, ...] = tuple(captured.constants[name] for name in names)
        self._moved: dict[torch.device, tuple[torch.Tensor, ...]] = {}

    def __call__(self, model: nn.Module, *inputs: Any) -> Any:
        """Raises FxcurvError if the graph assumes other sizes than those of the tensor leaves."""
        leaves = inputs[len(inputs) - self._leaf_count :]
        if self.captured.sizes and not self.captured.accepts(leaves):
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
            raise FxcurvError(
                f"the captured graph assumes inputs of sizes {self.captured.sizes} (None: any) but got {shapes}; "
                "capture the model again with example inputs of this shape."
            )
        return self.captured.unflatten(self._function(model, *self._constants_for(leaves), *inputs))

    def __deepcopy__(self, memo: dict[int, Any]) -> Runner:
        # Code, graph and constants never change: a copied model needs a runner of its own, not copies of these.
        return Runner(self.captured, self.graph)

    def _constants_for(self, leaves: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        if not self._constants or not leaves:
            return self._constants
        device = leaves[0].device
        if all(constant.device == device for constant in self._constants):
            return self._constants
        if device not in self._moved:
            self._moved[device] = tuple(constant.to(device) for constant in self._constants)
        return self._moved[device]


def _constants_as_inputs(graph: fx.Graph, constants: dict[str, torch.Tensor]) -> tuple[fx.Graph, list[str]]:
    """A copy of ``graph`` whose first placeholders are the constants that it reads, and their names in order."""
    own = fx.Graph()
    readers = [node for node in graph.nodes if node.op == "get_attr" and node.target in constants]
    names = list(dict.fromkeys(str(node.target) for node in readers))
    inputs = {name: own.placeholder(name) for name in names}
    values: dict[fx.Node, fx.Node] = {node: inputs[str(node.target)] for node in readers}
    for node in graph.nodes:
        if node not in values:
            values[node] = own.node_copy(node, values.__getitem__)
    return own, names
