"""How a weight's axes move between the stored parameter and the product that reads it.

A weight often reaches its product transposed, cast, viewed with more or fewer axes, or times a number. A
:class:`View` follows the axes through such steps without any tensor. Each current axis is a list of pieces
of stored axes, so that a split undone later (``(D, D)`` read as ``(heads, D / heads, D)``) costs nothing,
and a view that the normal form cannot express is refused instead of being guessed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

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

    stored: shape of the parameter; shape: shape of the derived tensor; scale: constant factor.
    axes: pieces of each derived axis, outermost first; empty for an axis of size 1 or one made by ``expand``.
    """

    stored: tuple[int, ...]
    shape: tuple[int, ...]
    axes: tuple[tuple[Piece, ...], ...]
    scale: float = 1.0

    @staticmethod
    def of(shape: Sequence[int]) -> View:
        """The parameter itself."""
        stored = tuple(shape)
        return View(stored, stored, tuple((Piece(k, 1, n),) if n != 1 else () for k, n in enumerate(stored)))

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
        pending = [piece for pieces in self.axes for piece in pieces][::-1]
        return replace(self, shape=shape, axes=tuple(_take(pending, size) for size in shape))

    def order(self, axes: Sequence[int]) -> tuple[int, ...]:
        """Permutation of the stored axes after which a reshape gives the derived ``axes`` in this order.

        Raises :class:`Refused` if no permutation of whole stored axes does.
        """
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
