"""Regions: a layer may own a contiguous range of one axis of a parameter (a fused weight that is sliced before use).

A region has a text form, its *key*: ``attn.in_proj_weight[0:256]`` or ``w[:, 0:256]``. Programs name gradients and
updates by such keys, so the run time reads and writes a narrow view of ``p.grad`` and nothing has to be assembled.
The key of a whole parameter is its name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from fxcurv.errors import FxcurvError

_KEY = re.compile(r"(?P<name>.+)\[(?P<axes>(?::, )*)(?P<start>\d+):(?P<stop>\d+)\]")


@dataclass(frozen=True)
class Region:
    """Indices ``start`` to ``stop`` (excluded) of stored axis ``axis``."""

    axis: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of indices."""
        return self.stop - self.start

    def __str__(self) -> str:
        return f"[{':, ' * self.axis}{self.start}:{self.stop}]"

    def of(self, tensor: Tensor) -> Tensor:
        """The region of a tensor shaped like the parameter, as a view."""
        return tensor.narrow(self.axis, self.start, self.size)


@dataclass(frozen=True)
class Place:
    """A parameter by full name, or a region of it."""

    name: str
    region: Region | None = None

    @property
    def key(self) -> str:
        """Text form."""
        return f"{self.name}{self.region or ''}"

    def overlaps(self, other: Place) -> bool:
        """Whether some element belongs to both; ranges of two different axes always meet."""
        mine, theirs = self.region, other.region
        if self.name != other.name:
            return False
        if mine is None or theirs is None or mine.axis != theirs.axis:
            return True
        return mine.start < theirs.stop and theirs.start < mine.stop

    def of(self, tensor: Tensor) -> Tensor:
        """What belongs to this place in a tensor shaped like the parameter, as a view."""
        return tensor if self.region is None else self.region.of(tensor)

    def shape(self, whole: Iterable[int]) -> tuple[int, ...]:
        """Shape of the place in a parameter of shape ``whole``."""
        sizes = list(whole)
        if self.region is not None:
            sizes[self.region.axis] = self.region.size
        return tuple(sizes)


def place_of(key: str, known: Collection[str]) -> Place:
    """The place with this key among parameters of ``known`` names; raises :class:`FxcurvError` if there is none."""
    if key in known:
        return Place(key)
    match = _KEY.fullmatch(key)
    if match is None or match["name"] not in known:
        raise FxcurvError(f"there is no parameter '{key}' in this model.")
    return Place(match["name"], Region(match["axes"].count(":"), int(match["start"]), int(match["stop"])))


def fits(place: Place, shapes: Mapping[str, Iterable[int]]) -> bool:
    """Whether a place lies within its parameter's shape."""
    if place.region is None:
        return True
    shape = tuple(shapes[place.name])
    return place.region.axis < len(shape) and place.region.stop <= shape[place.region.axis]


def by_name(places: Iterable[Place]) -> dict[str, list[Place]]:
    """Places grouped by parameter."""
    groups: dict[str, list[Place]] = {}
    for place in places:
        groups.setdefault(place.name, []).append(place)
    return groups


def rest(name: str, shape: Iterable[int], covered: Iterable[Place]) -> tuple[Place, ...]:
    """What places of a parameter leave of it: itself when there are none, else ranges of the axis that they cut."""
    regions = [place.region for place in covered]
    if not regions or None in regions:
        return () if regions else (Place(name),)
    cut = sorted((region for region in regions if region is not None), key=lambda region: region.start)
    axis, end, left = cut[0].axis, 0, []
    for region in cut:
        if region.start > end:
            left.append(Place(name, Region(axis, end, region.start)))
        end = max(end, region.stop)
    size = tuple(shape)[axis]
    return (*left, Place(name, Region(axis, end, size))) if end < size else tuple(left)


def parts_of(name: str, shape: Iterable[int], covered: Iterable[Place]) -> tuple[Place, ...]:
    """Places of a parameter that are covered, and what they leave of it, in the order in which they are stored."""
    mine = tuple(covered)
    parts = {*mine, *rest(name, shape, mine)}
    return tuple(sorted(parts, key=lambda place: 0 if place.region is None else place.region.start))
