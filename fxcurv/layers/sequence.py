"""What follows a layer: the elementwise function its output goes through, and the one layer that reads the result.

Methods that look past a single layer need it: a local problem with the layer's own activation, curvature pushed back
from one layer to the one before, correlations of neighbours. It is a fact only where the graph leaves no doubt: one
reader, one known function, one next layer. Everything else is "" and methods fall back.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxcurv.capture.captured import resolve
from fxcurv.layers.chain import is_size
from fxcurv.layers.form import Form
from fxcurv.layers.layer import Layer
from fxcurv.layers.linear import LinearForm

aten = torch.ops.aten
IDENTITY = "identity"


@dataclass(frozen=True)
class Follower:
    """What follows a layer.

    activation: name of the function, "identity" for none, "" for anything that is not in the table. feeds: name of the
    layer that reads the function's output and that nothing shares it with, "" for none. aligned: whether the output
    rows of the one are the input rows of the other, row by row and feature by feature, but for the function and the
    constant. last: whether the output of the layer itself is all that the model returns.
    """

    activation: str = ""
    feeds: str = ""
    last: bool = False
    aligned: bool = False


@dataclass(frozen=True)
class Spelled:
    """The spellings of one elementwise function: a module class, functions, methods, ATen overloads.

    options: further arguments in order with the values that the name stands for; another value is another function.
    """

    module: type[nn.Module]
    calls: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def module_is(self, module: Any) -> bool:
        """Whether a module computes this function, by the class's own forward."""
        same = isinstance(module, self.module) and type(module).forward is self.module.forward
        return same and all(getattr(module, name) == value for name, value in self.options.items())

    def call_is(self, node: fx.Node) -> bool:
        """Whether a call computes this function."""
        if node.target not in self.calls:
            return False
        given = dict(zip(self.options, node.args[1:], strict=False)) | node.kwargs
        return all(given.get(name, value) == value for name, value in self.options.items())


ACTIVATIONS: dict[str, Spelled] = {
    "tanh": Spelled(nn.Tanh, ("tanh", "tanh_", torch.tanh, torch.tanh_, F.tanh, aten.tanh.default, aten.tanh_.default)),
    "sigmoid": Spelled(
        nn.Sigmoid,
        (
            *("sigmoid", "sigmoid_", torch.sigmoid, torch.sigmoid_, torch.special.expit, F.sigmoid),
            *(aten.sigmoid.default, aten.sigmoid_.default, aten.special_expit.default),
        ),
    ),
    "relu": Spelled(
        nn.ReLU,
        (
            *("relu", "relu_", torch.relu, torch.relu_, F.relu, F.relu_),
            *(aten.relu.default, aten.relu_.default),
        ),
    ),
    "leaky_relu": Spelled(
        nn.LeakyReLU,
        (F.leaky_relu, F.leaky_relu_, aten.leaky_relu.default, aten.leaky_relu_.default),
        {"negative_slope": 0.01},
    ),
    "softplus": Spelled(nn.Softplus, (F.softplus, aten.softplus.default), {"beta": 1, "threshold": 20}),
}
"""Monotone functions by name. Their derivative is a function of their value (up to the sign at a kink)."""


def followers(layers: Iterable[Layer], model: nn.Module) -> dict[str, Follower]:
    """What follows each of ``layers``, by the layer's name; ``model`` resolves the graph's modules, in its mode of now.

    A layer that is used several times, or found in a forward in pieces, has no single follower.
    """
    layers = tuple(layers)
    single = [layer for layer in layers if len(layer.uses) == 1 and not layer.alone]
    readers: dict[fx.Node, list[Layer]] = {}
    writers: dict[fx.Node, list[Layer]] = {}
    for layer in layers:
        for use in layer.uses:
            readers.setdefault(use.x, []).append(layer)
            writers.setdefault(use.y, []).append(layer)
    found = {}
    for layer in layers:
        if layer not in single:
            found[layer.name] = Follower()
            continue
        use = layer.uses[0]
        whole = len(writers[use.y]) == 1 and use.form.outputs == (0, use.form.d_out)
        activation, value = _activation(use.y, readers, model)
        nexts = readers.get(value, []) if value is not None and len(_readers(value)) == 1 else []
        feeds = nexts[0].name if whole and len(nexts) == 1 and nexts[0] in single else ""
        aligned = bool(feeds) and _aligned(use.form, nexts[0].form)
        found[layer.name] = Follower(activation, feeds, whole and activation == IDENTITY and not nexts, aligned)
    return found


def _aligned(form: Form, following: Form) -> bool:
    """Whether both products are of the last axis, and the second one's rows are its data as it is."""
    if not isinstance(form, LinearForm) or not isinstance(following, LinearForm):
        return False
    axes = form.axis == following.axis == -1
    return axes and form.d_out == following.inputs and form.groups == following.groups == 1 and following.scale == 1.0


def _activation(y: fx.Node, read: Container[fx.Node], model: nn.Module) -> tuple[str, fx.Node | None]:
    """Name of the function that a product goes through, and the node of what leaves it, transparent steps included.

    read: data operands of layers.
    """
    node = _past(y, model)
    users = _readers(node)
    if len(users) != 1:
        return "", None
    name = _name(users[0], node, model)
    if name:
        return name, _past(users[0], model)
    plain = node in read or (users[0].op == "output" and users[0].all_input_nodes == [node])
    return (IDENTITY, node) if plain else ("", None)


def _past(node: fx.Node, model: nn.Module) -> fx.Node:
    """The value behind steps that change nothing."""
    users = _readers(node)
    while len(users) == 1 and _is_transparent(users[0], node, model):
        node = users[0]
        users = _readers(node)
    return node


def _readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read a value; facts such as its shape are not read from it."""
    return [user for user in node.users if not is_size(user)]


def _name(node: fx.Node, source: fx.Node, model: nn.Module) -> str:
    """The activation that a node applies to ``source``, "" for none that is known."""
    if node.all_input_nodes != [source]:
        return ""
    if node.op == "call_module":
        module = resolve(model, str(node.target))
        return next((name for name, spelled in ACTIVATIONS.items() if spelled.module_is(module)), "")
    return next((name for name, spelled in ACTIVATIONS.items() if spelled.call_is(node)), "")


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_DROPS: set[Any] = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, aten.dropout.default}
_DROPS |= {aten.feature_dropout.default}


def _is_transparent(node: fx.Node, source: fx.Node, model: nn.Module) -> bool:
    """Whether a node gives its operand back: an identity, or a dropout that drops nothing."""
    if node.all_input_nodes != [source]:
        return False
    if node.op == "call_module":
        module: Any = resolve(model, str(node.target))
        if isinstance(module, _DROPOUTS):
            return bool(not module.training or module.p == 0)
        return type(module) is nn.Identity
    if node.target not in _DROPS:
        return False
    given = dict(zip(("p", "training"), node.args[1:], strict=False)) | {
        "training" if name == "train" else name: value for name, value in node.kwargs.items()
    }
    return bool(given.get("p") == 0 or given.get("training", True) is False)
