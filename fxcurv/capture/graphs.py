"""Message passing (``torch_geometric``) in a symbolic trace.

A convolution's matrices are ordinary products of node features, but between them stands code that no placeholder can
run: normalisation, self loops, gathering and scattering along edges. It reads no parameter, so that it stays whole:

- a function of the library called from traced code is one node;
- so is a module of the library without parameters (an aggregation, a pooling), and
- ``propagate`` and ``edge_updater`` of a convolution whose message functions read no parameter. Where they do
  (attention vectors and edge features), only the gathering along edges is one node and the messages are traced.

Nothing here imports the library: it is looked up among the loaded modules, and without it nothing changes.
"""

from __future__ import annotations

import functools
import inspect
import operator
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from fxcurv.capture.examples import Examples, structured
from fxcurv.capture.library import LIBRARY, convolution_class, has_state, is_convolution, knows_library, loaded
from fxcurv.capture.patches import Patches, replaced, replaced_items
from fxcurv.capture.proxies import has_proxy
from fxcurv.errors import FxcurvError

_ENTRIES = {
    "propagate": ("message", "aggregate", "update", "message_and_aggregate"),
    "edge_updater": ("edge_update",),
}  # entry of a convolution -> the functions of its class that run inside
_LAYOUT_TESTS = ("is_sparse", "is_torch_sparse_tensor")


