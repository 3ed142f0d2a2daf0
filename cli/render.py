"""Everything that is drawn; with the bars of :mod:`fxcurv.cli.lanes` the only module of fxcurv that imports rich.

Colours, widths, NO_COLOR and pipes are the console's business. Text from users (names, paths, messages) is never read
as markup.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fxcurv.cli.folding import fold, folded_name
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
    sys.stdout.write(json_text(data))


def json_text(data: Any) -> str:
    """Data as JSON, as :func:`print_json` prints it."""
    return json.dumps(_finite(data), indent=1, default=str) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and value - value != 0 else value


def working(text: str) -> Any:
    """A context with a spinner on a terminal; in a pipe it shows nothing."""
    return console().status(text)


class Saying:
    """A spinner on a terminal whose text changes: call what the context gives with a line."""

    def __init__(self) -> None:
        self.status = console(error=True).status("")

    def __enter__(self) -> Any:
        self.status.start()
        return lambda text: self.status.update(Text(text))

    def __exit__(self, *exc: object) -> None:
        self.status.stop()


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], names: bool = False) -> None:
    """A table on stdout; a column whose name starts with "#" is a number. Rows of a known status are coloured by it.

    names: the first column holds names to type, which are never broken over lines.
    """
    drawn = Table(title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for k, column in enumerate(columns):
        justify: Any = "right" if column.startswith("#") else "left"
        drawn.add_column(column.lstrip("#"), justify=justify, overflow="fold", no_wrap=names and k == 0)
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


def paragraph(text: str, indent: int = 0) -> None:
    """Text wrapped at the console's width, each line indented."""
    console().print(Padding(Text(text), (0, 0, 0, indent)))


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
    """How every trainable parameter is treated: a summary by kind, the layers, and what is left out with the reason.

    Layers, and parameters without one, whose names differ only in numbers share a line.
    """
    report = found["report"]
    rows, total = report["rows"], sum(row["elements"] for row in report["rows"])
    by = f", captured by {report['frontend']}" if report["frontend"] else ""
    heading(f"{report['method']}: {100 * report['covered']:.1f} % of {total:,} elements covered{by}")
    line(
        f"curvature from {report['fisher']}; states take {bytes_text(report['state_bytes'])}, the largest value within "
        f"a step {bytes_text(report['transient_bytes'])}"
    )
    for note in report["notes"]:
        line(f"note: {note}")
    line()
    table(
        "By kind",
        ("kind", "#layers", "#elements", "#share"),
        [(k, v["layers"] or "", f"{v['elements']:,}", f"{100 * v['share']:.1f} %") for k, v in report["kinds"].items()],
    )
    _covered([row for row in rows if row["status"] != "gradient only"])
    _left_out([row for row in rows if row["status"] == "gradient only"])


def _covered(rows: list[dict[str, Any]]) -> None:
    """A line for each group of like layers: one parameter of a layer under the other, their numbers together."""
    layers: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        layers.setdefault(row["layer"] or row["parameter"], []).append(row)

    def alike(name: str) -> tuple[Any, ...]:
        first = layers[name][0]
        parts = tuple(row["parameter"].removeprefix(name) for row in layers[name])
        return (*(str(first[key]) for key in ("kind", "shape", "uses", "status", "reason", "state_bytes")), parts)

    drawn, remarks = [], []
    for group in fold(list(layers), lambda name: name, alike):
        first, name = layers[group[0]][0], folded_name(group)
        parts = [row["parameter"].removeprefix(f"{group[0]}.") for row in layers[group[0]]]
        elements = sum(row["elements"] for member in group for row in layers[member])
        times = f" ({len(group)})" if len(group) > 1 else ""
        shown = f"{name}{times}" + (f": {', '.join(parts)}" if parts != [group[0]] else "")
        memory = bytes_text(first["state_bytes"]) + ("*" if first["shared_bytes"] else "")
        shape = " x ".join(str(size) for size in first["shape"])
        drawn.append(
            (shown, first["kind"] or "-", shape, first["uses"] or "-", f"{elements:,}", first["status"], memory)
        )
        remarks += [f"{name}: {first['reason']}"] if _remarkable(first) else []
    if drawn:
        table("Covered", ("layer", "kind", "#shape", "#uses", "#elements", "treatment", "#state each"), drawn)
    if any(row["shared_bytes"] for row in rows):
        line("* a part of it is shared with other layers")
    for remark in remarks:
        paragraph(remark)
    if remarks or any(row["shared_bytes"] for row in rows):
        line()


def _remarkable(row: dict[str, Any]) -> bool:
    """Whether the reason says more than the method's name or that a block is whole."""
    return "," in row["reason"] or ";" in row["reason"]


def _left_out(rows: list[dict[str, Any]]) -> None:
    """The parameters that keep their gradient: why, by which nodes, and the line of code."""
    if not rows:
        line("Every trainable parameter is covered.\n")
        return
    heading("Gradient only")

    def alike(row: dict[str, Any]) -> str:
        return _QUOTED.sub("", f"{row['reason']} {row['source']} {row['tensor']}")

    for group in fold(rows, lambda row: str(row["parameter"]), alike):
        first, elements = group[0], sum(row["elements"] for row in group)
        times = f" ({len(group)})" if len(group) > 1 else ""
        name = folded_name([str(row["parameter"]) for row in group])
        paragraph(f"{name}{times}, {elements:,} element{'' if elements == 1 else 's'}")
        paragraph(first["reason"], indent=2)
        if first["chain"]:
            paragraph(f"by way of {' -> '.join(first['chain'])}", indent=2)
        if first["source"]:
            paragraph(f"at {first['source']}", indent=2)
    line()


_QUOTED = re.compile(r"'[^']*'")


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


def binaries(found: Sequence[Any]) -> None:
    """Compiled kernels: what the compilers say about each."""
    table(
        "Compiled",
        ("family", "variant", "target", "kernel", "#registers", "#spills", "#shared", "#tensor cores", "#s"),
        [
            (b.family, b.variant, b.arch, b.kernel, b.registers, b.spills, b.shared, b.tensor_cores, f"{b.seconds:.1f}")
            for b in found
        ],
    )


def traffic(found: Sequence[Any]) -> None:
    """Bytes of kernels beside the floor: every input read once, every output written once."""
    table(
        "Traffic",
        ("family", "variant", "target", "#launches", "#moved", "#floor", "#ratio", "#cached", "#operations", "limit"),
        [
            (
                one.family,
                one.variant,
                one.arch,
                one.launches,
                bytes_text(one.read + one.written),
                bytes_text(one.floor),
                f"{one.ratio:.2f}",
                bytes_text(one.cached),
                size_text(one.flops, "flop"),
                "memory" if one.limited_by_memory else "",
            )
            for one in found
        ],
    )


class Counting:
    """A bar on a terminal that counts up to ``total``; nothing in a pipe."""

    def __init__(self, what: str, total: int) -> None:
        shown = console(error=True)
        self.bar = Progress(
            TextColumn(what), MofNCompleteColumn(), BarColumn(bar_width=24), TimeElapsedColumn(), console=shown
        )
        self.task = self.bar.add_task(what, total=total)
        self.live = shown.is_terminal

    def __enter__(self) -> Counting:
        if self.live:
            self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.live:
            self.bar.stop()

    def advance(self) -> None:
        """One more."""
        self.bar.advance(self.task)


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
