"""Pictures: times of benchmark rows, curves of trainings, spectra of curvature. matplotlib is optional."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fxcurv.errors import FxcurvError
from fxcurv.tools.rows import OK, BenchRow


def plot(rows: Sequence[BenchRow], path: Path) -> None:
    """Bars of median times with their 20th to 80th percentile, one a row, written to a file.

    Raises :class:`FxcurvError` without matplotlib, or for a kind of file that it cannot write.
    """
    figure_class = _figure_class()
    shown = [row for row in rows if row.status == OK and row.p50 is not None]
    labels = [f"{row.name} {row.side}" if row.name != row.side else row.name for row in shown]
    labels = [f"{label}\n{row.case}" if row.bench == "ops" else label for label, row in zip(labels, shown, strict=True)]
    middle = [1e3 * (row.p50 or 0.0) for row in shown]
    low = [1e3 * ((row.p50 or 0.0) - (row.p20 or 0.0)) for row in shown]
    high = [1e3 * ((row.p80 or 0.0) - (row.p50 or 0.0)) for row in shown]
    figure = figure_class(figsize=(8, 1 + 0.4 * len(shown)), layout="constrained")
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
    _write(figure, path)


Curve = tuple[Sequence[float], Sequence[float]]  # seconds since the start, and the loss, of every step


def training_curves(runs: Mapping[str, Sequence[Curve]], path: Path, title: str = "", window: int = 1) -> None:
    """Losses by step and by second, a colour a method and a line a seed, each the mean of the last ``window`` steps.

    Raises :class:`FxcurvError` like :func:`plot`.
    """
    figure = _figure_class()(figsize=(12, 5), layout="constrained")
    by_step, by_second = figure.subplots(1, 2, sharey=True)
    losses: list[float] = []
    for place, (method, curves) in enumerate(runs.items()):
        for k, (seconds, values) in enumerate(curves):
            mean = [sum(values[max(0, i - window) : i]) / min(i, window) for i in range(1, len(values) + 1)]
            style = {"color": f"C{place % 10}", "linestyle": ("-", "--", ":")[place // 10 % 3], "linewidth": 1.3}
            by_step.plot(range(1, len(mean) + 1), mean, label=None if k else method, **style)
            by_second.plot(seconds, mean, **style)
            losses += [value for value in mean if value == value and value != float("inf")]
    for axes, label in ((by_step, "step"), (by_second, "seconds of stepping")):
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        if losses and min(losses) > 0 and max(losses) > 3 * min(losses):
            axes.set_yscale("log")
    if losses:
        starts = [values[0] for curves in runs.values() for _, values in curves]
        by_step.set_ylim(top=1.2 * max(starts))  # what runs away is not the scale of the others
    totals = [seconds[-1] for curves in runs.values() for seconds, _ in curves if len(seconds)]
    if totals and max(totals) > 10 * min(totals):
        by_second.set_xscale("log")
    by_step.set_ylabel("loss")
    figure.legend(fontsize=8, loc="outside right upper")  # beside the panels: many methods would hide their curves
    figure.suptitle(title)
    _write(figure, path)


def spectra(layers: Mapping[str, Mapping[str, Sequence[float]]], path: Path, title: str = "") -> None:
    """Eigenvalues in descending order, a panel a layer and a line a method; the one called "exact" is black and wide.

    Eigenvalues that are not positive cannot be shown on the logarithmic scale and are left out. Raises
    :class:`FxcurvError` like :func:`plot`.
    """
    across = min(3, max(1, len(layers)))
    down = -(-max(1, len(layers)) // across)
    figure = _figure_class()(figsize=(5 * across, 4 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    methods = list(dict.fromkeys(name for found in layers.values() for name in found))
    styles: dict[str, dict[str, Any]] = {
        name: {"color": f"C{k % 10}", "linestyle": ("-", "--", ":")[k // 10 % 3], "linewidth": 1.2}
        for k, name in enumerate(name for name in methods if name != "exact")
    }
    styles["exact"] = {"color": "black", "linewidth": 2.4, "alpha": 0.6}
    for axes, (layer, found) in zip(panels.flat, layers.items(), strict=False):
        for name in methods:
            values = [(i, v) for i, v in enumerate(sorted(found.get(name, ()), reverse=True), 1) if v > 0]
            if values:
                axes.plot(*zip(*values, strict=True), label=name, **styles[name])
        axes.set_yscale("log")
        largest = max((v for values in found.values() for v in values), default=1.0)
        axes.set_ylim(bottom=1e-10 * largest)  # below it is rounding
        axes.set_title(layer or "(the model)", fontsize=9)
        axes.set_xlabel("index")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("eigenvalue")
    panels[0][0].legend(fontsize=8)
    for axes in panels.flat[len(layers) :]:
        axes.set_axis_off()
    figure.suptitle(title)
    _write(figure, path)


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise FxcurvError("a picture needs matplotlib, which is not installed: pip install matplotlib.") from None
    return Figure


def _write(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise FxcurvError(f"--plot {path}: {error}.") from None
