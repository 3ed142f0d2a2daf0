"""Statistic expressions: the keys of a program's ``stat`` inputs say what has to be measured.

    fc.a                                   the rows of layer fc's input, as they are
    gram(fc.a)                             a reduction of them, computed in the backward pass
    second_moment(fc.a, fc.g, $fc.QA, $fc.QG)   a reduction that reads states of the program
    block_gram(fc.a, 128)                  a reduction with a whole number among its operands
    weight                                 a number that the run time supplies

An expression is built by the pass ``sink`` from the ops it moves out of the program, and read by the pass
``tap``, so a program's text alone says what the tapped forward graph has to deliver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fxcurv.errors import FxcurvError

SIDES = ("a", "g", "a2", "g2")  # rows of a layer's uses, and of its uses with swapped roles


@dataclass(frozen=True)
class RowsOf:
    """Rows of a layer: side "a" (input) or "g" (output gradient); "a2", "g2" for swapped uses."""

    layer: str
    side: str

    def __str__(self) -> str:
        return f"{self.layer}.{self.side}"


@dataclass(frozen=True)
class StateOf:
    """A state of the program, by key."""

    key: str

    def __str__(self) -> str:
        return f"${self.key}"


@dataclass(frozen=True)
class Whole:
    """A whole number, not negative: a size that the op is given."""

    value: int

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True)
class Call:
    """An op applied to expressions."""

    op: str
    operands: tuple[Call | RowsOf | StateOf | Whole, ...]

    def __str__(self) -> str:
        return f"{self.op}({', '.join(str(operand) for operand in self.operands)})"


def leaves(expression: Call | RowsOf | StateOf | Whole) -> Iterator[RowsOf | StateOf]:
    """The rows and states an expression reads, left to right."""
    if isinstance(expression, Call):
        for operand in expression.operands:
            yield from leaves(operand)
    elif not isinstance(expression, Whole):
        yield expression


def state_keys(text: str) -> tuple[str, ...]:
    """Keys of the states that the statistic printed as ``text`` reads."""
    expression = parse_statistic(text) if "$" in text else None
    return () if expression is None else tuple(leaf.key for leaf in leaves(expression) if isinstance(leaf, StateOf))


def evaluate(
    expression: Call | RowsOf | StateOf | Whole, read: Callable[[Any], Any], apply: Callable[[str, list[Any]], Any]
) -> Any:
    """Fold an expression: ``read`` gives the value of a leaf, ``apply`` that of an op on values."""
    if isinstance(expression, Call):
        return apply(expression.op, [evaluate(operand, read, apply) for operand in expression.operands])
    return expression.value if isinstance(expression, Whole) else read(expression)


def parse_statistic(text: str) -> Call | RowsOf | StateOf | None:
    """The expression that prints as ``text``; ``None`` for a plain name such as ``weight``."""
    expression, rest = _parse(text)
    if rest.strip():
        raise FxcurvError(f"'{text}' is not a statistic: '{rest}' is left over.")
    return None if isinstance(expression, Whole) else expression


def _parse(text: str) -> tuple[Any, str]:
    end = next((i for i, char in enumerate(text) if char in "(),"), len(text))
    head, rest = text[:end].strip(), text[end:]
    if rest.startswith("("):
        operands = []
        while rest[0] in "(,":
            operand, rest = _parse(rest[1:])
            if operand is None:
                raise FxcurvError(
                    f"'{text}' is not a statistic: operands are rows (fc.a), states ($fc.QA), whole numbers or calls."
                )
            operands.append(operand)
            if not rest or rest[0] not in ",)":
                raise FxcurvError(f"'{text}' is not a statistic: a bracket is not closed.")
        return Call(head, tuple(operands)), rest[1:]
    if head.startswith("$"):
        return StateOf(head[1:]), rest
    if head.isdecimal():
        return Whole(int(head)), rest
    layer, _, side = head.rpartition(".")
    return (RowsOf(layer, side), rest) if layer and side in SIDES else (None, rest)
