"""The normal form of a parametrised product, and what every layer kind must say about itself.

Every product that fxcurv knows is the contraction

    out[b, s, g, o] = sum_i W[g, o, i] x[b, s, g, i] + bias[g, o]

over examples b, positions s (tokens, pixels, time steps: where one weight is used again), groups g,
outputs o and inputs i. The bias is a homogeneous coordinate: with a bias, the last of the ``d_in`` input
features is the constant 1 and the normal-form weight is ``[W b]``. A :class:`Form` is how one spelling (a
linear layer, a convolution of a given geometry, ...) maps its tensors to these axes; after that every
formula of every method is the same. Positions are summed over by ``einsum`` order, so a form needs no
shapes in advance: the sizes of b and s are read from the tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcurv.errors import FxcurvError


@dataclass(frozen=True)
class Form(ABC):
    """Abstract: axis roles of one product. Equal forms read their input in the same way.

    groups, d_out, d_in: sizes of the normal-form weight (groups, d_out, d_in); ``d_in`` counts the constant
        coordinate of a bias.
    bias: whether the last input feature is the constant 1.
    permutation: order of the stored weight's axes that brings it to (groups, d_out, inputs) after a reshape.
    weight_shape: shape of the stored weight, or one in which some of its axes are split.
    scale: the product is with ``scale * W``; a constant factor, one for nearly all layers.
    """

    groups: int
    d_out: int
    d_in: int
    bias: bool
    permutation: tuple[int, ...]
    weight_shape: tuple[int, ...]
    scale: float = 1.0

    @abstractmethod
    def rows_a(self, x: Tensor, *aux: Tensor) -> Tensor:
        """Input rows, shape (b, s, groups, d_in), the constant last; all but the constant multiplied by ``scale``."""

    @abstractmethod
    def rows_g(self, g: Tensor) -> Tensor:
        """Output-gradient rows, shape (b, s, groups, d_out), from a gradient shaped like the product."""

    @property
    def taps(self) -> int:
        """K where the inputs of a row are those of C channels at K places, channel-major; 1 elsewhere."""
        return 1

    def loose_rows_a(self, x: Tensor, *aux: Tensor) -> Tensor | None:
        """Input rows without the constant coordinate, (n, m, 1, inputs) in any order, for a sum over them.

        ``None`` where it takes more than a view, or where not all rows have the same constant.
        """
        return None

    def loose_rows_g(self, g: Tensor) -> Tensor | None:
        """Output-gradient rows in any order, (n, m, 1, d_out), for a sum over them; ``None`` for ``rows_g``."""
        return None

    def used_rows_g(self, x: Tensor, g: Tensor) -> Tensor:
        """``rows_g`` with zeros where the weight is not used (padding of an embedding)."""
        return self.rows_g(g)

    def kept(self, x: Tensor, *aux: Tensor) -> tuple[Tensor, ...]:
        """What the backward pass has to keep of the operands: themselves, or less with the same shapes and dtypes."""
        return (x, *aux)

    @property
    @abstractmethod
    def tag(self) -> str:
        """Short text that, with the input's node, identifies ``rows_a``: "" for a plain linear layer without bias."""

    @property
    def diagonal_input(self) -> bool:
        """Whether the input second moment is diagonal by construction (one-hot inputs of an embedding)."""
        return False

    @property
    def unitwise(self) -> bool:
        """Whether the exact curvature block of each group is small enough to keep whole (norm layers)."""
        return False

    @property
    def outputs(self) -> tuple[int, int]:
        """The first of the product's outputs that are this form's, and how many."""
        return 0, self.d_out

    @property
    def inputs(self) -> int:
        """Input features without the constant coordinate."""
        return self.d_in - int(self.bias)

    def matrix(self, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The normal-form weight (or its gradient), shape (groups, d_out, d_in), from stored tensors (``None``: 0)."""
        if weight is None:
            if bias is None:
                raise FxcurvError("Form.matrix needs a weight or a bias, got neither; pass one of them.")
            matrix = bias.new_zeros(self.groups, self.d_out, self.inputs)
        else:
            stored = weight.reshape(self.weight_shape)
            matrix = stored.permute(self.permutation).reshape(self.groups, self.d_out, self.inputs)
        if not self.bias:
            return matrix
        shape = (self.groups, self.d_out, 1)
        column = matrix.new_zeros(shape) if bias is None else bias.reshape(shape)
        return torch.cat([matrix, column], dim=-1)

    def stored(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Inverse of :meth:`matrix`: the weight in its stored shape and the bias as a (groups * d_out) vector."""
        weight = matrix[..., : self.inputs].reshape([self.weight_shape[axis] for axis in self.permutation])
        inverse = sorted(range(len(self.permutation)), key=self.permutation.__getitem__)
        return weight.permute(inverse), matrix[..., -1].reshape(-1) if self.bias else None

    def product(self, x: Tensor, g: Tensor, *aux: Tensor) -> Tensor:
        """Gradient of the normal-form weight, sum over b and s of g a^T, shape (groups, d_out, d_in)."""
        return torch.einsum("bsgo,bsgi->goi", self.rows_g(g), self.rows_a(x, *aux))

    def _augment(self, rows: Tensor) -> Tensor:
        """Rows (..., inputs) scaled and, with a bias, followed by the constant coordinate."""
        if self.scale != 1.0:
            rows = rows * self.scale
        return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1) if self.bias else rows

    @property
    def _constant(self) -> str:
        """Part of ``tag`` that tells rows with the constant coordinate from rows without."""
        return "+1" if self.bias else ""
