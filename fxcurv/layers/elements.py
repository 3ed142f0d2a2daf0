"""Parameters used entry by entry: scales, shifts, tokens that are repeated for every example, slopes.

Every entry of the parameter is a group of its own with d_out = 1, so the exact curvature block of an entry is 1 x 1, or
2 x 2 for a scale followed by a shift of the same entries. The data may be broadcast against the parameter in any way:
an example's gradient is the sum over all axes that the parameter lacks, the example axis excepted.

A parameter that is repeated for every example (a class token, a query, an initial state) is a shift of nothing: the
repeated tensor is the output, whatever is done with it afterwards, and its input is the constant 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxcurv.layers.form import Form
from fxcurv.layers.spelling import Match, Operand, Site, is_plain
from fxcurv.layers.view import Refused, View

# Derivative of the output in an entry, from the data and the auxiliary operands; it broadcasts to the output's shape.
DERIVATIVES: dict[str, Callable[..., Tensor]] = {
    "scale": lambda x, *aux: x,
    "divisor": lambda x, value: -x / value.square(),  # value: the parameter as it arrives
    "shift": lambda y: y.new_ones(()),  # the data is the output itself, for its shape alone
    "slope": lambda x: x.clamp(max=0),
    "where": lambda mask, other: mask.to(other.dtype),
    "where not": lambda mask, other: mask.logical_not().to(other.dtype),
}


@dataclass(frozen=True)
class ElementForm(Form):
    """One group an entry. x, g: data and output gradient in their own shapes, broadcast as the operation does.

    role: a key of ``DERIVATIVES``.
    shape: of the parameter as it arrives, 1 where it is repeated; aligned from the right, or from axis ``start``.
    cut: the output may hold only the first indices of the parameter's axes; the others get no gradient.
    example: axis of the output that counts examples; where it is the parameter's, all is one example (b = 1).
    """

    role: str = "scale"
    shape: tuple[int, ...] = ()
    start: int | None = None
    cut: bool = False
    example: int = 0

    def rows_a(self, x: Tensor, *aux: Tensor) -> Tensor:
        """See :meth:`Form.rows_a`; the derivative of the output in every entry (and 1)."""
        shapes = [x.shape, *(tensor.shape for tensor in aux)]
        if self.start is None and not self.cut:
            shapes.append(torch.Size(self.shape))
        derivative = DERIVATIVES[self.role](x, *aux)
        return self._augment(self._rows(derivative.expand(torch.broadcast_shapes(*shapes))))

    def rows_g(self, g: Tensor) -> Tensor:
        """See :meth:`Form.rows_g`."""
        return self._rows(g)

    def example_gradients(self, x: Tensor, g: Tensor, *aux: Tensor) -> Tensor:
        """Gradient of every example, positions summed, shape (b, groups, d_in); no rows are built."""
        weight = self._sums(g if self.role == "shift" else DERIVATIVES[self.role](x, *aux) * g)
        if self.scale != 1.0:
            weight = weight * self.scale
        return torch.stack([weight, self._sums(g)], -1) if self.bias else weight.unsqueeze(-1)

    def product(self, x: Tensor, g: Tensor, *aux: Tensor) -> Tensor:
        """See :meth:`Form.product`."""
        return self.example_gradients(x, g, *aux).sum(0).unsqueeze(1)

    def kept(self, x: Tensor, *aux: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`Form.kept`: a shift needs the shape of its output only."""
        return (x.new_empty(()).expand(x.shape), *aux) if self.role == "shift" else (x, *aux)

    def _axes(self, rank: int) -> tuple[list[int], list[int], list[int]]:
        """Axes of a tensor: the example axis (or none), the other data axes, and those of the parameter."""
        first = rank - len(self.shape) if self.start is None else self.start
        own = [first + k for k, size in enumerate(self.shape) if size != 1]
        data = [k for k in range(rank) if k not in own]
        return [k for k in data if k == self.example], [k for k in data if k != self.example], own

    def _rows(self, tensor: Tensor) -> Tensor:
        example, positions, own = self._axes(tensor.dim())
        tensor = self._whole(tensor.permute(*example, *positions, *own), len(own))
        lead = tensor.shape[: len(example) + len(positions)]
        return tensor.reshape(math.prod(lead[: len(example)]), math.prod(lead[len(example) :]), self.groups, 1)

    def _sums(self, tensor: Tensor) -> Tensor:
        """(b, groups): summed over positions."""
        example, positions, own = self._axes(tensor.dim())
        if positions:
            tensor = tensor.sum(positions, keepdim=True)
        tensor = self._whole(tensor.permute(*example, *positions, *own), len(own))
        return tensor.reshape(tensor.shape[0] if example else 1, self.groups)

    def _whole(self, tensor: Tensor, count: int) -> Tensor:
        """Zeros where a cut parameter is not read; the parameter's axes are the last ``count``."""
        if not self.cut:
            return tensor
        sizes = [size for size in self.shape if size != 1]
        pads = [(0, size - tensor.shape[k - count]) for k, size in enumerate(sizes)]
        return F.pad(tensor, [side for pair in reversed(pads) for side in pair])

    @property
    def unitwise(self) -> bool:
        """An entry's block is at most 2 x 2."""
        return True

    @property
    def tag(self) -> str:
        """See :attr:`Form.tag`."""
        shape = "x".join(map(str, self.shape))
        place = "" if self.start is None else f" from {self.start}"
        return f"{self.role}[{shape}{place}{' cut' if self.cut else ''} e{self.example}]{self._constant}"


