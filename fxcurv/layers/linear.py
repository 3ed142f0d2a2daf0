"""Forms of linear products: a matrix on one axis of the data, and any contraction with labelled axes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxcurv.layers.form import Form
from fxcurv.layers.view import Refused, View

Label = str | tuple[str, int]


@dataclass(frozen=True)
class LinearForm(Form):
    """``x @ W.T`` with any number of leading axes: the first is b, the others s; a vector has b = s = 1.

    axis: the axis of x that is contracted: -1, or -2 for ``W @ x`` (a vector is contracted whole).
    """

    axis: int = -1

    def _rows(self, tensor: Tensor, size: int) -> Tensor:
        if not torch.compiler.is_compiling() and tensor.layout is not torch.strided:
            tensor = tensor.to_dense()
        if self.axis == -2 and tensor.dim() > 1:
            tensor = tensor.transpose(-1, -2)
        lead = tensor.shape[:-1]
        return tensor.reshape(*(lead[:1] or (1,)), math.prod(lead[1:]), 1, size)

    def rows_a(self, x: Tensor, *aux: Tensor) -> Tensor:
        """See :meth:`Form.rows_a`; x (b, ..., inputs), or (b, ..., inputs, s) for ``axis`` -2."""
        return self._augment(self._rows(x, self.inputs))

    def rows_g(self, g: Tensor) -> Tensor:
        """See :meth:`Form.rows_g`; g like x with d_out instead of inputs."""
        return self._rows(g, self.d_out)

    def loose_rows_a(self, x: Tensor, *aux: Tensor) -> Tensor | None:
        """See :meth:`Form.loose_rows_a`."""
        return self._rows(x, self.inputs) if self.scale == 1.0 else None

    @property
    def tag(self) -> str:
        """See :attr:`Form.tag`."""
        return ("T" if self.axis == -2 else "") + self._constant


@dataclass(frozen=True)
class EinsumForm(Form):
    """``einsum("x,w->y")``; "..." may stand for leading axes of x and y.

    A letter in x, w and y is a group, in x and w an input, in w and y an output, in x and y an example (the
    first in x) or a position (the others); a letter of x alone is summed over first. Groups, outputs
    and inputs follow the order of w.
    sizes: size of each letter of w.
    """

    x: str = ""
    w: str = ""
    y: str = ""
    sizes: tuple[int, ...] = ()

    def rows_a(self, x: Tensor, *aux: Tensor) -> Tensor:
        """See :meth:`Form.rows_a`; x with the axes that its labels say."""
        labels = _labels(self.x, x.dim())
        extent = dict(zip(self.w, self.sizes, strict=True))
        x = x.expand([extent.get(_letter(label), size) for label, size in zip(labels, x.shape, strict=True)])
        alone = [k for k, label in enumerate(labels) if _letter(label) not in self.w and _letter(label) not in self.y]
        if alone:
            x = x.sum(alone)
        labels = [label for k, label in enumerate(labels) if k not in alone]
        return self._augment(self._arrange(x, labels, labels, [c for c in self.w if c in self.x and c not in self.y]))

    def rows_g(self, g: Tensor) -> Tensor:
        """See :meth:`Form.rows_g`; g with the axes of y."""
        ellipsis = g.dim() - len(self.y.replace("...", "")) if "..." in self.y else 0
        order = _labels(self.x, len(self.x.replace("...", "")) + ellipsis)
        return self._arrange(g, _labels(self.y, g.dim()), order, [c for c in self.w if c not in self.x])

    def _arrange(self, tensor: Tensor, labels: list[Label], order: list[Label], features: list[str]) -> Tensor:
        """Axes brought to (b, s, groups, features); examples and positions in the order in which x has them."""
        data = [label for label in order if label in labels and _letter(label) not in self.w]
        groups = [c for c in self.w if c in self.x and c in self.y]
        tensor = tensor.permute([labels.index(label) for label in (*data, *groups, *features)])
        shape = tensor.shape
        first, last = len(data), len(data) + len(groups)
        return tensor.reshape(
            shape[0] if data else 1, math.prod(shape[1:first]), math.prod(shape[first:last]), math.prod(shape[last:])
        )

    @property
    def tag(self) -> str:
        """See :attr:`Form.tag`; roles of x's axes, so that equal rows have equal tags whatever the letters."""
        roles = {c: f"{'g' if c in self.y else 'i'}{k}" for k, c in enumerate(c for c in self.w if c in self.x)}
        rows = [roles.get(c, "s" if c in self.y else "-") for c in self.x.replace("...", ".")]
        if rows[-1:] == ["i0"] and set(rows[:-1]) <= {"s"}:
            return self._constant  # the rows of a plain linear layer
        return f"[{' '.join(rows)}]" + self._constant


def _letter(label: Label) -> str:
    return label if isinstance(label, str) else "..."


def _labels(spec: str, rank: int) -> list[Label]:
    head, dots, tail = spec.partition("...")
    middle = [("...", k) for k in range(rank - len(head) - len(tail))] if dots else []
    return [*head, *middle, *tail]


def linear_form(view: View, out: int, inner: int, axis: int = -1) -> LinearForm:
    """The form of a matrix whose derived axes ``out`` and ``inner`` are outputs and inputs."""
    return LinearForm(**_common(view, (), (out,), (inner,)), axis=axis)


def einsum_form(view: View, x: str, w: str, y: str) -> EinsumForm:
    """The form of ``einsum("x,w->y")`` with the parameter as w.

    An axis made by ``expand`` or of size 1 is dropped from w where the data has it too: it is then an axis of
    the data alone. Raises :class:`Refused` for what is no contraction of the normal form.
    """
    for spec in (x, w, y):
        letters = spec.replace("...", "")
        if len(set(letters)) != len(letters):
            raise Refused("is read along a diagonal of an einsum")
    kept = [k for k, c in enumerate(w) if view.axes[k] or c not in x]
    if any(w[k] not in x and (w[k] not in y or (not view.axes[k] and view.shape[k] != 1)) for k in kept):
        raise Refused("is summed over an axis, or expanded along one, that no data has")
    w = "".join(w[k] for k in kept)
    roles: dict[str, list[int]] = {"group": [], "out": [], "in": []}
    for k, c in zip(kept, w, strict=True):
        roles["out" if c not in x else "group" if c in y else "in"].append(k)
    common = _common(view, tuple(roles["group"]), tuple(roles["out"]), tuple(roles["in"]))
    return EinsumForm(**common, x=x, w=w, y=y, sizes=tuple(view.shape[k] for k in kept))


def _common(view: View, groups: tuple[int, ...], outputs: tuple[int, ...], inputs: tuple[int, ...]) -> dict[str, Any]:
    def size(axes: tuple[int, ...]) -> int:
        return math.prod(view.shape[k] for k in axes)

    return {
        "groups": size(groups),
        "d_out": size(outputs),
        "d_in": size(inputs),
        "bias": False,
        "permutation": view.order((*groups, *outputs, *inputs)),
        "weight_shape": view.stored,
        "scale": view.scale,
    }
