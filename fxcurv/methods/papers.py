"""The papers behind the methods: what each became here, as listed in papers.toml beside this file."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxcurv.errors import FxcurvError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PATH = Path(__file__).with_name("papers.toml")
STATUSES = ("working", "partial", "planned")


@dataclass(frozen=True)
class Paper:
    """One paper.

    status: "working", "partial" or "planned". author: the first one. sheet: where its equations are written down.
    becomes: the part of the package it turns into. implements: methods, or importable names, that are this paper; uses:
    what of it the code relies on; tests: "file::function" that show it. note: what is missing, "" when working.
    """

    number: int
    title: str
    status: str
    author: str = ""
    year: int = 0
    sheet: str = ""
    becomes: str = ""
    implements: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    note: str = ""


def load_papers(path: Path = PATH) -> tuple[Paper, ...]:
    """All papers by number; raises :class:`FxcurvError` when the file is missing or an entry is not understood."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FxcurvError(f"'{path}' is missing from this installation.") from None
    except tomllib.TOMLDecodeError as error:
        raise FxcurvError(f"'{path}' is not TOML: {error}.") from None
    entries = next((value for value in data.values() if isinstance(value, list)), [])
    papers = sorted((_paper(path, entry) for entry in entries), key=lambda paper: paper.number)
    for one, other in zip(papers, papers[1:], strict=False):
        if one.number == other.number:
            raise FxcurvError(f"'{path}' lists paper {one.number} twice.")
    return tuple(papers)


def papers() -> dict[int, Paper]:
    """Every paper by its number: ``fxcurv.papers()``."""
    return {paper.number: paper for paper in load_papers()}


def _paper(path: Path, entry: dict[str, Any]) -> Paper:
    fields = Paper.__dataclass_fields__
    unknown, missing = sorted(set(entry) - set(fields)), [n for n in ("number", "title", "status") if n not in entry]
    if unknown or missing:
        what = f"an unknown field '{unknown[0]}'" if unknown else f"no '{missing[0]}'"
        raise FxcurvError(f"'{path}': paper {entry.get('number', '?')} has {what}.")
    if entry["status"] not in STATUSES:
        known = ", ".join(STATUSES)
        raise FxcurvError(f"'{path}': paper {entry['number']} has status '{entry['status']}'; there are {known}.")
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}
    return Paper(**values)