def element_match(
    role: str,
    weight: Operand,
    x: fx.Node,
    y: fx.Node,
    bias: Operand | None = None,
    aux: tuple[fx.Node, ...] = (),
    start: int | None = None,
    factor: float = 1.0,
    example: int = 0,
    view: View | None = None,
) -> Match:
    """A parameter of which every entry is a layer's unit.

    ``factor`` multiplies it at this operation; ``view`` is what becomes of its axes there, if not that of ``weight``.
    """
    view = view or weight.view
    shape = tuple(size if pieces else 1 for size, pieces in zip(view.shape, view.axes, strict=True))
    own = [k for k, size in enumerate(shape) if size != 1]
    form = ElementForm(
        groups=math.prod(shape),
        d_out=1,
        d_in=1,
        bias=False,
        permutation=replace(view, cut=()).order(own),
        weight_shape=view.stored,
        scale=view.scale * factor,
        role=role,
        shape=shape,
        cut=bool(view.cut),
        start=start,
        example=example,
    )
    out_axes = tuple((k - len(shape), shape[k]) for k in own) if role == "scale" and start is None else None
    return Match("shift" if role == "shift" else "scale", form, x, y, weight, bias, aux, out_axes)


def repeats(view: View) -> bool:
    """Whether a parameter has been repeated along some axis."""
    return any(size != 1 and not pieces for size, pieces in zip(view.shape, view.axes, strict=True))


def repeated(node: fx.Node, operand: Operand) -> Match:
    """A parameter repeated for every example, as the layer whose output is the repeated tensor ``node``."""
    axes = zip(operand.view.shape, operand.view.axes, strict=True)
    _, place = min((-size, k) for k, (size, pieces) in enumerate(axes) if size != 1 and not pieces)
    return element_match("shift", operand, node, node, example=place)


def bias_alone(match: Match) -> Match | None:
    """The trainable bias of a product whose weight is frozen, as a shift of the product; ``None`` if it is none."""
    axes = dict(match.out_axes or ())
    if match.bias is None or not axes or list(axes) != sorted(axes):
        return None
    view = match.bias.view.reshape([axes.get(k, 1) for k in range(min(axes), 0)])
    return element_match("shift", match.bias, match.y, match.y, view=view)


def lone_bias(at: Site, argument: Any, axis: int) -> Match:
    """The bias of a product whose weight is no parameter of its own but computed: a shift on ``axis`` of the product.

    ``argument`` is an :class:`Operand` or the node of a bias argument; :class:`Refused` where no bias is trained.
    """
    why = "meets a weight that is not a parameter of its own"
    if at.module is not None:
        why = f"reaches the weight of {type(at.module).__name__} through a parametrisation"
    bias = argument if isinstance(argument, Operand) else at.operand(argument)
    if bias is None or not bias.trainable or not is_plain(bias.view):
        raise Refused(why)
    at.reasons.update({item.parameter: why for item in at.owned.values() if item is not bias})
    return element_match("shift", bias, at.node, at.node, view=bias.view.reshape([-1, *(1,) * (-axis - 1)]))
