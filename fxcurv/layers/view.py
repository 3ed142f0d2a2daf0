"""How a weight's axes move between the stored parameter and the product that reads it.

A weight often reaches its product transposed, cast, viewed with more or fewer axes, or times a number. A
:class:`View` follows the axes through such steps without any tensor. Each current axis is a list of pieces
of stored axes, so that a split undone later (``(D, D)`` read as ``(heads, D / heads, D)``) costs nothing,
and a view that the normal form cannot express is refused instead of being guessed. A slice leaves a range of a
stored axis; where the range starts is kept beside the pieces, because starts along one axis only ever add up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fxcurv.layers.region import Region

_UNKNOWN = 1 << 40  # size of an axis repeated as often as the data says: no reshape can be followed after it


class Refused(Exception):
    """Internal: this use of a parameter cannot become a layer; the text completes "the parameter ..."."""


@dataclass(frozen=True)
class Piece:
    """``size`` indices of one stored axis, ``stride`` apart."""

    axis: int
    stride: int
    size: int


@dataclass(frozen=True)
class View:
    """Axes of a derived weight in terms of the stored one.

    stored: shape of the part of the parameter that is left; shape: shape of the derived tensor; scale: constant factor.
    axes: pieces of each derived axis, outermost first; empty for an axis of size 1 or one made by ``expand``.
    whole: shape of the parameter; starts: first index of the part along each stored axis (empty: nothing was cut).
    cut: stored axes of which only the first indices are read, as many as the data says; ``shape`` has their full sizes.
    """

    stored: tuple[int, ...]
    shape: tuple[int, ...]
    axes: tuple[tuple[Piece, ...], ...]
    scale: float = 1.0
    whole: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    cut: tuple[int, ...] = ()

    @staticmethod
    def of(shape: Sequence[int]) -> View:
        """The parameter itself."""
        stored = tuple(shape)
        axes = tuple((Piece(k, 1, n),) if n != 1 else () for k, n in enumerate(stored))
        return View(stored, stored, axes, whole=stored)

    @property
    def ndim(self) -> int:
        """Number of derived axes."""
        return len(self.shape)

    def times(self, factor: float) -> View:
        """The view of ``factor`` times the tensor."""
        return replace(self, scale=self.scale * factor)

    def permute(self, order: Sequence[int]) -> View:
        """Axes in a new order."""
        return replace(self, shape=tuple(self.shape[k] for k in order), axes=tuple(self.axes[k] for k in order))

    def transpose(self, first: int, second: int) -> View:
        """Two axes exchanged."""
        order = list(range(self.ndim))
        order[first], order[second] = order[second], order[first]
        return self.permute(order)

    def expand(self, sizes: Sequence[int | None]) -> View:
        """Axes of size 1 repeated, new axes in front; -1 keeps a size, ``None`` is known when the graph runs."""
        extra = len(sizes) - self.ndim
        if extra < 0:
            raise Refused("is expanded to fewer axes than it has")
        shape = [1] * extra + list(self.shape)
        for k, size in enumerate(sizes):
            if shape[k] == 1 and size != -1:
                shape[k] = _UNKNOWN if size is None else size
            elif size not in (-1, None, shape[k]):
                raise Refused("is expanded along an axis that is not 1")
        return replace(self, shape=tuple(shape), axes=((),) * extra + self.axes)

    def reshape(self, sizes: Sequence[int]) -> View:
        """A row-major reshape; one size may be -1. Raises :class:`Refused` where axes would be cut unevenly."""
        if any(size != 1 and not pieces for size, pieces in zip(self.shape, self.axes, strict=True)):
            raise Refused("is expanded and then reshaped")
        total, known = math.prod(self.shape), math.prod(size for size in sizes if size != -1)
        shape = tuple(total // known if size == -1 and known else size for size in sizes)
        if math.prod(shape) != total:
            raise Refused(f"is reshaped to {list(sizes)}, which does not hold its {total} numbers")
        if self.cut and [size for size in shape if size != 1] != [size for size in self.shape if size != 1]:
            raise Refused("is sliced to a size that the graph computes and then reshaped")
        pending = [piece for pieces in self.axes for piece in pieces][::-1]
        return replace(self, shape=shape, axes=tuple(_take(pending, size) for size in shape))

    def narrow(self, axis: int, start: int, size: int) -> View:
        """``size`` indices of a derived axis from ``start`` on; an axis made by ``expand`` only gets shorter."""
        if size < 1 or not 0 <= start <= self.shape[axis] - size:
            raise Refused("is sliced to nothing, or beyond its end")
        if size == self.shape[axis]:
            return self
        if any(piece.axis in self.cut for piece in self.axes[axis]):
            raise Refused("is sliced to a size that the graph computes and then once more")
        pieces, moves = _cut(self.axes[axis], start, size)
        starts = list(self.starts or (0,) * len(self.stored))
        for stored_axis, offset in moves:
            starts[stored_axis] += offset
        shape, axes = list(self.shape), list(self.axes)
        shape[axis], axes[axis] = size, pieces
        stored = [1] * len(self.stored)
        for piece in (piece for pieces in axes for piece in pieces):
            stored[piece.axis] *= piece.size
        return replace(self, stored=tuple(stored), shape=tuple(shape), axes=tuple(axes), starts=tuple(starts))

    def first(self, axis: int) -> View:
        """The first indices of a derived axis, as many as the data says when the graph runs."""
        pieces = self.axes[axis]
        if len(pieces) != 1 or pieces[0].size != self.stored[pieces[0].axis]:
            raise Refused("is sliced to a size that the graph computes")
        return replace(self, cut=(*self.cut, pieces[0].axis))

    def select(self, axis: int, index: int) -> View:
        """One index of a derived axis, which is gone afterwards."""
        axis %= self.ndim
        view = self.narrow(axis, index + self.shape[axis] if index < 0 else index, 1)
        return view._without([axis])

    def _without(self, axes: Sequence[int]) -> View:
        kept = [k for k in range(self.ndim) if k not in axes]
        return replace(self, shape=tuple(self.shape[k] for k in kept), axes=tuple(self.axes[k] for k in kept))

    @property
    def region(self) -> Region | None:
        """The part of the parameter that is left, ``None`` for all of it; refused where two axes were cut."""
        if not self.starts:
            return None
        cut = [k for k, (left, size) in enumerate(zip(self.stored, self.whole, strict=True)) if left != size]
        if not cut:
            return None
        if len(cut) > 1:
            raise Refused("is used in part along two of its axes")
        return Region(cut[0], self.starts[cut[0]], self.starts[cut[0]] + self.stored[cut[0]])

    def order(self, axes: Sequence[int]) -> tuple[int, ...]:
        """Permutation of the stored axes after which a reshape gives the derived ``axes`` in this order.

        Raises :class:`Refused` if no permutation of whole stored axes (or of the contiguous part that is left) does.
        """
        if self.cut:
            raise Refused("is sliced to a size that the graph computes")
        if self.starts and any(self._gaps(axis) for axis in range(len(self.stored))):
            raise Refused("reaches its product in parts that lie apart along one axis")
        result: list[int] = []
        rest = 1  # indices of the stored axis under way that pieces still to come must cover
        for piece in (piece for axis in axes for piece in self.axes[axis]):
            if rest == 1:
                result.append(piece.axis)
                rest = self.stored[piece.axis]
            if piece.axis != result[-1] or piece.stride * piece.size != rest:
                raise Refused("reaches its product with parts of one axis in different roles")
            rest = piece.stride
        if rest != 1 or sorted(result) != [k for k, n in enumerate(self.stored) if n != 1]:
            raise Refused("reaches its product only in part")
        if result == sorted(result):
            return tuple(range(len(self.stored)))
        return (*result, *(k for k, n in enumerate(self.stored) if n == 1))

    def _gaps(self, axis: int) -> bool:
        """Whether the indices left of a stored axis are not a contiguous range."""
        pieces = [piece for pieces in self.axes for piece in pieces if piece.axis == axis]
        return sum(piece.stride * (piece.size - 1) for piece in pieces) + 1 != self.stored[axis]


def _cut(pieces: tuple[Piece, ...], start: int, size: int) -> tuple[tuple[Piece, ...], list[tuple[int, int]]]:
    """``size`` indices of an axis made of ``pieces``, from ``start`` on, and how far that moves along stored axes."""
    if not pieces:
        return (), []
    head, inner = pieces[0], math.prod(piece.size for piece in pieces[1:])
    move = (head.axis, head.stride * (start // inner))
    if start % inner == 0 and size % inner == 0:
        count = size // inner
        return ((Piece(head.axis, head.stride, count),) if count > 1 else ()) + pieces[1:], [move]
    if start // inner == (start + size - 1) // inner:
        left, moves = _cut(pieces[1:], start % inner, size)
        return left, [move, *moves]
    raise Refused("is sliced across axes that were joined before")


def _take(pending: list[Piece], size: int) -> tuple[Piece, ...]:
    taken: list[Piece] = []
    while size > 1:
        piece = pending.pop()
        part = math.gcd(piece.size, size)
        if part == 1 or (part != piece.size and part != size):
            raise Refused("is reshaped in a way that mixes its axes")
        inner = piece.size // part
        taken.append(Piece(piece.axis, piece.stride * inner, part))
        if inner > 1:
            pending.append(Piece(piece.axis, piece.stride, inner))
        size //= part
    return tuple(taken)
