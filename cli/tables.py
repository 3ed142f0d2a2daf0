"""Tables of ``explain`` and ``bench``: plain data in, lines of :mod:`fxcurv.cli.render` out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxcurv.cli import render
from fxcurv.cli.folding import fold, folded_name
from fxcurv.runtime.pages import size_text

SHOWN = 6  # nodes of the critical path without --verbose


def seconds_text(seconds: float) -> str:
    """A time for reading: 1.2 s, 3.4 ms, 5.6 us."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1 or unit == "us":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError


def explained(found: dict[str, Any], verbose: bool) -> None:
    """An explanation: cadences, steps, layers, memory, critical path, advice."""
    device, plain = found["device"], found["plain"]
    batch = ", ".join(found["inputs"])
    render.heading(f"{found['method']} (curvature from {found['fisher']}) for {batch} on {device['name']}")
    render.line(f"{device['source']}; {seconds_text(device['launch_seconds'])} a launch")
    for note in device["notes"]:
        render.line(f"note: {note}")
    if found["ran_for_real"]:
        render.line("note: the model cannot run on fake tensors, so it was run once for real")
    render.line()
    rows = [_row("plain step: forward, backward, SGD", "", plain)]
    rows += [_row(_NAMES.get(name, name), part["every"], part) for name, part in found["cadences"].items()]
    source, period = found["source"], found["cadences"].get("statistics", {}).get("every", "")
    if source["backward_passes"]:
        times = f"{source['backward_passes']} x " if source["backward_passes"] > 1 else ""
        rows.append(_row(f"{times}backward pass of the source", period, source["each"]))
    if source["rewritten_forward"]["ratio"] >= 0.005:
        rows.append(_row("layers rewritten for taps", period, source["rewritten_forward"]))
    columns = ("what", "#every", "#operations", "#bytes moved", "#launches", "#time", "#of a plain step")
    render.table("Each time it is due", columns, rows)
    steps = [(", ".join(s["due"]) or "nothing else (apply alone)", f"{s['ratio']:.2f}x") for s in found["steps"]]
    steps.append(("average step", f"{found['average_ratio']:.2f}x"))
    render.table("A whole step with this due", ("due", "#of a plain step"), steps)
    _kinds(found)
    if verbose:
        _layers(found)
    _memory(found["memory"])
    _path(found["critical_path"], verbose)
    if found["advice"]:
        render.heading("Advice")
        for sentence in found["advice"]:
            render.paragraph(f"- {sentence}")


_NAMES = {
    "step": "update, every step", "statistics": "statistics: reductions in taps, averages",
    "refresh": "refresh: factorisations",
}  # fmt: skip


def _row(name: str, every: Any, part: dict[str, Any]) -> Sequence[Any]:
    return (
        name, every, size_text(part["flops"], "flop"), render.bytes_text(part["bytes"]), f"{part['launches']:,}",
        seconds_text(part["seconds"]), f"{part['ratio']:.2f}",
    )  # fmt: skip


def _kinds(found: dict[str, Any]) -> None:
    cadences = list(found["cadences"])
    rows = [
        (kind, entry["layers"] or "", *(seconds_text(entry["seconds"].get(name, 0.0)) for name in cadences))
        for kind, entry in found["kinds"].items()
    ]
    render.table("By layer kind", ("kind", "#layers", *(f"#{name}" for name in cadences)), rows)


def _layers(found: dict[str, Any]) -> None:
    """A line for every group of layers whose names differ in numbers only and that cost the same."""
    cadences = list(found["cadences"])

    def alike(row: dict[str, Any]) -> tuple[Any, ...]:
        return (row["kind"], *(seconds_text(row["seconds"].get(name, 0.0)) for name in cadences))

    rows = []
    for group in fold(found["layers"], lambda row: str(row["layer"]), alike):
        name = folded_name([str(row["layer"]) for row in group]) or "(all)"
        times = f" ({len(group)})" if len(group) > 1 else ""
        rows.append((name + times, *alike(group[0])))
    render.table("By layer", ("layer", "kind", *(f"#{name}" for name in cadences)), rows)


def _memory(found: dict[str, int]) -> None:
    rows = [
        ("parameters", found["parameters"]),
        ("states, kept between steps", found["states"]),
        ("statistics, from backward to step", found["statistics"]),
        ("peak of a plain forward and backward", found["plain_peak"]),
        ("peak of forward and backward with statistics", found["backward_peak"]),
        ("peak of the update, its gradients and statistics", found["update_peak"]),
    ]
    render.table("Memory", ("what", "#bytes"), [(name, render.bytes_text(size)) for name, size in rows])
    render.line("Peaks are beyond parameters and states.")
    render.line()


def _path(found: dict[str, Any], verbose: bool) -> None:
    nodes = [node for node in found["nodes"] if node["seconds"]]
    shown = nodes if verbose else sorted(nodes, key=lambda node: -node["seconds"])[:SHOWN]
    chosen = [node for node in nodes if node in shown]
    render.heading(
        f"Critical path of the update with everything due: {seconds_text(found['seconds'])} of "
        f"{seconds_text(found['total_seconds'])}, so {found['parallelism']:.1f} nodes could run at once"
    )
    rows = [(n["op"], ", ".join(n["owners"][:2]), n["every"], seconds_text(n["seconds"])) for n in chosen]
    render.table("", ("op", "of", "when", "#time"), rows)


def benched(rows: list[dict[str, Any]]) -> None:
    """Benchmark rows: times of what is right, and what is not."""
    columns = ("name", "side", "case", "#p20", "#p50", "#p80", "#ratio", "#estimate", "#error", "status")
    shown = []
    for row in rows:
        times = ["" if row[p] is None else seconds_text(row[p]) for p in ("p20", "p50", "p80")]
        ratios = ["" if row[key] is None else f"{row[key]:.2f}x" for key in ("ratio", "estimate")]
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        shown.append((row["name"], row["side"], row["case"], *times, *ratios, error, row["status"]))
    if rows:
        render.heading(f"{rows[0]['device']}, {rows[0]['threads']} threads, {max(r['rounds'] for r in rows)} rounds")
    render.table("", columns, shown)
    for row in rows:
        if row["note"]:
            render.paragraph(f"{row['name']} {row['side']}: {row['note']}")


def calibrated(found: dict[str, Any]) -> None:
    """What a machine does."""
    render.heading(f"{found['processor']}, {found['threads']} threads, torch {found['torch']}")
    rows = [(kind, f"{x:.0f}", f"{y / 1e9:.1f} Gflop/s") for kind, curve in found["rates"].items() for x, y in curve]
    rows += [("memory", render.bytes_text(x), f"{y / 1e9:.1f} GB/s") for x, y in found["bandwidth"]]
    rows += [(f"{dtype} in units of f32", "", f"{value:.2f}") for dtype, value in found["relative"].items()]
    rows.append(("a call, autograd and Python included", "", seconds_text(found["launch"])))
    render.table("", ("what", "#size", "#rate"), rows)
