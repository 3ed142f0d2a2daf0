"""What a method may know about a model: shapes, names and statistic keys, never a layer's spelling.

:class:`Target` is one layer in normal form, ``V = [dW db]`` of shape (groups, d_out, d_in). It writes the nodes that
bring stored gradients into that form and updates back out of it, and names the rows that the taps can deliver.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from fxcurv.ir.program import Builder
from fxcurv.ir.types import Rows, Scalar, Tensor
from fxcurv.layers.layer import Layer


@dataclass(frozen=True)
class Target:
    """One layer as a method sees it.

    name: the layer's name, owner of its nodes and states. input: name under which its input rows are measured (layers
    that read the same rows share it). groups, d_out, d_in, bias, diagonal_input, unitwise: see
    :class:`fxcurv.layers.form.Form`. permutation, weight_shape: storage of the weight. swapped: whether the layer also
    has uses with the transposed role. dtype: of the program's values for this layer.
    """

    name: str
    input: str
    weight: str | None
    bias: str | None
    groups: int
    d_out: int
    d_in: int
    homogeneous: bool
    diagonal_input: bool
    unitwise: bool
    permutation: tuple[int, ...]
    weight_shape: tuple[int, ...]
    swapped: bool = False
    dtype: torch.dtype = torch.float32

    def rows(self, b: Builder, side: str) -> fx.Node:
        """Rows of one side as a statistic input: "a", "g", or "a2", "g2" of the swapped uses."""
        wide = {"a": self.d_in, "g2": self.d_in - self.homogeneous}.get(side, self.d_out)
        owner = self.input if side == "a" else self.name
        return b.input("stat", f"{owner}.{side}", Rows((None, None, self.groups, wide), self.dtype))

    def gradient(self, b: Builder) -> fx.Node:
        """The gradient in normal form, Mat[groups; d_out, d_in]."""
        inputs = self.d_in - self.homogeneous
        shape = [self.d_out, inputs] if self.groups == 1 else [self.groups, self.d_out, inputs]
        assert self.weight is not None
        stored = b.input("grad", self.weight, Tensor(self.weight_shape, self.dtype))
        matrix = b.matricize(stored, list(self.permutation), shape)
        if not self.homogeneous:
            return matrix
        assert self.bias is not None
        column = b.input("grad", self.bias, Tensor((self.groups * self.d_out,), self.dtype))
        return b.append_column(matrix, column)

    def update(self, b: Builder, direction: fx.Node) -> None:
        """Yield a normal-form direction as updates of the stored parameters."""
        matrix = direction
        if self.homogeneous:
            assert self.bias is not None
            b.give("update", self.bias, b.last_column(direction))
            matrix = b.weight_columns(direction)
        assert self.weight is not None
        b.give("update", self.weight, b.tensorize(matrix, list(self.permutation), list(self.weight_shape)))


@dataclass(frozen=True)
class Facts:
    """All that a program is built from.

    targets: the layers to precondition. parameters: every trainable parameter's shape, by full name.
    dtype: of scalars. max_factor_dim: a wider factor is kept diagonal. sharing: "expand" or "reduce".
    """

    targets: tuple[Target, ...]
    parameters: Mapping[str, torch.Size]
    dtype: torch.dtype = torch.float32
    max_factor_dim: int = 8192
    sharing: str = "expand"

    def scalar(self) -> Scalar:
        """Type of hyper-parameters and counters."""
        return Scalar((), self.dtype)


def program_dtype(dtype: torch.dtype) -> torch.dtype:
    """Programs compute in float32 at least, and in float64 for float64 parameters."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gather(model: nn.Module, layers: Iterable[Layer], max_factor_dim: int, sharing: str) -> Facts:
    """The facts of a model whose ``layers`` are to be preconditioned."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    first: dict[object, str] = {}
    targets = []
    for layer in layers:
        form = layer.form
        plain = tuple(use for use in layer.uses if not use.swapped)
        targets.append(
            Target(
                name=layer.name,
                input=first.setdefault((layer.input_key, form.groups, form.d_in), layer.name),
                weight=layer.weight,
                bias=layer.bias,
                groups=form.groups,
                d_out=form.d_out,
                d_in=form.d_in,
                homogeneous=form.bias,
                diagonal_input=form.diagonal_input,
                unitwise=form.unitwise,
                permutation=tuple(form.permutation),
                weight_shape=tuple(form.weight_shape),
                swapped=len(plain) < len(layer.uses),
                dtype=program_dtype(parameters[layer.params[0]].dtype),
            )
        )
    dtypes = {program_dtype(p.dtype) for p in parameters.values()}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    return Facts(tuple(targets), {name: p.shape for name, p in parameters.items()}, dtype, max_factor_dim, sharing)
