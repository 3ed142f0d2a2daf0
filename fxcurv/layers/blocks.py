"""Blocks of outputs: one product whose outputs belong to several layers.

A weight that is read whole in one place and in parts in another, or a fused projection that is to be three layers, is
divided along its outputs. Every block is a layer with its own output statistics; the input rows are those of the whole
product, so the blocks share one input factor. What is divided is the list of finds, before layers are assembled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch

from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.layers.form import Form
from fxcurv.layers.region import Place, Region
from fxcurv.layers.spelling import Match
from fxcurv.layers.view import Refused


@dataclass(frozen=True)
class BlockForm(Form):
    """Outputs ``start`` to ``start + d_out`` of another form without groups.

    inner: the form of the whole product, with the same bias coordinate.
    """

    inner: Form = field(kw_only=True)
    start: int = 0

    def rows_a(self, x: Tensor, *aux: Tensor) -> Tensor:
        """See :meth:`Form.rows_a`."""
        return self.inner.rows_a(x, *aux)

    def rows_g(self, g: Tensor) -> Tensor:
        """See :meth:`Form.rows_g`; g has the shape of the whole product."""
        return self.inner.rows_g(g).narrow(-1, self.start, self.d_out)

    def used_rows_g(self, x: Tensor, g: Tensor) -> Tensor:
        """See :meth:`Form.used_rows_g`."""
        return self.inner.used_rows_g(x, g).narrow(-1, self.start, self.d_out)

    def kept(self, x: Tensor, *aux: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`Form.kept`."""
        return self.inner.kept(x, *aux)

    def loose_rows_a(self, x: Tensor, *aux: Tensor) -> Tensor | None:
        """See :meth:`Form.loose_rows_a`."""
        return self.inner.loose_rows_a(x, *aux)

    @property
    def outputs(self) -> tuple[int, int]:
        """See :attr:`Form.outputs`."""
        return self.start, self.d_out

    def product(self, x: Tensor, g: Tensor, *aux: Tensor) -> Tensor:
        """See :meth:`Form.product`."""
        return self.inner.product(x, g, *aux).narrow(1, self.start, self.d_out)

    @property
    def diagonal_input(self) -> bool:
        """See :attr:`Form.diagonal_input`."""
        return self.inner.diagonal_input

    @property
    def tag(self) -> str:
        """See :attr:`Form.tag`: the rows are those of the whole product."""
        return self.inner.tag


@dataclass(frozen=True)
class Find:
    """A product on its way to a layer.

    key: place of the weight. bias: place of its trainable bias. form: of the match, or a block of it.
    """

    match: Match
    key: Place
    bias: Place | None
    form: Form


def divide(
    finds: list[Find],
    fused: Mapping[str, int] | None,
    name_of: Callable[[Find], str],
    stop: Callable[[Place, Match, str], None],
) -> list[Find]:
    """The finds with products divided where parts of their weight are layers of their own.

    Parts of one parameter must be nested or apart. fused: patterns of layer names to numbers of equal blocks; the first
    that fits counts. stop: records why a place is no layer's. Raises :class:`FxcurvError` for a layer whose
    outputs ``fused`` does not divide.
    """
    groups: dict[str, list[Find]] = {}
    for find in finds:
        groups.setdefault(find.key.name, []).append(find)
    counts = {find.key: _count(name_of(find), fused or {}) for find in finds}
    return [part for group in groups.values() for part in _divide(group, counts, name_of, stop)]


def _count(name: str, fused: Mapping[str, int]) -> int:
    return next((count for pattern, count in fused.items() if name == pattern or fnmatch(name, pattern)), 1)


