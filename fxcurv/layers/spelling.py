"""The table of spellings: which operations are parametrised products, and how to read their arguments.

A spelling is a function registered under everything that means the same product: a module class, a Python
function, a tensor method's name, an ATen overload. It is called with a :class:`Site` and the operation's own
arguments (so its Python signature *is* the operation's signature) and returns a :class:`Match`, or raises
:class:`~fxcurv.layers.view.Refused` with a reason. A new layer kind is one file with a form and its spellings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import fx, nn

from fxcurv.capture.kept import keep_whole
from fxcurv.errors import FxcurvError
from fxcurv.layers.form import Form
from fxcurv.layers.region import Place
from fxcurv.layers.view import Refused, View

Function = TypeVar("Function", bound=Callable[..., Any])
SPELLINGS: dict[Any, Callable[..., Match]] = {}


def spelling(*targets: Any) -> Callable[[Function], Function]:
    """Register ``(site, *arguments) -> Match`` for module classes, functions, method names, ATen overloads."""

    def register(function: Function) -> Function:
        for target in targets:
            if target in SPELLINGS:
                raise FxcurvError(f"'{target}' has two spellings; register each operation once.")
            SPELLINGS[target] = function
            if isinstance(target, type) and issubclass(target, nn.Module):
                keep_whole(target)
        return function

    return register


@dataclass(frozen=True)
class Operand:
    """A parameter as it arrives at an operation.

    parameter: full name; trainable: read when detection ran; view: what became of its axes.
    chain: names of the nodes it passed; empty when a module reads its own parameter.
    """

    parameter: str
    trainable: bool
    view: View
    chain: tuple[str, ...] = ()

    @property
    def place(self) -> Place:
        """The part of the parameter that arrives; all of it where no region can say which."""
        try:
            return Place(self.parameter, self.view.region)
        except Refused:
            return Place(self.parameter)


@dataclass(frozen=True)
class Match:
    """One product found.

    form: axis roles *without* bias coordinate; it is added once it is known that the bias is trainable
        and belongs to this weight alone.
    weight, bias: the parameters in these roles, ``None`` where there is none.
    out_axes: positions from the right (negative) and sizes of the product's axes that hold (groups, d_out) in
        normal order, where a bias may be added by a separate addition; ``None`` where it may not.
    """

    kind: str
    form: Form
    x: fx.Node
    y: fx.Node
    weight: Operand | None
    bias: Operand | None = None
    aux: tuple[fx.Node, ...] = ()
    out_axes: tuple[tuple[int, int], ...] | None = None


@dataclass
class Site:
    """One node under inspection, with what detection knows so far.

    node: the operation; module: the called module, ``None`` for functions and methods.
    operands: parameters by the node that carries them, over the whole graph seen so far.
    owned: the called module's own parameters by attribute name.
    products: matches so far, by the node of the product.
    fed, parametric: nodes that depend on inputs or constants of the graph, and on parameters.
    varying: nodes whose values, not only their sizes, depend on the inputs of the graph.
    attribute: returns a node that reads a tensor of the user's module, creating it where needed.
    reasons: why an operand of this node is not part of the match, by parameter.
    """

    node: fx.Node
    module: Any
    operands: dict[fx.Node, Operand]
    owned: dict[str, Operand]
    products: dict[fx.Node, Match]
    fed: set[fx.Node]
    parametric: set[fx.Node]
    attribute: Callable[[str], fx.Node]
    varying: set[fx.Node] = field(default_factory=set)
    reasons: dict[str, str] = field(default_factory=dict)

    def operand(self, argument: Any) -> Operand | None:
        """The parameter that arrives as ``argument``, if it is one."""
        return self.operands.get(argument) if isinstance(argument, fx.Node) else None

    def weight(self, argument: Any) -> Operand:
        """The parameter in the weight's position; anything else is refused."""
        operand = self.operand(argument)
        if operand is None:
            raise Refused("meets a weight that is not a parameter of its own")
        return operand

    def bias(self, argument: Any, size: int) -> Operand | None:
        """The parameter in the bias's position, if it can be a coordinate of ``size`` outputs."""
        operand = self.operand(argument)
        if operand is None:
            return None
        view = operand.view
        if view.scale != 1.0:
            self.reasons[operand.parameter] = "is a bias multiplied by a number"
        elif not is_plain(view) or math.prod(view.shape) != size:
            self.reasons[operand.parameter] = "is a bias in an order that is not that of its outputs"
        else:
            return operand
        return None

    def own(self, role: str) -> Operand | None:
        """The called module's own parameter ``weight`` or ``bias``.

        A module that has the tensor but not as a parameter (parametrisation, weight norm, pruning) is refused.
        """
        if self.computes(role):
            raise Refused(f"reaches the {role} of {type(self.module).__name__} through a parametrisation")
        return self.owned.get(role)

    def computes(self, role: str) -> bool:
        """Whether the called module has a tensor of this name that is no parameter of its own."""
        return role not in self.owned and getattr(self.module, role, None) is not None

    def data(self, argument: Any) -> fx.Node:
        """The node of the data operand; an expression of parameters alone is no data."""
        if not isinstance(argument, fx.Node):
            raise Refused("meets a constant instead of data")
        if argument in self.parametric and argument not in self.fed:
            raise Refused("is multiplied by another parameter, not by data")
        return argument

    def rank(self, argument: Any) -> int | None:
        """Number of axes of a node's value where it was recorded (``meta["shape"]``, see fxcurv.capture.propagate)."""
        shape = argument.meta.get("shape") if isinstance(argument, fx.Node) else None
        return None if shape is None else len(shape)


def is_plain(view: View) -> bool:
    """Whether the derived tensor lists the stored numbers in their own order."""
    try:
        return view.order(range(view.ndim)) == tuple(range(len(view.stored)))
    except Refused:
        return False


def numbers(value: Any, count: int) -> tuple[int, ...]:
    """``count`` integers from one integer or a sequence; sizes that the graph computes are refused."""
    values = (value,) * count if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(values) == 1:
        values = values * count
    if len(values) != count or not all(isinstance(item, int) for item in values):
        raise Refused("is used with a geometry that the graph computes")
    return values


def lookup(node: fx.Node, module: Any) -> Callable[..., Match] | None:
    """The spelling of a node; a module class counts only while its ``forward`` is the registered one."""
    if node.op != "call_module":
        return SPELLINGS.get(node.target)
    kind: Any = type(module)
    for cls in kind.__mro__:
        if cls in SPELLINGS:
            return SPELLINGS[cls] if kind.forward is cls.forward else None
    return None
