"""From products to layers: one layer a weight, with all its uses, and a bias where it belongs to that weight alone.

A bias is a coordinate of a layer only if every product of the weight in the layer's orientation has it and no
other weight shares it. Otherwise the weight is covered without it and the bias is listed as uncovered.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from fxcurv.layers.form import Form
from fxcurv.layers.layer import Detection, Layer, Uncovered, Use
from fxcurv.layers.norm import NormForm
from fxcurv.layers.spelling import Match, Operand


def assemble(
    products: Mapping[Any, Match],
    stops: dict[str, Uncovered],
    trainable: list[str],
    seen: Collection[str],
    kinds: Collection[str] | None,
) -> Detection:
    """Group matches by weight.

    stops: why a parameter has a use that is no layer's; trainable: in the model's order; seen: read by the graph.
    """
    stops, known = dict(stops), set(trainable)
    weights: dict[str, list[Match]] = {}
    owners: dict[str, set[str]] = {}
    for match in products.values():
        weight, bias = _name(match.weight, known), _name(match.bias, known)
        if weight is None and bias is not None and not isinstance(match.form, NormForm):
            _stop(stops, bias, match, "is the bias of a product whose weight is frozen: it keeps its gradient")
            continue
        key = weight or bias
        if key is not None:
            weights.setdefault(key, []).append(match)
        if key is not None and bias is not None:
            owners.setdefault(bias, set()).add(key)
    for bias, keys in owners.items():
        if len(keys) > 1 or (bias in weights and keys != {bias}):
            _stop(stops, bias, weights[min(keys)][0], "is the bias of several weights, or also a weight")
    layers = [layer for key, matches in weights.items() if (layer := _layer(key, matches, stops, known, kinds))]
    covered = {name for layer in layers for name in layer.params}
    missing = [name for name in trainable if name not in covered]
    return Detection(tuple(layers), tuple(stops.get(name) or _unread(name, seen) for name in missing))


def _layer(
    key: str, matches: list[Match], stops: dict[str, Uncovered], known: set[str], kinds: Collection[str] | None
) -> Layer | None:
    """The layer of one weight (or of a norm's shift), or ``None`` with a stop recorded for its parameters."""
    matches = sorted(matches, key=lambda match: match.kind == "embedding")  # the head of a tied pair comes first
    first = matches[0]
    biases = [_name(match.bias, known) for match in matches]
    turns = [_turn(first.form, match.form) for match in matches]
    if key not in stops and None in turns:
        _stop(stops, key, matches[turns.index(None)], "is used in two roles that have no common normal form")
    if key not in stops and kinds is not None and first.kind not in kinds:
        _stop(stops, key, first, f"belongs to a layer of kind {first.kind}, which was not asked for")
    if key in stops:
        for name, match in zip(biases, matches, strict=True):
            if name is not None and name != key:
                _stop(stops, name, match, f"is the bias of '{key}', which no layer covers")
        return None
    bias = biases[0]
    straight = {name for name, turn in zip(biases, turns, strict=True) if not turn}
    if straight != {bias} or bias in stops:
        bias = None
    for name, match in zip(biases, matches, strict=True):
        if name not in (None, bias):
            _stop(stops, name or "", match, f"is not the only bias of '{key}', which products with other biases share")
    uses = tuple(
        Use(match.x, match.y, match.form if turn or bias is None else with_bias(match.form), match.aux, bool(turn))
        for match, turn in zip(matches, turns, strict=True)
    )
    weight = key if any(_name(match.weight, known) == key for match in matches) else None
    return Layer(_path(key, "weight" if weight else "bias"), first.kind, weight, bias, uses, _note(matches, turns))


def with_bias(form: Form) -> Form:
    """The form with the constant coordinate added."""
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


def _name(operand: Operand | None, known: set[str]) -> str | None:
    return operand.parameter if operand is not None and operand.parameter in known else None


def _path(parameter: str, role: str) -> str:
    path, _, leaf = parameter.rpartition(".")
    return path if path and leaf == role else parameter


def _stop(stops: dict[str, Uncovered], name: str, match: Match, reason: str) -> None:
    stops.setdefault(name, Uncovered(name, f"It {reason} (node '{match.y.name}').", (match.y.name,)))


def _unread(name: str, seen: Collection[str]) -> Uncovered:
    reason = "It is read, but no gradient reaches it." if name in seen else "It is never used in this graph."
    return Uncovered(name, reason)
