"""From a graph that Dynamo hands to its back end to a graph over the user's module.

Dynamo lifts every tensor that the traced Python reads to an argument of the graph. Here those that belong to the model
become ``get_attr`` nodes with their path again, found by the identity of the tensor object; tensors that the user's
Python keeps elsewhere (in a list, a global) become constants; what is left are the placeholders.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import fx, nn

from fxcurv.capture.captured import Captured
from fxcurv.capture.patches import CHECKPOINT_NOTE
from fxcurv.capture.sizes import concrete
from fxcurv.errors import FxcurvError

_KEPT_META = ("stack_trace", "nn_module_stack")  # the rest holds fake tensors, which can be neither copied nor pickled


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of a model by attribute path: parameters and buffers (by the first of their names), attributes."""
    found: dict[str, torch.Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    known = set(map(id, found.values()))
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor) and name.isidentifier() and id(value) not in known:
                found[f"{prefix}.{name}" if prefix else name] = value
                known.add(id(value))
    return found


def paths_of(tensors: Mapping[str, torch.Tensor]) -> dict[int, str]:
    """Path by ``id``; valid while ``tensors`` lives."""
    return {id(tensor): path for path, tensor in tensors.items()}


def add_constant(constants: dict[str, torch.Tensor], tensor: torch.Tensor, taken: set[str]) -> str:
    """Keep a tensor that is not of the model under a name of its own; raises FxcurvError for a trainable one."""
    if tensor.requires_grad:
        raise FxcurvError(
            f"the forward uses a trainable tensor of shape {tuple(tensor.shape)} that is no parameter of the model, so "
            "a captured graph would not see its updates; register it as an nn.Parameter of a module."
        )
    name = f"_tensor_constant{len(constants)}"
    while name in taken:
        name += "_"
    constants[name] = tensor
    return name


@dataclass(frozen=True)
class Piece:
    """One graph of Dynamo's.

    captured: over the user's module; places: which of Dynamo's arguments its placeholders are.
    reason: why Python goes on after it, with the user's line; "" where the forward ends.
    sources, fakes: what the placeholders were in the first call, and the fake values that stood for them.
    """

    captured: Captured
    places: tuple[int, ...]
    reason: str
    sources: tuple[Any, ...] = field(repr=False)
    fakes: tuple[Any, ...] = field(repr=False)


class Region:
    """A higher-order operator with the sub-graphs that it runs, callable from a graph."""

    def __init__(self, target: Any, bodies: Mapping[int, nn.Module]) -> None:
        self.target, self.bodies = target, dict(bodies)
        self.__name__ = str(getattr(target, "_name", getattr(target, "__name__", "region")))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the operator; ``bodies`` go to their positions, the other arguments fill the rest in order."""
        rest = iter(args)
        count = len(args) + len(self.bodies)
        return self.target(*(self.bodies[k] if k in self.bodies else next(rest) for k in range(count)), **kwargs)


@final
class Converter:
    """Copies one Dynamo graph; sources: what its arguments are in a call; paths: of the model's tensors, by ``id``."""

    def __init__(
        self, owner: fx.GraphModule, sources: Sequence[Any], model: nn.Module, paths: Mapping[int, str]
    ) -> None:
        self._owner, self._sources, self._paths = owner, sources, paths
        self._taken = {name for name, _ in model.named_children()} | set(vars(model))
        self._graph = fx.Graph()
        self._read: dict[str, fx.Node] = {}
        self._constants: dict[str, torch.Tensor] = {}
        self._notes: list[str] = []

    def piece(self, reason: str) -> Piece:
        """The graph as a piece."""
        values: dict[fx.Node, Any] = {}
        places: list[int] = []
        owned: list[tuple[fx.Node, str]] = []
        arguments = [node for node in self._owner.graph.nodes if node.op == "placeholder"]
        for place, (node, source) in enumerate(zip(arguments, self._sources, strict=True)):
            path = self._paths.get(id(source))
            if path is None:
                values[node] = self._described(self._graph.placeholder(node.name), node)
                places.append(place)
            else:
                owned.append((node, path))
        values.update({node: self._get(path) for node, path in owned})
        self._graph.output(self._body(self._owner.graph, self._owner, values))
        captured = Captured(self._graph, "dynamo", self._constants, notes=tuple(dict.fromkeys(self._notes)))
        fakes = tuple(arguments[place].meta.get("example_value") for place in places)
        return Piece(captured, tuple(places), reason, tuple(self._sources[place] for place in places), fakes)

    def _constant(self, tensor: torch.Tensor) -> str:
        name = next((name for name, known in self._constants.items() if known is tensor), None)
        return name or add_constant(self._constants, tensor, self._taken)

    def _get(self, path: str) -> fx.Node:
        if path not in self._read:
            self._read[path] = self._graph.create_node("get_attr", path)
        return self._read[path]

    def _body(self, source: fx.Graph, owner: nn.Module, values: dict[fx.Node, Any]) -> Any:
        for node in source.nodes:
            if node.op == "output":
                return fx.map_arg(node.args[0], values.__getitem__)
            if node.op == "get_attr":
                value: Any = owner
                for part in str(node.target).split("."):
                    value = getattr(value, part)
                if isinstance(value, torch.Tensor):
                    values[node] = self._get(self._paths.get(id(value)) or self._constant(value))
                elif not isinstance(value, nn.Module):
                    raise FxcurvError(f"the dynamo front-end met a {type(value).__name__} '{node.target}'.")
                continue
            if node.op == "placeholder":
                continue
            values[node] = self._node(node, owner, values)
        raise AssertionError("a graph ends with its output node")

    def _node(self, node: fx.Node, owner: nn.Module, values: dict[fx.Node, Any]) -> Any:
        bodies = {k: arg for k, arg in enumerate(node.args) if _is_body(arg, owner)}
        if bodies:
            return self._region(node, owner, bodies, values)
        if node.target is operator.getitem and isinstance(values.get(node.args[0]), (tuple, list)):  # type: ignore[arg-type]
            return values[node.args[0]][node.args[1]]  # type: ignore[index]
        return self._described(self._graph.node_copy(node, values.__getitem__), node)

    def _region(self, node: fx.Node, owner: nn.Module, bodies: dict[int, Any], values: dict[fx.Node, Any]) -> Any:
        modules = {k: owner.get_submodule(str(body.target)) for k, body in bodies.items()}
        others = [arg for k, arg in enumerate(node.args) if k not in bodies]
        if "checkpoint" in str(node.target) and list(bodies) == [0]:
            self._notes.append(CHECKPOINT_NOTE)
            inner: Any = modules[0]
            places = [p for p in inner.graph.nodes if p.op == "placeholder"]
            inputs = {p: fx.map_arg(value, values.__getitem__) for p, value in zip(places, others, strict=True)}
            return self._body(inner.graph, inner, inputs)
        made = self._graph.call_function(
            Region(node.target, modules),
            fx.map_arg(tuple(others), values.__getitem__),
            fx.map_arg(node.kwargs, values.__getitem__),
        )
        return self._described(made, node)

    def _described(self, made: fx.Node, node: fx.Node) -> fx.Node:
        made.meta = {key: node.meta[key] for key in _KEPT_META if key in node.meta}
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor):
            made.meta["shape"], made.meta["dtype"] = concrete(value), value.dtype
        return made


def _is_body(argument: Any, owner: nn.Module) -> bool:
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return False
    value: Any = owner
    for part in str(argument.target).split("."):
        value = getattr(value, part)
    return isinstance(value, nn.Module)
