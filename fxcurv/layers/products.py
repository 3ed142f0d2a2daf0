"""Spellings of linear products: ``nn.Linear``, ``F.linear``, ``addmm``, ``@``, ``bmm``, ``einsum``, a separate bias.

Everything but the plain matrix on the last (or last but one) axis is brought to labelled axes first.
"""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fxcurv.capture.proxies import IN_PLACE
from fxcurv.layers.elements import lone_bias
from fxcurv.layers.elementwise import shift
from fxcurv.layers.linear import einsum_form, linear_form
from fxcurv.layers.spelling import Match, Operand, Site, is_plain, spelling
from fxcurv.layers.view import Refused

aten = torch.ops.aten


def _plain(
    at: Site, x: Any, weight: Operand, bias: Any, out: int, inner: int, axis: int = -1, factor: float = 1.0
) -> Match:
    """A matrix whose derived axes ``out`` and ``inner`` are outputs and inputs, on one axis of x."""
    size = weight.view.shape[out]
    form = linear_form(weight.view.times(factor), out, inner, axis)
    bias = bias if isinstance(bias, Operand) else at.bias(bias, size)
    return Match("linear", form, at.data(x), at.node, weight, bias, out_axes=((axis, size),))


def _contract(at: Site, data: Any, weight: Operand, x: str, w: str, y: str) -> Match:
    """``einsum("x,w->y")`` with the parameter as w."""
    if len(w) != weight.view.ndim:
        raise Refused("meets a product that expects another number of axes")
    form = einsum_form(weight.view, x, w, y)
    order = [c for c in form.w if c in x and c in y] + [c for c in form.w if c not in x]
    size = dict(zip(form.w, form.sizes, strict=True))
    tail = y.rpartition("...")[2]
    out_axes = None
    if set(order) <= set(tail):
        out_axes = tuple((tail.index(c) - len(tail), size[c]) for c in order)
    return Match("linear", form, at.data(data), at.node, weight, out_axes=out_axes)


def _sides(at: Site, left: Any, right: Any) -> tuple[Operand, bool]:
    """The one operand that is a parameter, and whether it is the right one."""
    first, second = at.operand(left), at.operand(right)
    if first is not None and second is not None:
        fed = (left in at.fed, right in at.fed)  # a parameter repeated by the batch size counts as data
        if fed[0] == fed[1]:
            raise Refused("is multiplied by another parameter, not by data")
        return (second, True) if fed[0] else (first, False)
    if second is not None:
        return second, True
    if first is None:
        raise Refused("is not an operand of the product itself")
    return first, False


@spelling(nn.Linear, NonDynamicallyQuantizableLinear)
def _module(at: Site, input: Any) -> Match:
    if at.computes("weight"):
        return lone_bias(at, at.own("bias"), -1)
    weight = at.own("weight")
    if weight is None:
        raise Refused("is the bias of a linear layer without weight")
    return _plain(at, input, weight, at.own("bias"), 0, 1)


@spelling(F.linear, aten.linear.default)
def _linear(at: Site, input: Any, weight: Any, bias: Any = None) -> Match:
    if at.operand(weight) is None:
        return lone_bias(at, bias, -1)
    operand = at.weight(weight)
    if operand.view.ndim == 1:
        return _contract(at, input, operand, "...i", "i", "...")
    return _plain(at, input, operand, bias, 0, 1)


