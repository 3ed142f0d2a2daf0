"""``fxcurv papers``: which papers the package implements, with an honest status."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from fxcurv.cli.verb import Json
from fxcurv.errors import FxcurvError

Number = Annotated[Optional[int], typer.Argument(metavar="[NUMBER]", help="One of them, in full.")]  # noqa: UP045


def run(number: Number = None, json: Json = False) -> None:
    """List the papers behind the methods and what became of each, or one in full."""
    import dataclasses
    from collections import Counter

    from fxcurv.cli import render
    from fxcurv.methods.papers import load_papers

    papers = load_papers()
    if number is not None:
        chosen = next((paper for paper in papers if paper.number == number), None)
        if chosen is None:
            last = max(paper.number for paper in papers)
            raise FxcurvError(f"there is no paper {number}; they are numbered up to {last}.")
        if json:
            render.print_json(dataclasses.asdict(chosen))
            return
        render.heading(f"{chosen.number}. {chosen.title}")
        render.line(f"{chosen.author}, {chosen.year}")
        for field in ("status", "becomes", "sheet", "implements", "uses", "tests", "note"):
            value = getattr(chosen, field)
            if value:
                render.line(f"{field}: {', '.join(value) if isinstance(value, tuple) else value}")
        return
    if json:
        render.print_json([dataclasses.asdict(paper) for paper in papers])
        return
    rows = [(p.number, p.title, p.year, p.status, p.becomes) for p in papers]
    render.table("", ("#number", "paper", "year", "status", "becomes"), rows)
    counts = Counter(paper.status for paper in papers)
    render.line(", ".join(f"{n} {status}" for status, n in counts.items()))
