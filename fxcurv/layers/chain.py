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
_DETACH = {"detach", torch.detach, aten.detach.default}
ENDS |= {torch.detach, torch.numel, torch.is_floating_point}
ENDS |= {aten.detach.default, aten.sym_size.int, aten.sym_numel.default}
END_ATTRIBUTES = {"data", "shape", "dtype", "device", "ndim", "is_cuda", "requires_grad", "layout", "itemsize"}


def is_size(node: fx.Node) -> bool:
    """Whether a node is a size, a type or another fact about a tensor that its values do not touch."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in END_ATTRIBUTES - {"data"}
    return node.target in ENDS - _DETACH


def link(*targets: Any) -> Callable[[Function], Function]:
    """Register a function ``(view, *arguments) -> View | NotImplemented``."""

    def register(function: Function) -> Function:
        LINKS.update(dict.fromkeys(targets, function))
        return function

    return register


def follow(node: fx.Node, source: fx.Node, view: View) -> Any:
    """The view after ``node`` has read the parameter from ``source``; ``None`` if no gradient passes.

    A tuple of views for a step that returns several parts.

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
        if step in _SWAPPED and len(arguments) == 2 and arguments[1] is source:
            step = _SWAPPED[step]
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


@link("expand", "broadcast_to", torch.broadcast_to, aten.expand.default, aten.broadcast_to.default)
def _expand(view: View, *sizes: Any, implicit: bool = False) -> View:
    flat = list(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else list(sizes)
    return view.expand([size if isinstance(size, int) else None for size in flat])


@link("expand_as", aten.expand_as.default)
def _expand_as(view: View, other: Any) -> View:
    shape = other.meta.get("shape") if isinstance(other, fx.Node) else None
    if shape is None:
        raise Refused("is expanded to the shape of data whose rank is unknown")
    return view.expand([None] * len(shape))


@link("repeat", "tile", torch.tile, aten.repeat.default, aten.tile.default)
def _repeat(view: View, *repeats: Any) -> View:
    flat = list(repeats[0]) if len(repeats) == 1 and isinstance(repeats[0], (tuple, list)) else list(repeats)
    shape = [1] * (len(flat) - view.ndim) + list(view.shape)
    flat = [1] * (len(shape) - len(flat)) + flat
    if any(size != 1 and count != 1 for size, count in zip(shape, flat, strict=True)):
        raise Refused("is repeated along an axis that is not 1")
    sizes = [-1 if count == 1 else count if isinstance(count, int) else None for count in flat]
    return view.expand([1 if size == -1 and k < len(flat) - view.ndim else size for k, size in enumerate(sizes)])


@link("repeat_interleave", torch.repeat_interleave, aten.repeat_interleave.self_int)
def _interleave(view: View, repeats: Any, dim: Any = None, *, output_size: Any = None) -> View:
    if dim is None or view.shape[dim] != 1:
        raise Refused("is repeated along an axis that is not 1")
    sizes: list[int | None] = [-1] * view.ndim
    sizes[dim] = repeats if isinstance(repeats, int) else None
    return view.expand(sizes)


@link("mul", "multiply", operator.mul, torch.mul, torch.multiply, aten.mul.Tensor, aten.mul.Scalar)
def _times(view: View, other: Any) -> Any:
    return view.times(float(other)) if isinstance(other, (int, float)) else NotImplemented


@link("div", "divide", operator.truediv, torch.div, torch.divide, torch.true_divide, aten.div.Tensor, aten.div.Scalar)
def _over(view: View, other: Any, rounding_mode: Any = None) -> Any:
    number = isinstance(other, (int, float)) and other != 0 and rounding_mode is None
    return view.times(1.0 / other) if number else NotImplemented


@link("add", operator.add, torch.add, aten.add.Tensor, aten.add.Scalar)
def _plus(view: View, other: Any, *, alpha: Any = 1) -> Any:
    """A number added changes no gradient (``1 + w`` as the scale of a norm)."""
    return view if isinstance(other, (int, float)) and alpha == 1 else NotImplemented


@link("sub", "subtract", operator.sub, torch.sub, torch.subtract, aten.sub.Tensor, aten.sub.Scalar)
def _less(view: View, other: Any, *, alpha: Any = 1) -> Any:
    return view if isinstance(other, (int, float)) and alpha == 1 else NotImplemented


@link("rsub", torch.rsub, aten.rsub.Scalar, aten.rsub.Tensor)
def _taken_from(view: View, other: Any, alpha: Any = 1) -> Any:
    return view.times(-1.0) if isinstance(other, (int, float)) and alpha == 1 else NotImplemented


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


# Steps that a parameter may also enter as the second operand, and what they then are.
_SWAPPED: dict[Any, Callable[..., Any]] = {_times: _times, _plus: _plus, _less: _taken_from}
