"""Steps that a parameter may pass before its product: transpositions, views, casts, constant factors.

A link is a function registered under everything that means the same step; it is called with the
:class:`~fxcurv.layers.view.View` so far and the operation's other arguments and returns the next view.
``NotImplemented`` says that this call is no such step (a product with a tensor instead of a number).
``ENDS`` are operations through which no gradient reaches the parameter.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import fx

from fxcurv.layers.view import Refused, View

aten = torch.ops.aten
Function = TypeVar("Function", bound=Callable[..., Any])
LINKS: dict[Any, Callable[..., Any]] = {}

ENDS: set[Any] = {"detach", "size", "dim", "numel", "stride", "element_size", "is_floating_point", "get_device", len}
ENDS |= {torch.detach, torch.numel, torch.is_floating_point}
ENDS |= {aten.detach.default, aten.sym_size.int, aten.sym_numel.default}
END_ATTRIBUTES = {"data", "shape", "dtype", "device", "ndim", "is_cuda", "requires_grad", "layout", "itemsize"}


def link(*targets: Any) -> Callable[[Function], Function]:
    """Register a function ``(view, *arguments) -> View | NotImplemented``."""

    def register(function: Function) -> Function:
        LINKS.update(dict.fromkeys(targets, function))
        return function

    return register


def follow(node: fx.Node, source: fx.Node, view: View) -> Any:
    """The view after ``node`` has read the parameter from ``source``; ``None`` if no gradient passes.

    ``NotImplemented`` if ``node`` is no link; raises :class:`Refused` for a link that cannot be followed.
    """
    arguments = list(node.args)
    if node.op == "call_function" and node.target is getattr and len(arguments) == 2:
        if arguments[1] in END_ATTRIBUTES:
            return None
        step = LINKS.get(f".{arguments[1]}")
        return NotImplemented if step is None else step(view)
    if node.op == "call_module" or node.op == "output":
        return NotImplemented
    if node.target in ENDS:
        return None
    step = LINKS.get(node.target)
    if step is None:
        return NotImplemented
    keywords = dict(node.kwargs)
    if not arguments or arguments[0] is not source:
        if step is _times and len(arguments) == 2 and arguments[1] is source:
            arguments.reverse()
        elif not arguments and "input" in keywords and keywords.pop("input") is source:
            arguments = [source]
        else:
            return NotImplemented
    try:
        return step(view, *arguments[1:], **keywords)
    except (TypeError, ValueError, IndexError):
        raise Refused(f"passes '{node.name}' in a way that is not understood") from None


def _sizes(values: tuple[Any, ...]) -> list[int]:
    flat = list(values[0]) if len(values) == 1 and isinstance(values[0], (tuple, list)) else list(values)
    if not all(isinstance(value, int) for value in flat):
        raise Refused("is reshaped to sizes that the graph computes")
    return flat


@link("t", "numpy_T", ".T", ".H", torch.t, torch.adjoint, aten.t.default, aten.numpy_T.default)
def _reverse(view: View) -> View:
    return view.permute(range(view.ndim)[::-1])


@link(".mT", ".mH", "adjoint", aten.mT.default, aten.adjoint.default)
def _matrix_transpose(view: View) -> View:
    return view.transpose(-2, -1)


@link("transpose", "swapaxes", "swapdims", torch.transpose, torch.swapaxes, torch.swapdims, aten.transpose.int)
def _transpose(view: View, dim0: int, dim1: int) -> View:
    return view.transpose(dim0, dim1)


@link("permute", torch.permute, aten.permute.default)
def _permute(view: View, *dims: Any) -> View:
    return view.permute([dim % view.ndim for dim in _sizes(dims)])


@link("movedim", "moveaxis", torch.movedim, torch.moveaxis, aten.movedim.int)
def _movedim(view: View, source: int, destination: int) -> View:
    order = [k for k in range(view.ndim) if k != source % view.ndim]
    order.insert(destination % view.ndim, source % view.ndim)
    return view.permute(order)


@link("view", "reshape", torch.reshape, aten.view.default, aten.reshape.default, aten._unsafe_view.default)
def _reshape(view: View, *shape: Any) -> View:
    return view.reshape(_sizes(shape))


@link("flatten", torch.flatten, aten.flatten.using_ints)
def _flatten(view: View, start_dim: int = 0, end_dim: int = -1) -> View:
    if view.ndim == 0:
        return view.reshape([1])
    first, last = start_dim % view.ndim, end_dim % view.ndim
    return view.reshape([*view.shape[:first], -1, *view.shape[last + 1 :]])


@link("unsqueeze", torch.unsqueeze, aten.unsqueeze.default)
def _unsqueeze(view: View, dim: int) -> View:
    place = dim % (view.ndim + 1)
    order = [*range(1, place + 1), 0, *range(place + 1, view.ndim + 1)]
    return view.expand([1, *view.shape]).permute(order)


@link("squeeze", torch.squeeze, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(view: View, dim: Any = None) -> View:
    dims = range(view.ndim) if dim is None else [k % view.ndim for k in ([dim] if isinstance(dim, int) else dim)]
    return view.reshape([size for k, size in enumerate(view.shape) if size != 1 or k not in dims])


@link("expand", aten.expand.default)
def _expand(view: View, *sizes: Any, implicit: bool = False) -> View:
    flat = list(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else list(sizes)
    return view.expand([size if isinstance(size, int) else None for size in flat])


@link("mul", "multiply", operator.mul, torch.mul, torch.multiply, aten.mul.Tensor, aten.mul.Scalar)
def _times(view: View, other: Any) -> Any:
    return view.times(float(other)) if isinstance(other, (int, float)) else NotImplemented


@link("div", "divide", operator.truediv, torch.div, torch.divide, torch.true_divide, aten.div.Tensor, aten.div.Scalar)
def _over(view: View, other: Any, rounding_mode: Any = None) -> Any:
    number = isinstance(other, (int, float)) and other != 0 and rounding_mode is None
    return view.times(1.0 / other) if number else NotImplemented


@link("neg", "negative", operator.neg, torch.neg, torch.negative, aten.neg.default)
def _negative(view: View) -> View:
    return view.times(-1.0)


@link("float", "double", "half", "bfloat16", "contiguous", "clone", "type_as", "cuda", "cpu", "to", "type")
@link(aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default, aten.type_as.default)
@link(torch.clone, aten.clone.default, aten.contiguous.default, aten.alias.default)
def _same(view: View, *arguments: Any, **keywords: Any) -> View:
    if any(isinstance(a, torch.dtype) and not a.is_floating_point for a in (*arguments, *keywords.values())):
        raise Refused("is cast to a type without gradients")
    return view
