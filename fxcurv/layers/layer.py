"""Layers found in a captured graph: parametrised products with their uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxcurv.layers.form import Form
from fxcurv.layers.region import Place, Region

SUMMANDS: dict[Callable[..., Any], tuple[int, ...]] = {}
"""Function of a graph -> operands of equal shape that it only adds up, so that they have one and the same gradient."""


@dataclass(frozen=True)
class Use:
    """One place where a layer's weight meets data.

    x: node of the data operand; y: node of the product, bias included: the tap sits on it.
    form: axis roles of this product.
    aux: nodes whose values ``form.rows_a`` needs beside x (running statistics of a BatchNorm), evaluated before y.
    swapped: the stored weight plays the transposed role of the layer's first use (a tied embedding read by
        an output projection: the vocabulary is the output of one and the input of the other).
    """

    x: fx.Node
    y: fx.Node
    form: Form
    aux: tuple[fx.Node, ...] = ()
    swapped: bool = False


@dataclass(frozen=True)
class Layer:
    """A parametrised product of the model.

    name: path of the owning module, or of the weight without its last part ("encoder.0"); unique.
    kind: "linear", "conv1d", "conv_transpose1d" (2d, 3d), "bilinear", "recurrent", "embedding", "embedding_bag",
        "layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm", "scale" and "shift" (parameters used
        entry by entry), or a name that a spelling of one's own gives.
    weight, bias: full parameter names; no bias where there is no *trainable* one. A bias beside a frozen weight is the
        weight of a "shift".
    uses: one or more; the first gives the layer's orientation (for a tied pair the output projection).
    note: why the treatment of this layer is approximate, "" when it is not.
    region, bias_region: the part of weight and bias that is this layer's, ``None`` for all of it. Layers of one weight
        have ranges of one axis that do not meet; the range is part of the name ("attn.in_proj_weight[0:256]").
    alone: whether its rows are measured for it alone: a forward in pieces may take a branch in which a layer that read
        the same rows reads others.
    """

    name: str
    kind: str
    weight: str
    bias: str | None
    uses: tuple[Use, ...] = field(repr=False)
    note: str = ""
    region: Region | None = None
    bias_region: Region | None = None
    alone: bool = False

    @property
    def form(self) -> Form:
        """Form of the first use."""
        return self.uses[0].form

    @property
    def params(self) -> tuple[str, ...]:
        """Full names of the layer's trainable parameters."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def weight_place(self) -> Place:
        """The layer's part of its weight."""
        return Place(self.weight, self.region)

    @property
    def bias_place(self) -> Place | None:
        """The layer's part of its bias."""
        return None if self.bias is None else Place(self.bias, self.bias_region)

    @property
    def weight_key(self) -> str:
        """Key of the layer's part of its weight, as programs name its gradient."""
        return self.weight_place.key

    @property
    def bias_key(self) -> str | None:
        """Key of the layer's part of its bias."""
        return None if self.bias is None else Place(self.bias, self.bias_region).key

    @property
    def places(self) -> tuple[Place, ...]:
        """The layer's parts of its trainable parameters."""
        return (self.weight_place,) if self.bias_place is None else (self.weight_place, self.bias_place)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(groups, d_out, d_in) of the normal-form weight; d_in counts the bias coordinate."""
        form = self.form
        return form.groups, form.d_out, form.d_in

    @property
    def input_key(self) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
        """Equal for layers that read the same rows: node names, form tags and scales of every use."""
        if self.alone:
            return ((self.name, "", ()),)
        return tuple(
            (use.x.name, f"{use.form.tag}*{use.form.scale!r}", tuple(node.name for node in use.aux))
            for use in self.uses
        )

    @property
    def output_key(self) -> tuple[Any, ...]:
        """Equal for layers whose output gradients are equal: products that are added up and read nowhere else."""
        use = self.uses[0]
        readers = [user for user in use.y.users if use.y in _summands(user)]
        if self.alone or len(self.uses) > 1 or len(readers) != 1:
            return (self.name,)
        return (readers[0].name, use.form.groups, *use.form.outputs)


def _summands(node: fx.Node) -> tuple[Any, ...]:
    places = SUMMANDS.get(node.target, ()) if callable(node.target) else ()
    return tuple(node.args[place] for place in places if place < len(node.args))


@dataclass(frozen=True)
class Uncovered:
    """A parameter that no layer covers, or covers only in part.

    parameter: full name, with the range that is left out if the rest is covered; reason: one sentence; chain: names of
    the nodes from the parameter to the operation that stopped detection; source: the user's line of code, "" when
    unknown.
    """

    parameter: str
    reason: str
    chain: tuple[str, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class Detection:
    """Everything found in one captured graph."""

    layers: tuple[Layer, ...]
    uncovered: tuple[Uncovered, ...]