class GraphPatches:
    """What a trace replaces in the library and in the code that calls it, until ``patches`` end."""

    def __init__(self, tracer: Any, examples: Examples, patches: Patches) -> None:
        self._tracer, self._examples, self._patches = tracer, examples, patches
        self._namespaces: set[int] = set()
        self._wholes: dict[Any, Callable[..., Any]] = {}
        self._classes: set[type] = set()
        self._integer = _recorded_int(self._record)
        self._started = False

    def prepare(self, module: nn.Module) -> None:
        """Call this before a module is traced into; raises FxcurvError where its parameters have no shape yet."""
        if any(p is not None and is_lazy(p) for p in module._parameters.values()):
            raise FxcurvError(f"{self._name(module)} has no shape yet: run the model once before transforming it.")
        namespace = getattr(module.forward, "__globals__", {})
        if not self._started and knows_library(module, namespace):
            self._started = True
            self._start()
        if self._started:
            self._functions(namespace)
        if not is_convolution(module):
            return
        cached = dict.fromkeys(name for name in vars(module) if name.startswith("_cached_"))
        self._patches.enter_context(replaced_items(vars(module), cached))  # computed anew, and not kept by the trace
        cls: Any = type(module)
        if cls not in self._classes:
            self._classes.add(cls)
            hooks = [getattr(cls, name) for names in _ENTRIES.values() for name in names]
            for function in (*hooks, convolution_class().propagate):
                self._patches.globals_of(function)
                self._functions(getattr(function, "__globals__", {}))
            entries = {name: self._entry(name, getattr(cls, name)) for name in _ENTRIES}
            self._replace(cls, _check_input=self._check(cls._check_input), _collect=self._collect(cls._collect))
            self._replace(cls, **entries)

    def _start(self) -> None:
        """Replace the functions that the library's own code calls, and what its aggregations check of values."""
        aggregation = loaded("nn.aggr.base", "Aggregation")
        if aggregation is not None:
            self._replace(aggregation, __call__=self._aggregation(vars(aggregation)["__call__"]))
        for name, library in list(sys.modules.items()):
            if name.startswith(LIBRARY) and isinstance(library, types.ModuleType):
                self._patches.names_of(vars(library))
                self._functions(vars(library))

    def _replace(self, cls: type, **methods: Any) -> None:
        self._patches.enter_context(replaced(cls, **methods))

    def _functions(self, namespace: dict[str, Any]) -> None:
        """Functions of the library in a namespace are recorded when their arguments are traced."""
        if id(namespace) in self._namespaces:
            return
        self._namespaces.add(id(namespace))
        found = {
            name: self._wholes.get(value) or self._whole(value)
            for name, value in namespace.items()
            if type(value) is types.FunctionType and value.__module__.startswith(f"{LIBRARY}.")
        }
        if "int" not in namespace and str(namespace.get("__name__")).startswith(LIBRARY):
            found["int"] = self._integer
        self._patches.enter_context(replaced_items(namespace, found))

    def _record(self, function: Any, *args: Any, **kwargs: Any) -> fx.Proxy:
        return self._tracer.create_proxy("call_function", function, args, kwargs)  # type: ignore[no-any-return]

    def _name(self, module: nn.Module) -> str:
        return f"'{self._tracer.path_of_module(module)}' ({type(module).__name__})"

    def _method(self, module: nn.Module, name: str) -> fx.Proxy:
        path = self._tracer.path_of_module(module)
        return self._tracer.create_proxy("get_attr", f"{path}.{name}" if path else name, (), {})  # type: ignore[no-any-return]

    def _item(self, proxy: fx.Proxy, key: Any) -> fx.Proxy:
        return self._record(operator.getitem, proxy, key)

    def _whole(self, function: Any) -> Callable[..., Any]:
        tensor = function.__annotations__.get("return") is torch.Tensor

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if not has_proxy(args, kwargs):
                return function(*args, **kwargs)
            if function.__name__ in _LAYOUT_TESTS:
                arguments = fx.node.map_aggregate((args, kwargs), self._example)
                return self._examples.known and function(*arguments[0], **arguments[1])
            result = self._record(function, *args, **kwargs)
            if tensor or not self._examples.known:
                return result
            return structured(result, self._examples.value(result.node), self._item)

        self._wholes[function] = wrapper
        return wrapper

    def _example(self, value: Any) -> Any:
        return self._examples.value(value.node) if isinstance(value, fx.Proxy) and self._examples.known else value

    def _aggregation(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Without the checks of values before the module's own call."""

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return (nn.Module.__call__ if has_proxy(args, kwargs) else original)(module, *args, **kwargs)

        return call

    def _entry(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def enter(module: Any, edge_index: Any, *args: Any, **kwargs: Any) -> Any:
            if not has_proxy(edge_index, args, kwargs):
                return original(module, edge_index, *args, **kwargs)
            if not has_state(module, _ENTRIES[name]):
                return self._record(pass_messages, self._method(module, name), edge_index, *args, **kwargs)
            if not self._examples.known:
                raise FxcurvError(
                    f"the convolution {self._name(module)} reads parameters inside its messages, which needs a call to "
                    "look at; pass example_inputs=(x, edge_index, ...)."
                )
            written = original is getattr(type(module), f"_jinja_{name}", None)  # by the library, for this class
            return (getattr(convolution_class(), name) if written else original)(module, edge_index, *args, **kwargs)

        return enter

    def _check(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def check(module: nn.Module, edge_index: Any, size: Any) -> Any:
            return size if has_proxy(edge_index, size) else original(module, edge_index, size)

        return check

    def _collect(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def collect(module: Any, names: Any, edge_index: Any, size: Any, kwargs: dict[str, Any]) -> Any:
            if not has_proxy(edge_index, size, kwargs):
                return original(module, names, edge_index, size, kwargs)
            method = self._method(module, "_collect")
            result = self._record(gather_messages, method, sorted(names), edge_index, size, kwargs)
            wanted = {name for group in _ENTRIES.values() for name in module.inspector.get_flat_param_names(group)}
            return {
                name: structured(self._item(result, name), example, self._item)
                for name, example in self._examples.value(result.node).items()
                if name in wanted
            }

        return collect


def pass_messages(entry: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``propagate`` or ``edge_updater`` of a convolution, on every run of a graph."""
    return entry(*args, **kwargs)


def gather_messages(
    collect: types.MethodType, names: list[str], edge_index: Any, size: Any, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a convolution's message functions by name: node features gathered along the edges."""
    convolution: Any = collect.__self__
    sizes = convolution._check_input(edge_index, size)
    if edge_index.layout is torch.strided:
        found = collect(set(names), edge_index, sizes, kwargs)
    else:  # through indices of a copy: the library marks an adjacency in place, which would spoil the backward
        indices, values = sys.modules[f"{LIBRARY}.utils"].to_edge_index(edge_index.clone())
        found = collect(set(names), indices.flip(0), sizes, kwargs) | {"adj_t": edge_index, "edge_index": None}
        features = None if values.dim() == 1 else values
        for name, value in (("edge_weight", values), ("edge_attr", features), ("edge_type", values)):
            found[name] = value if found.get(name) is None else found[name]
    return {name: value for name, value in found.items() if value is not inspect.Parameter.empty}


def _recorded_int(record: Callable[..., Any]) -> type:
    """``int`` for the library's code: a number that the graph computes (``int(batch.max()) + 1``) is one node."""

    class Meta(type):
        def __instancecheck__(cls, value: Any) -> bool:
            return isinstance(value, int)

    class Integer(int, metaclass=Meta):
        def __new__(cls, *args: Any) -> Any:
            return record(int, *args) if has_proxy(args) else int(*args)

    return Integer