def _divide(
    finds: list[Find],
    counts: Mapping[Place, int],
    name_of: Callable[[Find], str],
    stop: Callable[[Place, Match, str], None],
) -> Iterator[Find]:
    """Finds of one parameter."""
    if all(find.key.region is None and counts[find.key] == 1 for find in finds):
        yield from finds
        return
    regions = {find.key: _region(find) for find in finds}
    axes = {region.axis for place, region in regions.items() if place.region is not None or counts[place] > 1}
    if len(axes) > 1 or _crossing([region for region in regions.values() if region.axis in axes]):
        for find in finds:
            stop(find.key, find.match, "is used in parts that overlap")
        yield from finds
        return
    (axis,) = axes
    whole = _extent(finds[0], axis)
    ends = {end for place in regions if (r := place.region) is not None for end in (r.start, r.stop)}
    for find in finds:
        count, region = counts[find.key], regions[find.key]
        if count > 1:
            if region.size % count:
                raise FxcurvError(
                    f"layer '{name_of(find)}' has {region.size} outputs, which {count} equal blocks do not divide."
                )
            ends |= set(range(region.start, region.stop, region.size // count))
    for find in finds:
        region = find.key.region or Region(axis, 0, whole)
        cuts = sorted(end for end in ends if region.start < end < region.stop)
        if not cuts:
            yield find
            continue
        try:
            yield from _parts(find, region, cuts, stop)
        except Refused as refused:
            if counts[find.key] > 1:
                raise FxcurvError(f"fused: layer '{name_of(find)}' {refused}; leave it out.") from None
            stop(find.key, find.match, str(refused))
            yield find


def _extent(find: Find, axis: int) -> int:
    """Size of a stored axis of the whole weight."""
    assert find.match.weight is not None
    return find.match.weight.view.whole[axis]


def _region(find: Find) -> Region:
    """The range of the outputs' axis that a find reads, all of it where its place is whole."""
    if find.key.region is not None:
        return find.key.region
    axis = _outer(find.form)
    return Region(axis, 0, _extent(find, axis) if find.form.weight_shape else 1)


def _outer(form: Form) -> int:
    """The stored axis that varies slowest over the outputs."""
    return next((axis for axis in form.permutation if form.weight_shape[axis] != 1), 0)


def _crossing(regions: list[Region]) -> bool:
    """Whether two ranges overlap without one holding the other."""
    return any(
        a.start < b.start < a.stop < b.stop for k, a in enumerate(regions) for b in (*regions[:k], *regions[k + 1 :])
    )


def _parts(find: Find, region: Region, cuts: list[int], stop: Callable[[Place, Match, str], None]) -> Iterator[Find]:
    """A find divided at ``cuts`` of its region; refused where these are not ranges of its outputs."""
    form = find.form
    if form.groups != 1 or form.unitwise or form.d_out % region.size or _outer(form) != region.axis:
        raise Refused("is also used in parts, which are not ranges of its outputs")
    width = form.d_out // region.size
    for first, last in zip([region.start, *cuts], [*cuts, region.stop], strict=True):
        start, size = (first - region.start) * width, (last - first) * width
        place = Place(find.key.name, Region(region.axis, first, last))
        shape = place.shape(form.weight_shape)
        block = BlockForm(1, size, form.d_in, form.bias, form.permutation, shape, form.scale, inner=form, start=start)
        bias = find.bias and _slice(find, start, size)
        if find.bias is not None and bias is None:
            stop(find.bias, find.match, f"is the bias of '{find.key.key}', whose parts are no ranges of it")
        yield replace(find, key=place, bias=bias, form=block)


def _slice(find: Find, start: int, size: int) -> Place | None:
    """The range of a bias that belongs to ``size`` outputs from ``start`` on; ``None`` if it is no range."""
    assert find.match.bias is not None and find.bias is not None
    stored = find.match.bias.view.stored
    axis = next((k for k, extent in enumerate(stored) if extent != 1), 0)
    width = find.form.d_out // stored[axis]
    region = find.bias.region
    if start % width or size % width or (region is not None and region.axis != axis):
        return None
    first = start // width + (0 if region is None else region.start)
    return Place(find.bias.name, Region(axis, first, first + size // width))
