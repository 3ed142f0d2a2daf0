"""A picture of benchmark rows; matplotlib is optional."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fxcurv.errors import FxcurvError
from fxcurv.tools.rows import OK, BenchRow


def plot(rows: Sequence[BenchRow], path: Path) -> None:
    """Bars of median times with their 20th to 80th percentile, one a row, written to a file.

    Raises :class:`FxcurvError` without matplotlib, or for a kind of file that it cannot write.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise FxcurvError("--plot needs matplotlib, which is not installed: pip install matplotlib.") from None
    shown = [row for row in rows if row.status == OK and row.p50 is not None]
    labels = [f"{row.name} {row.side}" if row.name != row.side else row.name for row in shown]
    labels = [f"{label}\n{row.case}" if row.bench == "ops" else label for label, row in zip(labels, shown, strict=True)]
    middle = [1e3 * (row.p50 or 0.0) for row in shown]
    low = [1e3 * ((row.p50 or 0.0) - (row.p20 or 0.0)) for row in shown]
    high = [1e3 * ((row.p80 or 0.0) - (row.p50 or 0.0)) for row in shown]
    figure = Figure(figsize=(8, 1 + 0.4 * len(shown)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(shown)), middle, xerr=[low, high], color="tab:blue", ecolor="black")
    axes.set_yticks(range(len(shown)), labels, fontsize=8)
    axes.invert_yaxis()
    if middle and max(middle) > 50 * min(middle):
        axes.set_xscale("log")
    axes.set_xlabel("ms (median, 20th to 80th percentile)")
    for place, row in enumerate(shown):
        if row.ratio is not None:
            axes.annotate(f" {row.ratio:.2f}x", (middle[place], place), va="center", fontsize=8)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise FxcurvError(f"--plot {path}: {error}.") from None
