"""Docstrings as parts: what a method's documentation page is made of.

A method's docstring says the idea and its equations first, then "Cost: ...", "Choose it ..." and "Source: ...", each
beginning a sentence. Text is paragraphs, lists ("- ") and indented blocks.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

PARTS = {"Cost": "Cost:", "Choose it": "Choose it", "Source": "Source:"}
_MARK = re.compile(r"(?:(?<=\. )|(?<=\.\n)|(?<=\n\n)|\A)(Cost:|Choose\s+it\b|Source:)")


@dataclass(frozen=True)
class Block:
    """kind: "p" (a paragraph), "list" (its items) or "code"; lines are joined except in code."""

    kind: str
    items: tuple[str, ...]


def sections(doc: str) -> dict[str, str]:
    """The parts "Idea" and those of PARTS that the docstring has, in the order in which they stand there."""
    text = inspect.cleandoc(doc)
    pieces = _MARK.split(text)
    found = {"Idea": pieces[0].strip()}
    names = {mark: name for name, mark in PARTS.items()}
    pieces[1::2] = [" ".join(mark.split()) for mark in pieces[1::2]]
    for mark, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        body = piece.strip() if mark.endswith(":") else f"{mark}{piece.rstrip()}"
        name = names[mark]
        found[name] = f"{found[name]}\n\n{body}" if name in found else body
    return found


def missing(doc: str) -> list[str]:
    """Names of the parts that a method's docstring lacks."""
    found = sections(doc)
    return [mark for name, mark in PARTS.items() if name not in found]


def blocks(text: str) -> list[Block]:
    """Text as paragraphs, lists and code."""
    found: list[Block] = []
    for part in re.split(r"\n\s*\n", text.strip("\n")):
        lines = part.splitlines()
        if all(line.startswith("    ") for line in lines):
            found.append(Block("code", tuple(line[4:] for line in lines)))
            continue
        start = next((i for i, line in enumerate(lines) if line.startswith("- ")), len(lines))
        if start:
            found.append(Block("p", (" ".join(line.strip() for line in lines[:start]),)))
        if lines[start:]:
            items: list[str] = []
            for line in lines[start:]:
                if line.startswith("- "):
                    items.append(line[2:].strip())
                else:
                    items[-1] += f" {line.strip()}"
            found.append(Block("list", tuple(items)))
    return found


def explained(name: str, doc: str) -> str:
    """What a docstring says behind ``name:``, up to the end of the sentence; "" when it does not."""
    body = _sentence(" ".join(inspect.cleandoc(doc).split()), rf"(?<![\w.]){re.escape(name)}(?:, \w+)*: ")
    return body[:1].upper() + body[1:]


def mentioned(name: str, doc: str) -> str:
    """The first sentence of a docstring that has the name; "" when none has."""
    text = " ".join(inspect.cleandoc(doc).split())
    for sentence in re.split(r"(?<=[.;:]) (?=[A-Z\"(]|\w+:)", text):
        if re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", sentence):
            return sentence
    return ""


def _sentence(text: str, start: str) -> str:
    """What follows ``start``, up to the end of the sentence."""
    found = re.search(start, text)
    if found is None:
        return ""
    rest = text[found.end() :]
    end = re.search(r"(?<!e\.g)(?<!i\.e)\.(?= |$)|;(?= \w+:)", rest)
    return rest[: end.start() + 1].rstrip(";") if end else rest
