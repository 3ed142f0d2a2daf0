"""From products to layers: one layer a weight, with all its uses, and a bias where it belongs to that weight alone.

A bias is a coordinate of a layer only if every product of the weight in the layer's orientation has it and no
other weight shares it. Otherwise the weight is covered without it and the bias is listed as uncovered.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fxcurv.layers.blocks import BlockForm, Find, divide
from fxcurv.layers.elements import bias_alone
from fxcurv.layers.form import Form
from fxcurv.layers.layer import Detection, Layer, Uncovered, Use
from fxcurv.layers.region import Place, by_name, rest
from fxcurv.layers.spelling import Match, Operand


def assemble(
    products: Mapping[Any, Match],
    stops: Mapping[Place, Uncovered],
    trainable: Mapping[str, Any],
    seen: Collection[str],
    kinds: Collection[str] | None,
    fused: Mapping[str, int] | None = None,
) -> Detection:
    """Group matches by weight.

    stops: why (a part of) a parameter has a use that is no layer's; trainable: shapes by name, in the model's order;
    seen: read by the graph; kinds, fused: see :func:`fxcurv.layers.detect.detect`.
    """
    group = _Group(trainable, kinds)
    for place, item in stops.items():
        group.stops.setdefault(place.name, {})[place] = item
    finds = divide(group.finds(products), fused, _path, group.stop)
    by_key: dict[Place, list[Find]] = {}
    for find in finds:
        by_key.setdefault(find.key, []).append(find)
    group.check_biases(by_key)
    layers = tuple(layer for key, members in by_key.items() if (layer := group.layer(key, members)))
    places = by_name(place for layer in layers for place in layer.places)
    missing = [left for name, shape in trainable.items() for left in rest(name, shape, places.get(name, ()))]
    return Detection(layers, tuple(item for place in missing for item in group.reasons(place, seen)))


@dataclass
class _Group:
    """What is known while layers are put together: trainable parameters, the kinds wanted, stops so far by name."""

    known: Mapping[str, Any]
    kinds: Collection[str] | None
    stops: dict[str, dict[Place, Uncovered]] = field(default_factory=dict)

    def stop(self, place: Place, match: Match, reason: str) -> None:
        """Record why a place is no layer's; the first reason stays."""
        item = Uncovered(place.key, f"It {reason} (node '{match.y.name}').", (match.y.name,))
        self.stops.setdefault(place.name, {}).setdefault(place, item)

    def stopped(self, place: Place) -> Uncovered | None:
        """Why some element of a place is no layer's."""
        mine = self.stops.get(place.name, {})
        return mine.get(place) or next((item for other, item in mine.items() if other.overlaps(place)), None)

    def reasons(self, place: Place, seen: Collection[str]) -> list[Uncovered]:
        """Why a place is uncovered."""
        item = self.stopped(place) or _unread(place, seen)
        return [replace(item, parameter=place.key)]

    def finds(self, products: Mapping[Any, Match]) -> list[Find]:
        """Products with a trainable weight; a trainable bias of a frozen one is a weight of its own."""
        found = []
        for match in products.values():
            weight, bias = self._place(match.weight), self._place(match.bias)
            if weight is None and bias is not None:
                alone = bias_alone(match)
                if alone is None:
                    self.stop(bias, match, "is the bias of a product whose weight is frozen: it keeps its gradient")
                    continue
                match, weight, bias = alone, bias, None
            if weight is not None:
                found.append(Find(match, weight, bias, match.form))
        return found

    def check_biases(self, finds: Mapping[Place, list[Find]]) -> None:
        """Stop every bias that belongs to several weights, or that is itself a weight."""
        owners: dict[Place, set[Place]] = {}
        for key, members in finds.items():
            for find in members:
                if find.bias is not None:
                    owners.setdefault(find.bias, set()).add(key)
        places = by_name((*owners, *finds))
        for bias, keys in owners.items():
            others = [other for other in places[bias.name] if other != bias and other.overlaps(bias)]
            if len(keys) > 1 or bias in finds or others:
                match = finds[min(keys, key=lambda place: place.key)][0].match
                self.stop(bias, match, "is the bias of several weights, or also a weight")

    def layer(self, key: Place, finds: list[Find]) -> Layer | None:
        """The layer of one weight, or ``None`` with a stop recorded for its parameters."""
        finds = sorted(finds, key=lambda find: find.match.kind == "embedding")  # the head of a tied pair comes first
        first = finds[0]
        turns = [_turn(first.form, find.form) for find in finds]
        if None in turns and not self.stopped(key):
            self.stop(key, finds[turns.index(None)].match, "is used in two roles that have no common normal form")
        if self.kinds is not None and first.match.kind not in self.kinds and not self.stopped(key):
            self.stop(key, first.match, f"belongs to a layer of kind {first.match.kind}, which was not asked for")
        if self.stopped(key):
            for find in finds:
                if find.bias is not None:
                    self.stop(find.bias, find.match, f"is the bias of '{key.key}', which no layer covers")
            return None
        bias = first.bias
        straight = {find.bias for find, turn in zip(finds, turns, strict=True) if not turn}
        if straight != {bias} or (bias is not None and self.stopped(bias)):
            bias = None
        for find in finds:
            if find.bias not in (None, bias):
                why = f"is not the only bias of '{key.key}', which products with other biases share"
                self.stop(find.bias, find.match, why)
        matches = [find.match for find in finds]
        uses = tuple(
            Use(m.x, m.y, find.form if turn or bias is None else with_bias(find.form), m.aux, bool(turn))
            for find, m, turn in zip(finds, matches, turns, strict=True)
        )
        return Layer(
            _path(first),
            first.match.kind,
            key.name,
            None if bias is None else bias.name,
            uses,
            _note(matches, turns),
            key.region,
            None if bias is None else bias.region,
        )

    def _place(self, operand: Operand | None) -> Place | None:
        return operand.place if operand is not None and operand.parameter in self.known else None


