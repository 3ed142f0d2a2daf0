"""Everything that is drawn: the only module of fxcurv that imports rich.

Colours, widths, NO_COLOR and pipes are the console's business. Text from users (names, paths, messages) is never read
as markup.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fxcurv.runtime.pages import size_text

STATUS = {
    "exact": "green", "approximated": "", "diagonal": "", "gradient only": "yellow",
    "working": "green", "partial": "yellow", "planned": "dim",
    "pass": "green", "fail": "bold red", "info": "cyan", "skipped": "dim",
}  # fmt: skip


def console(error: bool = False) -> Console:
    """A console on stdout or stderr; a pipe gets lines of 140 characters or of COLUMNS."""
    stream = sys.stderr if error else sys.stdout
    width = None if stream.isatty() else int(os.environ.get("COLUMNS") or 140)
    return Console(file=stream, width=width, markup=False, highlight=False, emoji=False)


def print_json(data: Any) -> None:
    """Data as JSON on stdout; numbers that JSON does not know become strings."""
    sys.stdout.write(json.dumps(_finite(data), indent=1, default=str) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and value - value != 0 else value


def working(text: str) -> Any:
    """A context with a spinner on a terminal; in a pipe it shows nothing."""
    return console().status(text)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on stdout; a column whose name starts with "#" is a number. Rows of a known status are coloured by it."""
    drawn = Table(title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        drawn.add_column(column.lstrip("#"), justify="right" if column.startswith("#") else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(str(cell), style=STATUS.get(str(cell), "")) for cell in row))
    out = console()
    out.print(drawn)
    out.print()


def heading(text: str) -> None:
    """A bold line."""
    console().print(Text(text, style="bold"))


def line(text: str = "") -> None:
    """A line of plain text, never wrapped."""
    console().print(Text(text), soft_wrap=True)


def source(text: str) -> None:
    """Program text or Python, comments dimmed and never wrapped, so that it can be piped into a file."""
    out = console()
    for row in text.splitlines():
        body, mark, comment = row.partition("  #") if "'" not in row.partition("  #")[2] else (row, "", "")
        shown = Text(body)
        shown.append(mark + comment, style="dim")
        out.print(shown, soft_wrap=True)


def diff(lines: Iterable[str]) -> None:
    """A unified diff in colour."""
    styles = {"+": "green", "-": "red", "@": "cyan"}
    out = console()
    for row in lines:
        out.print(Text(row, style=styles.get(row[:1], "")), soft_wrap=True)


def bytes_text(number: float) -> str:
    """Bytes for reading."""
    return size_text(number)


def layers(found: dict[str, Any]) -> None:
    """The layers of a description, with their parameters and the memory of their states."""
    owners = found["memory"]["states_by_owner"]
    table(
        "Layers",
        ("layer", "kind", "#groups x out x in", "#uses", "#state", "parameters"),
        [
            (
                layer["name"],
                layer["kind"],
                " x ".join(str(size) for size in layer["shape"]),
                layer["uses"],
                bytes_text(owners.get(layer["name"], 0)),
                ", ".join(layer["params"]),
            )
            for layer in found["layers"]
        ],
    )


def coverage(found: dict[str, Any]) -> None:
    """One line for each trainable parameter."""
    rows = found["report"]["rows"]
    table(
        "Coverage",
        ("parameter", "#elements", "layer", "treatment", "why"),
        [(r["parameter"], r["elements"], r["layer"] or "-", r["status"], _why(r)) for r in rows],
    )


def uncovered(found: dict[str, Any]) -> None:
    """The parameters that keep their gradient, with the reason; a line when there are none."""
    rows = [row for row in found["report"]["rows"] if row["status"] == "gradient only"]
    if rows:
        shown = [(row["parameter"], row["elements"], _why(row)) for row in rows]
        table("Not covered", ("parameter", "#elements", "why"), shown)
    else:
        line("Every trainable parameter is covered.\n")


def _why(row: dict[str, Any]) -> str:
    return f"{row['reason']} ({row['source']})" if row["source"] else str(row["reason"])


def passes(found: dict[str, Any]) -> None:
    """What each pass did."""
    rows = [(p["name"], p["rewrites"], f"{p['seconds'] * 1e3:.1f}") for p in found["passes"]]
    table("Passes", ("pass", "#rewrites", "#ms"), rows)


def cost(found: dict[str, Any]) -> None:
    """Operations and bytes of every cadence, and of an average step."""
    per_step = found["per_step"]
    rows = [
        (name, entry["every"], size_text(entry["flops"], "flop"), bytes_text(entry["bytes"]))
        for name, entry in found["cadences"].items()
    ]
    rows.append(("average step", "", size_text(per_step["flops"], "flop"), bytes_text(per_step["bytes"])))
    table(f"Cost for {found['rows']} rows", ("cadence", "#every", "#operations", "#bytes moved"), rows)


class TrainingProgress:
    """Live numbers of a training run: a bar on a terminal, a line now and then in a pipe, nothing when ``quiet``.

    total: steps; done: those of an earlier run that this one resumes.
    """

    def __init__(self, total: int, done: int = 0, quiet: bool = False) -> None:
        self.console = console(error=True)
        self.quiet = quiet
        self.live = self.console.is_terminal and not quiet
        self.every = max(1, total // 20)
        self.total = total
        self.bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
        )
        self.task = self.bar.add_task("train", total=total, completed=done, note="")

    def __enter__(self) -> TrainingProgress:
        if self.live:
            self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.finish()

    def finish(self) -> None:
        """Leave the terminal to other output."""
        if self.live:
            self.bar.stop()

    def update(self, step: int, note: str) -> None:
        """Show the state after ``step`` finished steps."""
        if self.live:
            self.bar.update(self.task, completed=step, note=note)
        elif not self.quiet and (step % self.every == 0 or step == self.total or step == 1):
            self.console.print(Text(f"step {step:5d}/{self.total}  {note}"), soft_wrap=True)
