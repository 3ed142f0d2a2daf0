"""What a method may know about a model: shapes, names and statistic keys, never a layer's spelling.

:class:`Target` is one layer in normal form, ``V = [dW db]`` of shape (groups, d_out, d_in). It writes the nodes that
bring stored gradients into that form and updates back out of it, and names the rows that the taps can deliver.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from fxcurv.ir.program import Builder
from fxcurv.ir.types import Rows, Scalar, Tensor
from fxcurv.layers.layer import Layer
from fxcurv.layers.reach import Outputs, outputs_of, together
from fxcurv.layers.region import Place
from fxcurv.layers.sequence import followers

SEQUENCES = ("linear", "recurrent")  # kinds of layers whose positions may be the steps of a sequence


@dataclass(frozen=True)
class Target:
    """One layer as a method sees it.

    name: the layer's name, owner of its nodes and states. weight, bias: keys of the layer's parts of its parameters
    (see :mod:`fxcurv.layers.region`), the names where these are whole. input: name under which its input rows are
    measured (layers that read the same rows share it); output: the same of its output-gradient rows where they are
    measured without the input's, "" for its own name. groups, d_out, d_in, bias, diagonal_input, unitwise: see
    :class:`fxcurv.layers.form.Form`. permutation, weight_shape: storage of this part. swapped: whether the layer also
    has uses with the transposed role. sequential: whether positions may be the steps of a sequence: not pixels, and not
    where a loop applies the weight anew at each step. dtype: of the program's values for this layer. stored_weight,
    stored_bias: shapes of these parts of the parameters where they are not weight_shape and (groups * d_out,).
    activation: name of the one elementwise function that the layer's only output goes through ("identity" for none),
    "" where it is something else (see :mod:`fxcurv.layers.sequence`); where the output is the model's, the loss's own
    function, "softmax" say. feeds: the one layer whose input is the output of that function, "" for none. last: whether
    its output is the model's. aligned: whether the output rows, behind that function, are the input rows of what it
    feeds, in the same order of rows and features. convolution: whether it is one, transposed ones included: its
    positions are pixels. taps: K where the features of a row are those of C channels at K places, channel-major.
    """

    name: str
    input: str
    weight: str
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
    sequential: bool = False
    dtype: torch.dtype = torch.float32
    stored_weight: tuple[int, ...] | None = None
    stored_bias: tuple[int, ...] | None = None
    output: str = ""
    activation: str = ""
    feeds: str = ""
    last: bool = False
    aligned: bool = False
    convolution: bool = False
    taps: int = 1

    def rows(self, b: Builder, side: str, alone: bool = False) -> fx.Node:
        """Rows of one side as a statistic input: "a", "g", or "a2", "g2" of the swapped uses.

        alone: no statistic pairs them with rows of the other side, so that another layer may measure them.
        """
        wide = {"a": self.d_in, "g2": self.d_in - self.homogeneous}.get(side, self.d_out)
        owner = self.input if side == "a" else self.output if side == "g" and alone and self.output else self.name
        return b.input("stat", f"{owner}.{side}", Rows((None, None, self.groups, wide), self.dtype))

    def gradient(self, b: Builder) -> fx.Node:
        """The gradient in normal form, Mat[groups; d_out, d_in]."""
        return self._matrix(b, "grad")

    def weights(self, b: Builder) -> fx.Node:
        """The layer's own [W b] in normal form, Mat[groups; d_out, d_in], as it is before the step."""
        return self._matrix(b, "param")

    def _matrix(self, b: Builder, kind: str) -> fx.Node:
        inputs = self.d_in - self.homogeneous
        shape = [self.d_out, inputs] if self.groups == 1 else [self.groups, self.d_out, inputs]
        shapes = self.stored_weight, self.stored_bias
        own = self.weight_shape if shapes[0] is None else shapes[0]
        stored = b.input(kind, self.weight, Tensor(own, self.dtype))
        matrix = b.matricize(_reshaped(b, stored, self.weight_shape), list(self.permutation), shape)
        if not self.homogeneous:
            return matrix
        assert self.bias is not None
        own = (self.groups * self.d_out,) if shapes[1] is None else shapes[1]
        return b.append_column(matrix, b.input(kind, self.bias, Tensor(own, self.dtype)))

    def update(self, b: Builder, direction: fx.Node) -> None:
        """Yield a normal-form direction as updates of the stored parameters."""
        matrix = direction
        if self.homogeneous:
            assert self.bias is not None
            b.give("update", self.bias, _reshaped(b, b.last_column(direction), self.stored_bias))
            matrix = b.weight_columns(direction)
        stored = b.tensorize(matrix, list(self.permutation), list(self.weight_shape))
        b.give("update", self.weight, _reshaped(b, stored, self.stored_weight))


