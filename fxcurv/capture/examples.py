"""Values that nodes of an unfinished trace have for the example call, computed only where somebody asks.

Code for graphs branches on what no placeholder can say: whether a result is ``None``, how many axes it has, whether an
adjacency is sparse. None of it changes from batch to batch, so that the example's answer may be baked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import fx, nn

from fxcurv.capture.call import Call
from fxcurv.capture.captured import resolve


@final
class Examples:
    """Evaluates nodes on demand; every node at most once, without gradients.

    active: whether an evaluation is under way: what a trace records or refuses then simply runs.
    ranks: whether a number of axes was read, so that the graph holds for calls with the example's only.
    The caller restores the model and the random number generators (:func:`fxcurv.capture.state.preserved`).
    """

    def __init__(self, model: nn.Module, call: Call, constants: dict[str, torch.Tensor]) -> None:
        self._model, self._constants = model, constants
        self._leaves = [leaf.detach() for leaf in call.leaves]
        self.known = call.real
        self.active = False
        self.ranks = False
        self._values: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        """What ``node`` is for the example call, which must have real tensors (``known``)."""
        with self._running():
            for needed in _ancestors(node, self._values):
                self._values[needed] = self._evaluate(needed)
        return self._values[node]

    def rank(self, node: fx.Node) -> int | None:
        """Number of axes of a tensor; ``None`` when there is no example."""
        if not self.known:
            return None
        self.ranks = True
        return int(self.value(node).dim())

    @contextmanager
    def _running(self) -> Iterator[None]:
        self.active = True
        try:
            with torch.no_grad():
                yield
        finally:
            self.active = False

    def _evaluate(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            place = [other for other in node.graph.nodes if other.op == "placeholder"].index(node)
            return self._leaves[place]
        if node.op == "get_attr":
            name = str(node.target)
            return self._constants[name] if name in self._constants else resolve(self._model, name)
        args = fx.map_arg(node.args, self._values.__getitem__)
        kwargs = fx.map_arg(node.kwargs, self._values.__getitem__)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        function: Any = resolve(self._model, str(node.target)) if node.op == "call_module" else node.target
        return function(*args, **kwargs)


def _ancestors(node: fx.Node, known: dict[fx.Node, Any]) -> list[fx.Node]:
    """``node`` and the nodes that its value needs and that are not known, in the order of the graph."""
    needed: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current not in known and current not in needed:
            needed.add(current)
            stack.extend(current.all_input_nodes)
    return [candidate for candidate in node.graph.nodes if candidate in needed]


def structured(proxy: fx.Proxy, example: Any, make: Callable[[fx.Proxy, Any], Any]) -> Any:
    """``proxy`` taken apart as ``example`` is: tuples become tuples of values, ``None`` is ``None``."""
    if example is None:
        return None
    if type(example) in (tuple, list):
        return type(example)(structured(make(proxy, k), item, make) for k, item in enumerate(example))
    return proxy
