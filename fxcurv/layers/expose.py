"""Expose the products inside composite operations: a recurrent network or an attention module becomes visible nodes.

A captured graph shows ``nn.LSTM`` or ``nn.MultiheadAttention`` as one node; its weights meet data where no tap can sit.
An exposure replaces that node by nodes that compute the same values, with every parametrised product on its own, so
that detection, taps and proofs need not know that it was ever whole. An exposure is a function registered under
everything that means the same operation (a module class, a function, an ATen overload). It is called with an
:class:`Exposure` and the operation's own arguments and returns the node of the replacement's value, or raises
:class:`~fxcurv.layers.view.Refused` with a reason; the node then stays as it is and its parameters are listed with it.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import fx, nn

from fxcurv.capture.captured import Captured, resolve
from fxcurv.errors import FxcurvError
from fxcurv.layers.view import Refused

Function = TypeVar("Function", bound=Callable[..., fx.Node])
EXPOSURES: dict[Any, Callable[..., fx.Node]] = {}
REASON = "fxcurv_refused"  # node.meta key: why a composite operation was left whole


def exposes(*targets: Any) -> Callable[[Function], Function]:
    """Register ``(exposure, *arguments) -> node`` for module classes, functions, method names, overloads of operators.

    An operator of a library that need not be there is named by its text, ``"library.operator.default"``.
    """

    def register(function: Function) -> Function:
        for target in targets:
            if target in EXPOSURES:
                raise FxcurvError(f"'{target}' is exposed twice; register each operation once.")
            EXPOSURES[target] = function
        return function

    return register


@dataclass(frozen=True)
class Exposure:
    """One node about to be replaced.

    node: the operation; module: the called module, ``None`` for functions. New nodes go before ``node``.
    """

    graph: fx.Graph
    node: fx.Node
    module: Any

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A node that calls ``function``; it must be importable by name or picklable, and pure."""
        made = self.graph.call_function(function, args, kwargs)
        made.stack_trace = self.node.stack_trace
        return made

    def own(self, name: str) -> fx.Node | None:
        """The called module's parameter ``name``, ``None`` where it has none; refused behind a parametrisation.

        ``name`` may be that of a sub-module's parameter; the sub-module's hooks are refused, since they would not run.
        """
        path, _, leaf = name.rpartition(".")
        owner = self.module.get_submodule(path)
        if path:
            _refuse_hooks(owner)
        if getattr(owner, leaf, None) is None:
            return None
        if not isinstance(owner._parameters.get(leaf), nn.Parameter):
            raise Refused(f"reaches the {name} of {type(self.module).__name__} through a parametrisation")
        return self.graph.get_attr(f"{self.node.target}.{name}")

    def items(self, sequence: fx.Node, count: int) -> list[fx.Node]:
        """Nodes of the first ``count`` elements of a sequence."""
        return [self.call(operator.getitem, sequence, k) for k in range(count)]

    def shape(self, argument: Any) -> tuple[int, ...] | None:
        """Shape of a node's value where it was recorded (see fxcurv.capture.propagate), else ``None``."""
        shape = argument.meta.get("shape") if isinstance(argument, fx.Node) else None
        return None if shape is None else tuple(shape)


def expose(captured: Captured, model: nn.Module) -> None:
    """Replace every composite operation of the graph that has an exposure; calling it again changes nothing."""
    graph = captured.graph
    for node in list(graph.nodes):
        module = resolve(model, str(node.target)) if node.op == "call_module" else None
        function = _lookup(node, module)
        if function is None:
            continue
        before = set(graph.nodes)
        try:
            _refuse_hooks(module)
            with graph.inserting_before(node):
                value = _call(function, Exposure(graph, node, module))
        except Refused as refused:
            for made in reversed([made for made in graph.nodes if made not in before]):
                graph.erase_node(made)
            node.meta[REASON] = str(refused)
            continue
        node.meta.pop(REASON, None)
        value.meta.update({key: item for key, item in node.meta.items() if key not in value.meta})
        node.replace_all_uses_with(value)
        graph.erase_node(node)


def _lookup(node: fx.Node, module: Any) -> Callable[..., fx.Node] | None:
    if node.op not in ("call_module", "call_function", "call_method"):
        return None
    if node.op != "call_module":
        return EXPOSURES.get(node.target) or EXPOSURES.get(str(node.target))
    kind: Any = type(module)
    for cls in kind.__mro__:
        if cls in EXPOSURES:  # a class with a forward of its own may compute something else
            return EXPOSURES[cls] if kind.forward is cls.forward else None
    return None


def _refuse_hooks(module: Any) -> None:
    if module is not None and (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks):
        raise Refused(f"belongs to a {type(module).__name__} with hooks, which an exposed one would not run")


_signature = functools.cache(inspect.signature)


def _call(function: Callable[..., fx.Node], at: Exposure) -> fx.Node:
    try:
        arguments = _signature(function).bind(at, *at.node.args, **at.node.kwargs)
    except TypeError:
        raise Refused(f"is used by '{at.node.target}' with arguments that are not understood") from None
    return function(*arguments.args, **arguments.kwargs)
