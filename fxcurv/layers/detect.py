"""Find the parametrised products of a captured graph, and say of every other trainable parameter why it is none.

One pass over the nodes, in order. A node that reads a parameter is a link (the parameter goes on, seen through a
view), an end (no gradient passes), a spelling of a product, or the place where detection stops for that
parameter, with a reason. So the cost is linear in nodes and parameters, whatever the number of spellings,
and no use of a parameter is ever skipped: one use that is not understood takes the parameter out of all layers.

Which names mean one tensor is decided by the identity of the tensor object. Parameters that merely share memory
are different leaves of autograd with gradients of their own, and stay different layers.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from fxcurv.capture.captured import Captured, parameter_names, resolve
from fxcurv.capture.where import source
from fxcurv.layers import (  # noqa: F401  (each registers its spellings or exposures)
    attention,
    bags,
    bilinear,
    channelnorm,
    conv,
    elementwise,
    embedding,
    experts,
    graphconv,
    norm,
    products,
    recurrent,
    slices,
    transposed,
)
from fxcurv.layers.assemble import assemble
from fxcurv.layers.chain import follow, is_size
from fxcurv.layers.elements import repeated, repeats
from fxcurv.layers.exported import turn_exported
from fxcurv.layers.expose import REASON, expose
from fxcurv.layers.layer import Detection, Uncovered
from fxcurv.layers.reasons import explain, remedy
from fxcurv.layers.region import Place
from fxcurv.layers.spelling import Match, Operand, Site, lookup
from fxcurv.layers.view import Refused, View


def detect(
    captured: Captured,
    model: nn.Module,
    *,
    kinds: Collection[str] | None = None,
    fused: Mapping[str, int] | None = None,
) -> Detection:
    """Layers of a captured graph, all its pieces together, in the order of their first use, and what none covers.

    Where :func:`fxcurv.capture.propagate` has recorded shapes, stacks of matrices in ``matmul`` are understood too.
    Trainability (``requires_grad``) and the mode of batch norms are read now. ``kinds`` keeps only layers of these
    kinds. ``fused`` divides the outputs of layers, by a pattern of their names, into that many layers of their own.
    Nodes that read running statistics are added to the graph after its placeholders where a batch norm needs them, and
    composite operations are replaced by their parts (:mod:`fxcurv.layers.expose`); nothing else is changed.
    """
    matches: dict[fx.Node, Match] = {}
    stops: dict[Place, Uncovered] = {}
    seen: set[str] = set()
    for part in captured.graphs:
        expose(part, model)
        turn_exported(part.graph)
        walk = _Walk(part, model)
        for node in list(part.graph.nodes):
            walk.visit(node)
        walk.settle()
        matches |= walk.products
        stops = walk.stops | stops  # the first reason stays
        seen |= walk.seen
    found = assemble(matches, stops, walk.trainable(), seen, kinds, fused)
    if not captured.pieces:
        return found
    outside = "It is in no captured graph: unused, or used by plain Python that Dynamo does not trace."
    bare = (item if item.chain or item.parameter in seen else replace(item, reason=outside) for item in found.uncovered)
    return Detection(tuple(replace(layer, alone=True) for layer in found.layers), tuple(bare))


@dataclass
class _Walk:
    """State of the pass; see :class:`~fxcurv.layers.spelling.Site` for what a spelling sees of it."""

    captured: Captured
    model: nn.Module
    operands: dict[fx.Node, Operand] = field(default_factory=dict)
    products: dict[fx.Node, Match] = field(default_factory=dict)
    parts: dict[fx.Node, tuple[Operand, ...]] = field(default_factory=dict)
    stops: dict[Place, Uncovered] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    fed: set[fx.Node] = field(default_factory=set)
    parametric: set[fx.Node] = field(default_factory=set)
    varying: set[fx.Node] = field(default_factory=set)
    grad_enabled: bool = True

    def __post_init__(self) -> None:
        self.names = parameter_names(self.model)
        self.repeats: dict[str, fx.Node] = {}  # by name: where a parameter is repeated for every example
        self.as_data: set[str] = set()  # those of which some use is no product
        self.early: dict[Any, fx.Node] = {}  # get_attr nodes that precede every operation
        self.place: fx.Node | None = None  # the last placeholder
        for node in self.captured.graph.nodes:
            if node.op == "placeholder":
                self.place = node
            elif node.op == "get_attr":
                self.early[node.target] = node
            else:
                break

    def trainable(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the trainable parameters by name, in the model's order."""
        trainable = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        return {name: () if is_lazy(p) else tuple(p.shape) for name, p in trainable}

    def visit(self, node: fx.Node) -> None:
        """Classify what one node does to the parameters it reads."""
        if node.op == "placeholder":
            self.fed.add(node)
            self.varying.add(node)
            return
        if node.op == "get_attr":
            operand = self._own(node.target, node.name)
            if operand is None:
                self.fed.add(node)
            else:
                self.operands[node] = operand
                self.parametric.add(node)
            return
        if node.target is torch._C._set_grad_enabled:
            self.grad_enabled = node.args[0] is not False  # anything else restores the caller's mode
            return
        if node.target is torch.cat and not node.users:  # what an exposure has taken apart
            return
        inputs = node.all_input_nodes
        module = resolve(self.model, str(node.target)) if node.op == "call_module" else None
        owned = {} if module is None else dict(self._module_parameters(module))
        if not inputs or not self.fed.isdisjoint(inputs):
            self.fed.add(node)
        if not self.varying.isdisjoint(inputs) and not is_size(node):
            self.varying.add(node)
        if owned or not self.parametric.isdisjoint(inputs):
            self.parametric.add(node)
        carriers = [carrier for carrier in inputs if carrier in self.operands or carrier in self.parts]
        if (carriers or owned) and self.grad_enabled:
            self._use(node, module, carriers, owned)

    def _own(self, path: Any, *chain: str) -> Operand | None:
        if path in self.captured.constants:
            return None
        try:
            value = resolve(self.model, str(path))
        except AttributeError:  # a constant that the front-end keeps on its own module
            return None
        return self._operand(value, chain) if isinstance(value, nn.Parameter) else None

    def _operand(self, parameter: nn.Parameter, chain: tuple[str, ...]) -> Operand | None:
        name = self.names.get(id(parameter))
        if name is None:
            return None
        self.seen.add(name)
        unread = Operand(name, parameter.requires_grad, View.of(()), chain)
        if is_lazy(parameter):
            self._stop(unread, None, "has no shape yet: run the model once before transforming it")
            return None
        if not parameter.is_floating_point():
            self._stop(unread, None, f"has dtype {parameter.dtype}, not a real floating-point one")
            return None
        return Operand(name, parameter.requires_grad, View.of(parameter.shape), chain)

    def _module_parameters(self, module: nn.Module) -> Iterator[tuple[str, Operand]]:
        """Parameters that a called module reads by itself, by attribute path on it."""
        for path, parameter in module.named_parameters():
            operand = self._operand(parameter, ())
            if operand is not None:
                yield path, operand

    def _use(self, node: fx.Node, module: Any, carriers: list[fx.Node], owned: dict[str, Operand]) -> None:
        carriers = self._taken(node, carriers)
        if not carriers and not owned:
            return
        if len(carriers) == 1 and not owned:
            operand = self.operands[carriers[0]]
            try:
                view = follow(node, carriers[0], operand.view)
            except Refused as refused:
                if not self._is_data(operand):
                    self._stop(operand, node, str(refused))
                return
            if view is None:
                return
            if isinstance(view, tuple):
                self.parts[node] = tuple(replace(operand, view=v, chain=(*operand.chain, node.name)) for v in view)
                return
            if view is not NotImplemented:
                self.operands[node] = Operand(operand.parameter, operand.trainable, view, (*operand.chain, node.name))
                if repeats(view) and not repeats(operand.view):
                    self.repeats[node.name] = node
                return
        site = Site(node, module, self.operands, owned, self.products, self.fed, self.parametric, self._attribute)
        site.varying = self.varying
        match, reason = self._match(site)
        matched = () if match is None else (match.weight, match.bias)
        for operand in (*(self.operands[carrier] for carrier in carriers), *owned.values()):
            if not any(operand is item for item in matched) and not self._is_data(operand):
                data = match is not None and self.operands.get(match.x) is operand
                why = site.reasons.get(operand.parameter) or ("is the data of a product" if data else reason)
                why = why or node.meta.get(REASON) or explain(node, module)
                self._stop(operand, node, why)

    def _taken(self, node: fx.Node, carriers: list[fx.Node]) -> list[fx.Node]:
        """Carriers of one parameter each; a node that reads the parts of a split takes one of them or is a stop."""
        index = node.args[1] if node.target is operator.getitem else None
        for carrier in carriers:
            parts = self.parts.get(carrier, ())
            if parts and isinstance(index, int):
                self.operands[node] = replace(parts[index], chain=(*parts[index].chain, node.name))
            else:
                for part in parts:
                    self._stop(part, node, explain(node, None))
        return [carrier for carrier in carriers if carrier in self.operands]

    def _is_data(self, operand: Operand) -> bool:
        """Whether an operand that is no product's weight has been repeated for every example: it is data from there."""
        place = next((name for name in operand.chain if name in self.repeats), None)
        if place is not None:
            self.as_data.add(place)
        return place is not None

    def settle(self) -> None:
        """Where a repeated parameter is data, its repetition takes the place of every product that reads it."""
        order = {node: k for k, node in enumerate(self.captured.graph.nodes)}
        for place in sorted(self.as_data):
            for y, match in list(self.products.items()):
                operands = [operand for operand in (match.weight, match.bias) if operand is not None]
                if any(place in operand.chain for operand in operands):
                    del self.products[y]
                    for operand in operands:
                        if place not in operand.chain:
                            self._stop(operand, y, "meets a parameter that is also data")
            node = self.repeats[place]
            operand = self.operands[node]
            try:
                self.products[node] = repeated(node, operand)
            except Refused as refused:
                self._stop(operand, None, str(refused))
        self.products = dict(sorted(self.products.items(), key=lambda item: order[item[0]]))

    def _match(self, site: Site) -> tuple[Match | None, str]:
        """The product at a site, or why there is none ("" when no spelling knows the operation)."""
        function = lookup(site.node, site.module)
        if function is None:
            return None, ""
        try:
            match = _call(function, site)
            for operand in (match.weight, match.bias):
                _ = None if operand is None else operand.view.region  # refuses what is no region
        except Refused as refused:
            return None, str(refused)
        for y in site.node.all_input_nodes:  # a bias added to a product takes the product's place
            if y in self.products and self.products[y].form is match.form:
                del self.products[y]
        self.products[match.y] = match
        return match, ""

    def _stop(self, operand: Operand, node: fx.Node | None, reason: str) -> None:
        """Record why (this part of) a parameter is no layer's; the first reason stays."""
        place, chain = operand.place, operand.chain
        if node is None:
            stop = Uncovered(place.key, f"It {reason}.", chain)
        else:
            text = f"It {reason} (node '{node.name}'){remedy(self.model, operand.parameter)}."
            stop = Uncovered(place.key, text, (*chain, node.name), source(node))
        self.stops.setdefault(place, stop)

    def _attribute(self, path: str) -> fx.Node:
        """A node that reads a tensor of the user's module before any operation runs."""
        if path not in self.early:
            graph = self.captured.graph
            place = graph.inserting_before(next(iter(graph.nodes)))
            with place if self.place is None else graph.inserting_after(self.place):
                self.early[path] = graph.create_node("get_attr", path)
        return self.early[path]


_signature = functools.cache(inspect.signature)  # reading one costs more than all else that a node needs


def _call(function: Callable[..., Match], site: Site) -> Match:
    try:
        arguments = _signature(function).bind(site, *site.node.args, **site.node.kwargs)
    except TypeError:
        raise Refused(f"is used by '{site.node.target}' with arguments that are not understood") from None
    return function(*arguments.args, **arguments.kwargs)