def _reshaped(b: Builder, node: fx.Node, shape: tuple[int, ...] | None) -> fx.Node:
    """A tensor in another shape, if one is given that it has not got already."""
    old = node.meta["type"].shape
    if shape is None or old == shape:
        return node
    flat = b.matricize(node, list(range(len(old))), [1, math.prod(old)])
    return b.tensorize(flat, list(range(len(shape))), list(shape))


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


def _stored(
    place: Place | None, parameters: Mapping[str, nn.Parameter], usual: tuple[int, ...]
) -> tuple[int, ...] | None:
    shape = usual if place is None else place.shape(parameters[place.name].shape)
    return None if shape == usual else shape


class Owners:
    """The first of the layers that measure the same rows, for each of them; see :mod:`fxcurv.layers.reach`.

    reach: the outputs that depend on a layer; layers without an entry are always reached together.
    """

    def __init__(self, reach: Mapping[str, Outputs]) -> None:
        self.reach = reach
        self.found: dict[object, list[str]] = {}

    def of(self, name: str, rows: object) -> str:
        """The layer that measures ``rows`` for the layer ``name``."""
        owners, mine = self.found.setdefault(rows, []), self.reach.get(name, frozenset())
        for owner in owners:
            if together(mine, self.reach.get(owner, frozenset())):
                return owner
        owners.append(name)
        return name


def gather(model: nn.Module, layers: Iterable[Layer], max_factor_dim: int, sharing: str, link: str = "") -> Facts:
    """The facts of a model whose ``layers`` are to be preconditioned; ``link``: the loss's own function, if known."""
    layers = tuple(layers)
    following = followers(layers, model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inputs, outputs = Owners(outputs_of(layers)), Owners({})
    targets = []
    for layer in layers:
        form = layer.form
        plain = tuple(use for use in layer.uses if not use.swapped)
        after = following[layer.name]
        targets.append(
            Target(
                name=layer.name,
                input=inputs.of(layer.name, (layer.input_key, form.groups, form.d_in)),
                output=outputs.of(layer.name, layer.output_key),
                weight=layer.weight_key,
                bias=layer.bias_key,
                groups=form.groups,
                d_out=form.d_out,
                d_in=form.d_in,
                homogeneous=form.bias,
                diagonal_input=form.diagonal_input,
                unitwise=form.unitwise,
                permutation=tuple(form.permutation),
                weight_shape=tuple(form.weight_shape),
                stored_weight=_stored(layer.weight_place, parameters, tuple(form.weight_shape)),
                stored_bias=_stored(layer.bias_place, parameters, (form.groups * form.d_out,)),
                swapped=len(plain) < len(layer.uses),
                sequential=len(layer.uses) == 1 and layer.kind in SEQUENCES,
                dtype=program_dtype(parameters[layer.params[0]].dtype),
                activation=link if link and after.last and form.groups == 1 else after.activation,
                feeds=after.feeds,
                last=after.last,
                aligned=after.aligned,
                convolution=layer.kind.startswith("conv"),
                taps=form.taps,
            )
        )
    dtypes = {program_dtype(p.dtype) for p in parameters.values()}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    return Facts(tuple(targets), {name: p.shape for name, p in parameters.items()}, dtype, max_factor_dim, sharing)
