"""Sums of statistics that come in stacks: one tensor for a tuple of keys, a row for each."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

Keys = tuple[str, ...]


class Stacks:
    """Stacks by their keys; what is added under the same keys adds up."""

    def __init__(self) -> None:
        self.sums: dict[Keys, Tensor] = {}
        self.places: dict[Keys, dict[str, int]] = {}

    def __bool__(self) -> bool:
        return bool(self.sums)

    def clear(self) -> None:
        """Drop all sums."""
        self.sums.clear()

    def add(self, keys: Keys, value: Tensor) -> None:
        """Add a stack; a key that occurs twice (a layer with several uses) gets the sum of its rows."""
        places = self.places.get(keys)
        if places is None:
            places = self.places[keys] = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        if len(places) < len(keys):
            target = torch.tensor([places[key] for key in keys], device=value.device)
            value = value.new_zeros(len(places), *value.shape[1:]).index_add_(0, target, value)
            keys = tuple(places)
            self.places.setdefault(keys, places)
        known = self.sums.get(keys)
        self.sums[keys] = value if known is None else known + value

    def take(self, other: Stacks) -> None:
        """Add all that ``other`` holds, which is empty then."""
        for keys, value in other.sums.items():
            self.add(keys, value)
        other.clear()

    def rows(self, key: str) -> list[Tensor]:
        """The rows of one key, from all stacks that have one."""
        return [value[self.places[keys][key]] for keys, value in self.sums.items() if key in self.places[keys]]

    def only(self, keys: Keys, elsewhere: Container[str]) -> Tensor | None:
        """The stack of exactly these keys, if nothing of them is in another one or ``elsewhere``."""
        found = self.sums.get(keys)
        if found is None or any(key in elsewhere for key in keys):
            return None
        others = (self.places[other] for other in self.sums if other != keys)
        return None if any(key in places for places in others for key in keys) else found
