"""What a comparison says: a row a method from the losses of its runs, as a table, as Markdown, and as curves."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fxcurv.cli.attempt import FINISHED, smoothed
from fxcurv.cli.contest import Result
from fxcurv.runtime.pages import size_text

Spread = tuple[float, float]  # mean, and standard deviation over seeds (0 of one)


def standings(results: Sequence[Result], steps: int, window: int) -> dict[str, Any]:
    """What a comparison found: "equal_seconds", and "rows", one a method, the lowest final loss first, failures last.

    equal_seconds: mean seconds of the method that was first to finish all steps; ``None`` if none did. Losses are means
    over the last ``window`` steps; values over seeds are pairs (mean, standard deviation).
    """
    totals = [statistics.fmean(run["seconds"][-1] for run in done) for r in results if (done := _finished(r))]
    budget = min(totals, default=None)
    rows = [_row(result, steps, window, budget) for result in results]
    return {"equal_seconds": budget, "rows": sorted(rows, key=_rank)}


def _row(result: Result, steps: int, window: int, budget: float | None) -> dict[str, Any]:
    done = _finished(result)
    ended = [run for run in result.runs if run["status"] != FINISHED]
    reason = ended[0]["reason"] if ended else ""
    if ended and done:
        reason = f"{len(ended)} of {len(result.runs)} seeds: {reason}"

    def loss(at: int) -> Spread | None:
        return over(smoothed(run["losses"], at, window) for run in done)

    def loss_in_time(run: dict[str, Any]) -> float | None:
        return smoothed(run["losses"], bisect_right(run["seconds"], budget or 0.0), window)

    names = dict.fromkeys(name for run in done for name in run["scores"])
    return {
        "method": result.method,
        "hyper": result.hyper,
        "status": FINISHED if not ended else ended[0]["status"],
        "reason": reason,
        "loss_quarter": loss(max(1, steps // 4)),
        "loss_half": loss(max(1, steps // 2)),
        "loss": loss(steps),
        "loss_equal_seconds": over(loss_in_time(run) for run in done),
        "seconds": over(run["seconds"][-1] for run in done),
        "seconds_per_step": over(run["seconds"][-1] / len(run["seconds"]) for run in done),
        "state_bytes": _largest(run["memory"].get("states") for run in result.runs),
        "peak_bytes": _largest(run["memory"].get("peak") for run in result.runs),
        **{name: sum(run["counts"][name] for run in done) for name in ("refreshes", "fallbacks", "repaired", "kept")},
        "scores": {name: over(run["scores"].get(name) for run in done) for name in names},
    }


def over(values: Iterable[float | None]) -> Spread | None:
    """Mean and standard deviation; ``None`` without any value, or when one is missing."""
    found = list(values)
    known = [value for value in found if value is not None]
    if not known or len(known) < len(found):
        return None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else 0.0


def _finished(result: Result) -> list[dict[str, Any]]:
    return [run for run in result.runs if run["status"] == FINISHED]


def _largest(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _rank(row: dict[str, Any]) -> tuple[bool, float]:
    return row["status"] != FINISHED, row["loss"][0] if row["loss"] else math.inf


def columns(found: dict[str, Any], steps: int) -> list[tuple[str, Callable[[dict[str, Any]], str]]]:
    """Names of the columns with the text of a row's cell; a name that starts with "#" is of numbers."""
    budget = found["equal_seconds"]
    scores = list(dict.fromkeys(name for row in found["rows"] for name in row["scores"]))

    def number(key: str, digits: int = 4) -> Callable[[dict[str, Any]], str]:
        return lambda row: spread_text(row[key], digits)

    def score(name: str) -> Callable[[dict[str, Any]], str]:
        return lambda row: spread_text(row["scores"].get(name))

    return [
        ("method", lambda row: str(row["method"])),
        (f"#loss at {max(1, steps // 4)}", number("loss_quarter")),
        (f"#at {max(1, steps // 2)}", number("loss_half")),
        (f"#at {steps}", number("loss")),
        ("#at " + ("equal s" if budget is None else f"{budget:.3g} s"), number("loss_equal_seconds")),
        ("#s", lambda row: _mean(row["seconds"])),
        ("#ms/step", lambda row: _mean(row["seconds_per_step"], 1e3)),
        ("#state", lambda row: _bytes(row["state_bytes"])),
        ("#peak", lambda row: _bytes(row["peak_bytes"])),
        ("#refreshes", lambda row: str(row["refreshes"]) if row["loss"] else ""),
        ("#skipped", lambda row: str(row["fallbacks"] + row["kept"]) if row["loss"] else ""),
        *((f"#{name}", score(name)) for name in scores),
    ]


def settings(results: Sequence[Result]) -> list[tuple[str, str, str, str]]:
    """(method, setting, loss of its last rung, whether it was chosen) for every point that was looked at."""
    rows = []
    for result in results:
        for one in result.searched or [{"hyper": result.hyper, "loss": None, "steps": 0, "reason": ""}]:
            varied = hyper_text(one["hyper"]) or "defaults"
            known = one["loss"] is not None and math.isfinite(one["loss"])
            reached = f"{one['loss']:.4g} after {one['steps']}" if known else one["reason"]
            rows.append((result.method, varied, reached, "chosen" if one["hyper"] == result.hyper else ""))
    return rows


def hyper_text(hyper: dict[str, Any]) -> str:
    """Hyper-parameters in a line."""
    return " ".join(f"{name}={value}" for name, value in hyper.items())


def markdown(found: dict[str, Any], steps: int) -> str:
    """The table for a README; what failed has its reason below."""
    shown = columns(found, steps)
    lines = ["| " + " | ".join(name.lstrip("#") for name, _ in shown) + " |"]
    lines.append("|" + "|".join(" ---: " if name.startswith("#") else " --- " for name, _ in shown) + "|")
    lines += ["| " + " | ".join(cell(row) for _, cell in shown) + " |" for row in found["rows"]]
    reasons = [f"- {row['method']}: {row['reason']}" for row in found["rows"] if row["reason"]]
    return "\n".join([*lines, *([""] if reasons else []), *reasons]) + "\n"


def curves(results: Sequence[Result]) -> dict[str, list[tuple[list[float], list[float]]]]:
    """(seconds, losses) of every run that has some, by method."""
    found = {r.method: [(run["seconds"], run["losses"]) for run in r.runs if run["losses"]] for r in results}
    return {method: runs for method, runs in found.items() if runs}


def spread_text(value: Spread | None, digits: int = 4) -> str:
    """A mean with its spread, if there is one."""
    if value is None:
        return ""
    mean, spread = value
    return f"{mean:.{digits}g}±{spread:.2g}" if spread else f"{mean:.{digits}g}"


def _mean(value: Spread | None, factor: float = 1.0) -> str:
    return "" if value is None else f"{value[0] * factor:.3g}"


def _bytes(value: int | None) -> str:
    return "" if value is None else size_text(value)
