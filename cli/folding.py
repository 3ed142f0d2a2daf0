"""Many names in few lines: names that differ only in numbers become one, ``blocks.0-11.attn.qkv``."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
_NUMBER = re.compile(r"\d+")


def fold(items: Sequence[Item], name: Callable[[Item], str], alike: Callable[[Item], Hashable]) -> list[list[Item]]:
    """Items in groups, in the order of their first: those whose names differ only in numbers and that are alike."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault((_NUMBER.sub("#", name(item)), alike(item)), []).append(item)
    return list(groups.values())


def folded_name(names: Sequence[str]) -> str:
    """One name for names that differ only in numbers; a place where several stand shows them: ``0-3`` or ``0,2,5``."""
    columns = zip(*(_NUMBER.findall(name) for name in names), strict=True)
    numbers = iter([_ranges(sorted({int(number) for number in column})) for column in columns])
    return _NUMBER.sub(lambda match: next(numbers), names[0])


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