def with_bias(form: Form) -> Form:
    """The form with the constant coordinate added."""
    if isinstance(form, BlockForm):
        form = replace(form, inner=with_bias(form.inner))
    return replace(form, d_in=form.d_in + 1, bias=True)


def _turn(first: Form, other: Form) -> bool | None:
    """Whether ``other`` reads the stored weight transposed; ``None`` if it does neither that nor the same."""

    sizes, others = (first.groups, first.d_out, first.inputs), (other.groups, other.d_out, other.inputs)
    (out, inner), order = _sides(first), sum(_sides(other), [])
    if sizes == others and out + inner == order:
        return False
    if first.groups == 1 and sizes == (others[0], others[2], others[1]) and inner + out == order:
        return True
    return None


def _sides(form: Form) -> tuple[list[int], list[int]]:
    """Stored axes of the outputs (groups included) and of the inputs, leaving out axes of size 1."""
    order = [axis for axis in form.permutation if form.weight_shape[axis] != 1]
    count, left = 0, form.groups * form.d_out
    while count < len(order) and left > 1:
        left //= form.weight_shape[order[count]]
        count += 1
    return order[:count], order[count:]


def _note(matches: list[Match], turns: list[bool | None]) -> str:
    if len(matches) == 1:
        return ""
    if any(turns):
        names = " and ".join(dict.fromkeys(match.kind for match in matches))
        return f"tied weight, read both as it is and transposed ({names}); oriented as in '{matches[0].y.name}'"
    return f"one weight used {len(matches)} times: uses are summed as if they were independent"


def _path(find: Find) -> str:
    """A layer's name: its module's path, or the weight's without "weight", and the range that it has of the weight."""
    path, _, leaf = find.key.name.rpartition(".")
    region = find.key.region
    part = "" if region is None else f"[{region.start}:{region.stop}]"
    return f"{path if path and leaf == 'weight' else find.key.name}{part}"


def _unread(place: Place, seen: Collection[str]) -> Uncovered:
    if place.region is not None:
        return Uncovered(place.key, "This part of it is never used in this graph.")
    read = place.name in seen
    return Uncovered(place.key, f"It is {'read, but no gradient reaches it' if read else 'never used in this graph'}.")
