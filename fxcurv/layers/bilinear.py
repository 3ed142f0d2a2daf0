"""Bilinear layers: a linear layer whose input is the outer product of two inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcurv.layers.form import Form
from fxcurv.layers.spelling import Match, Operand, Site, spelling
from fxcurv.layers.view import Refused

aten = torch.ops.aten


@dataclass(frozen=True)
class BilinearForm(Form):
    """``y_k = x1^T W_k x2`` with weight (d_out, d_1, d_2): the input features are the products x1_i x2_j, i-major.

    x: the first input (b, ..., d_1); aux: the second (b, ..., d_2). A vector has b = s = 1.
    """

    def rows_a(self, x: Tensor, *aux: Tensor) -> Tensor:
        """See :meth:`Form.rows_a`."""
        (other,) = aux
        return self._augment(self._rows((x.unsqueeze(-1) * other.unsqueeze(-2)).flatten(-2), self.inputs))

    def rows_g(self, g: Tensor) -> Tensor:
        """See :meth:`Form.rows_g`; g (b, ..., d_out)."""
        return self._rows(g, self.d_out)

    def _rows(self, tensor: Tensor, size: int) -> Tensor:
        lead = tensor.shape[:-1]
        return tensor.reshape(*(lead[:1] or (1,)), math.prod(lead[1:]), 1, size)

    @property
    def tag(self) -> str:
        """See :attr:`Form.tag`."""
        return f"bilinear{self._constant}"


def _match(at: Site, first: Any, second: Any, weight: Operand, bias: Any) -> Match:
    """``bias`` is an :class:`Operand`, ``None`` or the node of a bias argument."""
    view = weight.view
    if view.ndim != 3:
        raise Refused("meets a bilinear product with another number of axes than three")
    size, left, right = view.shape
    form = BilinearForm(1, size, left * right, False, view.order((0, 1, 2)), view.stored, view.scale)
    bias = at.bias(bias, size) if isinstance(bias, fx.Node) else bias
    aux = (at.data(second),)
    return Match("bilinear", form, at.data(first), at.node, weight, bias, aux, ((-1, size),))


@spelling(nn.Bilinear)
def _module(at: Site, input1: Any, input2: Any) -> Match:
    weight = at.own("weight")
    if weight is None:
        raise Refused("is the bias of a bilinear layer without weight")
    return _match(at, input1, input2, weight, at.own("bias"))


@spelling(F.bilinear, aten.bilinear.default)
def _function(at: Site, input1: Any, input2: Any, weight: Any, bias: Any = None) -> Match:
    return _match(at, input1, input2, at.weight(weight), bias)
