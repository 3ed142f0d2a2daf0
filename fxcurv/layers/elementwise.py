"""Spellings of entry-by-entry uses of a parameter: sums, products, quotients, choices and slopes.

Which of the two operands is the parameter is decided by where it comes from; a product with a number is no use but a
step on the way (:mod:`fxcurv.layers.chain`), and a sum with a product of the same axes is that product's bias
(:mod:`fxcurv.layers.products`).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxcurv.capture.proxies import IN_PLACE
from fxcurv.layers.elements import element_match, repeats
from fxcurv.layers.spelling import Match, Operand, Site, is_plain, spelling
from fxcurv.layers.view import Refused, View

aten = torch.ops.aten


def _wider(view: View) -> bool:
    """Whether the form cannot know the parameter's shape, which may be wider than that of the data."""
    return repeats(view) or bool(view.cut)


def _data(at: Site, argument: Any, *others: Any) -> fx.Node:
    """The data operand; it or one of the others must differ between examples, or the output has no example axis."""
    if at.varying.isdisjoint([at.data(item) for item in (argument, *others)]):
        raise Refused("is combined elementwise with a constant, so that no example has a gradient of its own")
    return at.data(argument)


def _pair(at: Site, left: Any, right: Any) -> tuple[Operand, Any, Any]:
    """The one operand that is a parameter, its node and the data's; a parameter repeated by the data counts as data."""
    first, second = at.operand(left), at.operand(right)
    if first is not None and second is not None:
        fed = (left in at.fed, right in at.fed)
        if fed[0] == fed[1]:
            raise Refused("is combined elementwise with another parameter, not with data")
        first, second = (None, second) if fed[0] else (first, None)
    if first is not None:
        return first, left, right
    if second is None:
        raise Refused("is no operand of its own of an elementwise operation")
    return second, right, left


def shift(at: Site, left: Any, right: Any, alpha: Any = 1, sign: float = 1.0) -> Match:
    """``left + sign * alpha * right`` where one of them is a parameter."""
    if not isinstance(alpha, (int, float)):
        raise Refused("is multiplied by a factor that the graph computes")
    weight, carrier, data = _pair(at, left, right)
    _data(at, data)
    factor = sign * alpha if carrier is right else 1.0
    return element_match("shift", weight, at.node, at.node, factor=factor)


@spelling("sub", "sub_", "subtract", operator.sub, operator.isub, IN_PLACE["isub"], torch.sub, torch.subtract)
@spelling(aten.sub.Tensor, aten.sub_.Tensor)
def _minus(at: Site, input: Any, other: Any, *, alpha: Any = 1) -> Match:
    return shift(at, input, other, alpha, -1.0)


@spelling("rsub", torch.rsub, aten.rsub.Tensor)
def _reversed_minus(at: Site, input: Any, other: Any, alpha: Any = 1) -> Match:
    return shift(at, other, input, alpha, -1.0)


@spelling("mul", "multiply", operator.mul, torch.mul, torch.multiply, aten.mul.Tensor)
def _times(at: Site, input: Any, other: Any) -> Match:
    weight, carrier, data = _pair(at, input, other)
    aux = (carrier,) if _wider(weight.view) else ()
    return element_match("scale", weight, _data(at, data), at.node, aux=aux)


@spelling("mul_", "multiply_", operator.imul, IN_PLACE["imul"], aten.mul_.Tensor)
@spelling("div_", "divide_", operator.itruediv, IN_PLACE["itruediv"], aten.div_.Tensor)
def _in_place(at: Site, input: Any, other: Any) -> Match:
    raise Refused("scales its data in place, which destroys the data; write x = x * w instead of x *= w")


@spelling("div", "divide", "true_divide", operator.truediv, torch.div, torch.divide, torch.true_divide)
@spelling(aten.div.Tensor)
def _divided(at: Site, input: Any, other: Any, *, rounding_mode: Any = None) -> Match:
    weight, carrier, data = _pair(at, input, other)
    if carrier is input or rounding_mode is not None:
        raise Refused("is divided by data; multiply with the data's inverse instead")
    return element_match("divisor", weight, _data(at, data), at.node, aux=(carrier,))


@spelling("addcmul", torch.addcmul, aten.addcmul.default)
def _addcmul(at: Site, input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Match:
    """``input + value * tensor1 * tensor2``: a scale, with a shift where ``input`` is a parameter of the same axes."""
    if not isinstance(value, (int, float)):
        raise Refused("is multiplied by a factor that the graph computes")
    if at.operand(tensor1) is None and at.operand(tensor2) is None:
        return shift(at, input, at.node)
    weight, carrier, data = _pair(at, tensor1, tensor2)
    aux = (carrier,) if _wider(weight.view) else ()
    match = element_match("scale", weight, _data(at, data), at.node, aux=aux, factor=float(value))
    other = at.operand(input)
    if other is None:
        return match
    if other.view.shape != weight.view.shape or other.view.scale != 1.0 or not is_plain(other.view):
        raise Refused("is the shift of a scale with other axes")
    return element_match("scale", weight, _data(at, data), at.node, other, aux, factor=float(value))


@spelling(torch.where, aten.where.self)
def _where(at: Site, condition: Any, input: Any, other: Any) -> Match:
    weight, carrier, data = _pair(at, input, other)
    role = "where" if carrier is input else "where not"
    return element_match(role, weight, _data(at, condition, data), at.node, aux=(at.data(data),))


@spelling("where")
def _where_method(at: Site, input: Any, condition: Any, other: Any) -> Match:
    return _where(at, condition, input, other)


def _slope(at: Site, x: Any, weight: Operand) -> Match:
    return element_match("slope", weight, at.data(x), at.node, start=1)


@spelling(nn.PReLU)
def _prelu_module(at: Site, input: Any) -> Match:
    weight = at.own("weight")
    if weight is None:
        raise Refused("belongs to a PReLU without slope")
    return _slope(at, input, weight)


@spelling(F.prelu, "prelu", aten.prelu.default)
def _prelu(at: Site, input: Any, weight: Any) -> Match:
    return _slope(at, input, at.weight(weight))
