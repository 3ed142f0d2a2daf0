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
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from fxcurv.capture.captured import Captured, parameter_names, resolve
from fxcurv.capture.where import source
from fxcurv.layers import (  # noqa: F401  (each registers its spellings or exposures)
    attention,
    bilinear,
    conv,
    elements,
    embedding,
    graphconv,
    norm,
    products,
    recurrent,
    transposed,
)
from fxcurv.layers.assemble import assemble
from fxcurv.layers.chain import follow
from fxcurv.layers.expose import REASON, expose
from fxcurv.layers.layer import Detection, Uncovered
from fxcurv.layers.reasons import explain
from fxcurv.layers.spelling import Match, Operand, Site, lookup
from fxcurv.layers.view import Refused, View


def detect(captured: Captured, model: nn.Module, *, kinds: Collection[str] | None = None) -> Detection:
    """Layers of a captured graph in the order of their first use, and the trainable parameters without one.

    Where :func:`fxcurv.capture.propagate` has recorded shapes, stacks of matrices in ``matmul`` are understood too.
    Trainability (``requires_grad``) and the mode of batch norms are read now. ``kinds`` keeps only layers of these
    kinds. Nodes that read running statistics are added to the graph after its placeholders where a
    batch norm needs them, and composite operations are replaced by their parts (:mod:`fxcurv.layers.expose`);
    nothing else is changed.
    """
    expose(captured, model)
    walk = _Walk(captured, model)
    for node in list(captured.graph.nodes):
        walk.visit(node)
    return assemble(walk.products, walk.stops, walk.trainable(), walk.seen, kinds)


@dataclass
class _Walk:
    """State of the pass; see :class:`~fxcurv.layers.spelling.Site` for what a spelling sees of it."""

    captured: Captured
    model: nn.Module
    operands: dict[fx.Node, Operand] = field(default_factory=dict)
    products: dict[fx.Node, Match] = field(default_factory=dict)
    stops: dict[str, Uncovered] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    fed: set[fx.Node] = field(default_factory=set)
    parametric: set[fx.Node] = field(default_factory=set)
    grad_enabled: bool = True

    def __post_init__(self) -> None:
        self.names = parameter_names(self.model)
        self.early: dict[Any, fx.Node] = {}  # get_attr nodes that precede every operation
        self.place: fx.Node | None = None  # the last placeholder
        for node in self.captured.graph.nodes:
            if node.op == "placeholder":
                self.place = node
            elif node.op == "get_attr":
                self.early[node.target] = node
            else:
                break

    def trainable(self) -> list[str]:
        """Names of the trainable parameters, in the model's order."""
        return [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def visit(self, node: fx.Node) -> None:
        """Classify what one node does to the parameters it reads."""
        if node.op == "placeholder":
            self.fed.add(node)
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
        inputs = node.all_input_nodes
        module = resolve(self.model, str(node.target)) if node.op == "call_module" else None
        owned = {} if module is None else dict(self._module_parameters(module))
        if not inputs or not self.fed.isdisjoint(inputs):
            self.fed.add(node)
        if owned or not self.parametric.isdisjoint(inputs):
            self.parametric.add(node)
        carriers = [carrier for carrier in inputs if carrier in self.operands]
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
        if is_lazy(parameter):
            self._stop(name, chain, None, "has no shape yet: run the model once before transforming it")
            return None
        if not parameter.is_floating_point():
            self._stop(name, chain, None, f"has dtype {parameter.dtype}, not a real floating-point one")
            return None
        return Operand(name, parameter.requires_grad, View.of(parameter.shape), chain)

    def _module_parameters(self, module: nn.Module) -> Iterator[tuple[str, Operand]]:
        """Parameters that a called module reads by itself, by attribute path on it."""
        for path, parameter in module.named_parameters():
            operand = self._operand(parameter, ())
            if operand is not None:
                yield path, operand

    def _use(self, node: fx.Node, module: Any, carriers: list[fx.Node], owned: dict[str, Operand]) -> None:
        if len(carriers) == 1 and not owned:
            operand = self.operands[carriers[0]]
            try:
                view = follow(node, carriers[0], operand.view)
            except Refused as refused:
                self._stop(operand.parameter, operand.chain, node, str(refused))
                return
            if view is None:
                return
            if view is not NotImplemented:
                self.operands[node] = Operand(operand.parameter, operand.trainable, view, (*operand.chain, node.name))
                return
        site = Site(node, module, self.operands, owned, self.products, self.fed, self.parametric, self._attribute)
        match, reason = self._match(site)
        matched = () if match is None else (match.weight, match.bias)
        for operand in (*(self.operands[carrier] for carrier in carriers), *owned.values()):
            if not any(operand is item for item in matched):
                data = match is not None and self.operands.get(match.x) is operand
                why = site.reasons.get(operand.parameter) or ("is the data of a product" if data else reason)
                why = why or node.meta.get(REASON) or explain(node, module)
                self._stop(operand.parameter, operand.chain, node, why)

    def _match(self, site: Site) -> tuple[Match | None, str]:
        """The product at a site, or why there is none ("" when no spelling knows the operation)."""
        function = lookup(site.node, site.module)
        if function is None:
            return None, ""
        try:
            match = _call(function, site)
        except Refused as refused:
            return None, str(refused)
        for y in site.node.all_input_nodes:  # a bias added to a product takes the product's place
            if y in self.products and self.products[y].form is match.form:
                del self.products[y]
        self.products[match.y] = match
        return match, ""

    def _stop(self, parameter: str, chain: tuple[str, ...], node: fx.Node | None, reason: str) -> None:
        """Record why a parameter is no layer's; the first reason stays."""
        if node is None:
            stop = Uncovered(parameter, f"It {reason}.", chain)
        else:
            stop = Uncovered(parameter, f"It {reason} (node '{node.name}').", (*chain, node.name), source(node))
        self.stops.setdefault(parameter, stop)

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
