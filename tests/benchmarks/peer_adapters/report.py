"""Tables of the comparison in Markdown: speed in plain steps, and memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

AIMS = {"W1": 1.75, "W2": 0.80, "W2w": 0.95, "W3": 1.05, "W4": 0.95}
"""Overhead aimed at in plain steps, factors every step and inverses every tenth."""
COLUMNS = ("apply", "statistics", "refresh")
MB = 2**20


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its columns padded to read well as text too."""
    body = [list(head), *map(list, lines)]
    widths = [max(len(line[i]) for line in body) for i in range(len(head))]
    rule = ["-" * w for w in widths]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in [body[0], rule, *body[1:]]
    )


def speed(rows: Sequence[Any], workload: str, threads: int) -> str:
    """Ratios of one workload: a line for each library, then the products alone."""
    mine = [r for r in rows if (r.workload, r.threads) == (workload, threads)]
    by = {(r.library, r.phase): r for r in mine}
    plain = by["plain", "step"]
    sampled = by.get(("fxcurv", "refresh, sampled Fisher"))
    lines = []
    for library in dict.fromkeys(r.library for r in mine if r.library not in ("plain", "bare products")):
        ratios = [f"{by[library, phase].ratio:.2f}" for phase in COLUMNS]
        last = by[library, "refresh"]
        tail = f"{last.p99_ms / last.median_ms:.2f}"
        extra = f"{sampled.ratio:.2f}" if sampled and library == "fxcurv" else ""
        lines.append([library, *ratios, f"{last.ratio - 1:.2f}", f"{last.slowest:.2f}", tail, extra])
    products = {r.phase: r for r in mine if r.library == "bare products"}
    title = f"{workload}, {threads} thread{'s' * (threads > 1)}: plain step {plain.median_ms:.1f} ms"
    if workload in AIMS:
        title += f"; aim for the overhead {AIMS[workload]:.2f}"
    head = ("library", "apply", "+ statistics", "+ refresh / 10", "overhead", "slowest/median", "p99/median", "sampled")
    bare = ", ".join(f"{phase} {row.ratio:.2f}" for phase, row in products.items())
    cheapest = min((products[p].ratio for p in ("gram", "autocorrelation") if p in products), default=0.0)
    apply = min(products["apply"].ratio, products["from rows"].ratio - products["gradient"].ratio)
    total = cheapest + apply + products["refresh"].ratio
    return f"\n**{title}**\n\n{table(head, lines)}\n\nBare products: {bare}; the cheapest together {total:.2f}.\n"


def weights(found: Iterable[Mapping[str, Any]], workload: str) -> str:
    """Memory of one workload in MB."""
    lines = [
        [w["library"], f"{w['state_bytes'] / MB:.1f}", f"{w['peak_bytes'] / MB:.0f}"]
        for w in found
        if w["workload"] == workload
    ]
    head = (f"{workload}: library", "state, MB", "peak of the process beyond imports, MB")
    return "\n" + table(head, lines) + "\n" if lines else ""


def everything(rows: Sequence[Any], found: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> str:
    """All tables and what is missing from them."""
    parts = []
    for workload in dict.fromkeys(r.workload for r in rows):
        parts += [speed(rows, workload, n) for n in dict.fromkeys(r.threads for r in rows if r.workload == workload)]
        parts.append(weights(found, workload))
    return "".join(parts) + "\n" + "\n".join(f"- {note}" for note in notes) + "\n"