@spelling("addmm", torch.addmm, aten.addmm.default)
def _addmm(at: Site, input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> Match:
    if not isinstance(alpha, (int, float)):
        raise Refused("is multiplied by a factor that the graph computes")
    operand, right = _sides(at, mat1, mat2)
    out, inner, axis = (1, 0, -1) if right else (0, 1, -2)
    bias = at.operand(input)
    if bias is not None and (beta != 1 or not _is_bias(bias, ((axis, operand.view.shape[out]),))):
        bias = None
    return _plain(at, mat1 if right else mat2, operand, bias, out, inner, axis, float(alpha))


@spelling("mm", "matmul", operator.matmul, torch.mm, torch.matmul, aten.mm.default, aten.matmul.default)
def _matmul(at: Site, left: Any, right: Any) -> Match:
    operand, is_right = _sides(at, left, right)
    data = left if is_right else right
    ndim = operand.view.ndim
    if ndim == 1:
        if is_right:
            return _contract(at, data, operand, "...i", "i", "...")
        if at.rank(data) == 1:
            return _contract(at, data, operand, "i", "i", "")
        return _contract(at, data, operand, "...in", "i", "...n")
    if ndim == 2:
        return _plain(at, data, operand, None, 1, 0) if is_right else _plain(at, data, operand, None, 0, 1, -2)
    return _stack(at, data, operand, is_right)


def _stack(at: Site, data: Any, operand: Operand, is_right: bool) -> Match:
    """``matmul`` with three or more weight axes: the leading ones are aligned with those of the data."""
    rank = at.rank(data)
    lead = "abcdefghjklm"[: operand.view.ndim - 2]
    if rank is None:
        raise Refused("is a stack of matrices, and the rank of its data is unknown; use bmm or einsum")
    w = lead + ("io" if is_right else "oi")
    if rank == 1:
        return _contract(at, data, operand, "i", w, lead + "o")
    own = rank - 2
    names = ("ABCDEFGHJKLM"[: max(own - len(lead), 0)] + lead[max(len(lead) - own, 0) :]) if own else ""
    x = names + ("ni" if is_right else "in")
    y = (names if len(names) >= len(lead) else lead) + ("no" if is_right else "on")
    return _contract(at, data, operand, x, w, y)


@spelling("bmm", torch.bmm, aten.bmm.default)
def _bmm(at: Site, input: Any, mat2: Any) -> Match:
    operand, right = _sides(at, input, mat2)
    if right:
        return _contract(at, input, operand, "gni", "gio", "gno")
    return _contract(at, mat2, operand, "gin", "goi", "gon")


@spelling("mv", torch.mv, aten.mv.default)
def _mv(at: Site, input: Any, vec: Any) -> Match:
    operand, right = _sides(at, input, vec)
    return _contract(at, input, operand, "ni", "i", "n") if right else _contract(at, vec, operand, "i", "oi", "o")


@spelling("dot", torch.dot, aten.dot.default)
def _dot(at: Site, input: Any, tensor: Any) -> Match:
    operand, right = _sides(at, input, tensor)
    return _contract(at, input if right else tensor, operand, "i", "i", "")


@spelling(torch.einsum, aten.einsum.default)
def _einsum(at: Site, equation: Any, *operands: Any, path: Any = None) -> Match:
    if not isinstance(equation, str):
        raise Refused("is used by an einsum without an equation in letters")
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if len(operands) != 2:
        raise Refused("is used by an einsum of more than two operands; split it into two")
    inputs, arrow, y = equation.replace(" ", "").partition("->")
    left, comma, right = inputs.partition(",")
    if not arrow:
        letters = sorted(c for c in set(left + right) - {",", "."} if (left + right).count(c) == 1)
        y = ("..." if "." in inputs else "") + "".join(letters)
    operand, is_right = _sides(at, *operands)
    x, w = (left, right) if is_right else (right, left)
    data = operands[0] if is_right else operands[1]
    if "..." in w:
        if operand.view.ndim != len(w) - 3:
            raise Refused("has axes under the ellipsis of an einsum; name them")
        w = w.replace("...", "")
    return _contract(at, data, operand, x, w, y)


@spelling(torch.tensordot, aten.tensordot.default)
def _tensordot(at: Site, a: Any, b: Any, dims: Any = 2, dims_other: Any = None, out: None = None) -> Match:
    operand, right = _sides(at, a, b)
    data = a if right else b
    rank, ndim = at.rank(data), operand.view.ndim
    if dims_other is not None:
        dims = (dims, dims_other)
    if isinstance(dims, int):
        if right:  # the last axes of a meet the first of b
            inner, outer = "abcdefgh"[:dims], "opqrstuvwxyz"[: ndim - dims]
            return _contract(at, data, operand, "..." + inner, inner + outer, "..." + outer)
        dims = (tuple(range(ndim - dims, ndim)), tuple(range(dims)))
    mine, theirs = (dims[1], dims[0]) if right else dims
    if rank is None:
        if not right or any(k >= 0 for k in theirs):
            raise Refused("is used by a tensordot, and the rank of its data is unknown; use einsum")
        rank = -min(theirs)
        if sorted(theirs) != list(range(-rank, 0)):
            raise Refused("is used by a tensordot, and the rank of its data is unknown; use einsum")
        dots = "..."
    else:
        dots = ""
    w = list("opqrstuvwxyz"[:ndim])
    x = list("ABCDEFGHIJKLMN"[:rank])
    for own, other in zip(mine, theirs, strict=True):
        x[other] = w[own]
    kept_x = "".join(c for c in x if c not in w)
    kept_w = "".join(c for c in w if c not in x)
    y = dots + kept_x + kept_w if right else kept_w + kept_x
    return _contract(at, data, operand, dots + "".join(x), "".join(w), y)


@spelling("add", "add_", operator.add, operator.iadd, IN_PLACE["iadd"], torch.add, aten.add.Tensor, aten.add_.Tensor)
def _separate_bias(at: Site, input: Any, other: Any, *, alpha: Any = 1) -> Match:
    """A parameter added to a product that nothing else reads is that product's bias, any other is a shift."""
    for product, argument in ((input, other), (other, input)):
        match, bias = at.products.get(product), at.operand(argument)
        if match is None or bias is None:
            continue
        free = match.bias is None and match.out_axes is not None and len(product.users) == 1 and alpha == 1
        if free and _is_bias(bias, match.out_axes or ()):
            return replace(match, bias=bias, y=at.node)
    return shift(at, input, other, alpha)


def _is_bias(bias: Operand, out_axes: tuple[tuple[int, int], ...]) -> bool:
    """Whether the tensor, aligned from the right, has exactly the product's output axes."""
    view, wanted = bias.view, dict(out_axes)
    if view.scale != 1.0 or not is_plain(view) or list(wanted) != sorted(wanted):
        return False
    if math.prod(view.shape) != math.prod(wanted.values()):
        return False
    return all(size in (1, wanted.get(k - view.ndim)) for k, size in enumerate(view.shape))
