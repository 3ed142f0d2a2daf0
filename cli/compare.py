"""``fxcurv compare``: methods on the file's data under the same budget, as a table, curves and JSON."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from fxcurv.cli.verb import Backend, File, Frontend, Fused, Inputs, Json, LossName, OnlyLayers, Skip, counts
from fxcurv.errors import FxcurvError

Names = Optional[str]  # noqa: UP045
Grid = Optional[list[str]]  # noqa: UP045
Out = Optional[Path]  # noqa: UP045


def run(
    file: File,
    hyper: dict[str, Any],
    methods: Annotated[
        Names, typer.Option("--methods", "-m", help="Names with commas between, 'family' (of K-FAC), or 'all'.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", "-n", min=1, help="Of every method and seed.")] = 100,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Of weights, data and draws.")] = 1,
    grid: Annotated[
        Grid,
        typer.Option(
            "--grid",
            metavar="NAME=V,V",
            help="Values to search, or factors (lr=x0.3,x1,x3); repeatable; none: no search.",
        ),
    ] = None,
    out: Annotated[Out, typer.Option("--out", "-o", metavar="DIR", help="Write curves and JSON; keep runs.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Train again what DIR has kept.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table for a README.")] = False,
    loss: LossName = None,
    input: Inputs = None,
    frontend: Frontend = "auto",
    backend: Backend = "auto",
    layers: OnlyLayers = None,
    skip: Skip = None,
    fused: Fused = None,
    json: Json = False,
) -> None:
    """Train each method on the file's data under the same budget, and say what it reached, how fast, with what memory.

    Every method starts from the same weights and sees the same batches. Settings are the file's; without any, a short
    search by successive halving takes lr at 0.3, 1 and 3 times the method's default (or, where a KL clip decides the
    length of a step, the clip at 1, 10 and 100 times) and damping at 1 and 10 times.
    Methods take turns of five steps, so that what else slows the machine slows all alike; only steps are timed. A
    method that diverges or does not take the model is a row with the reason.

    state: bytes of curvature kept between steps; peak: most bytes of tensors alive in a step with everything due,
    beyond parameters and states. skipped: layers that kept their gradient or their previous factorisation. With -o DIR
    the same command goes on where Ctrl-C stopped it (DIR/runs), and DIR gets compare.json, compare.md and curves.png.
    """
    # Before torch is imported: its profiler warns of releases that allocated_peak knows how to count.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    from fxcurv.cli import render, standings
    from fxcurv.cli.contenders import chosen_methods, contenders, parse_grid
    from fxcurv.cli.contest import Contest
    from fxcurv.cli.lanes import ProgressLanes
    from fxcurv.cli.modelfile import load_model_file
    from fxcurv.cli.store import Store

    first = hyper.pop("seed", 0)
    names = chosen_methods(methods)
    axes = parse_grid(grid)
    source = load_model_file(file, input, loss, first)
    if source.function("batches") is None:
        raise FxcurvError(f"{source.path} has no 'batches(epoch)': define it to yield pairs (inputs, targets).")
    taking_part = contenders(source, names, hyper, axes)
    loaded = {first: source}

    def load(seed: int) -> Any:
        if seed not in loaded:
            loaded.clear()
            loaded[seed] = load_model_file(file, input, loss, seed)
        return loaded[seed]

    options = {
        "frontend": frontend, "backend": backend, "layers": layers, "skip": skip, "fused": counts(fused),
    }  # fmt: skip
    store = Store(out, source, file, loss, fresh)
    with ProgressLanes(names, steps, quiet=json) as lanes:
        contest = Contest(load, steps, range(first, first + seeds), options, store, lanes)
        try:
            results = contest.run(taking_part)
        except KeyboardInterrupt:
            if out is not None:
                typer.echo(f"what has been done is kept in {out}; the same command goes on from there", err=True)
            raise
    found = standings.standings(results, steps, contest.window)
    data = _data(source.path.name, steps, contest, found, results)
    written = _written(out, data, found, results, contest) if out is not None else []
    if json:
        render.print_json(data)
    elif markdown:
        typer.echo(standings.markdown(found, steps), nl=False)
    else:
        _show(source.path.name, steps, contest, found, results)
        for path in written:
            render.line(f"written to {path}")


def _data(name: str, steps: int, contest: Any, found: dict[str, Any], results: Any) -> dict[str, Any]:
    import dataclasses
    import platform

    import torch

    import fxcurv

    return {
        "file": name,
        "steps": steps,
        "seeds": list(contest.seeds),
        "window": contest.window,
        "versions": {
            "fxcurv": fxcurv.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        },
        "options": contest.options,
        **found,
        "methods": [dataclasses.asdict(result) for result in results],
    }


def _written(out: Path, data: dict[str, Any], found: dict[str, Any], results: Any, contest: Any) -> list[Path]:
    from fxcurv.cli import render, standings
    from fxcurv.cli.store import write, write_text
    from fxcurv.tools.plot import training_curves

    paths = [out / "compare.json", out / "compare.md", out / "curves.png"]
    write_text(paths[0], render.json_text(data))
    write_text(paths[1], standings.markdown(found, contest.steps))
    title = f"{data['file']}, {contest.steps} steps, mean of {contest.window}"
    try:
        write(paths[2], lambda path: training_curves(standings.curves(results), path, title, contest.window))
    except FxcurvError as error:  # without matplotlib the numbers are no less true
        typer.echo(f"warning: {error}", err=True)
        return paths[:2]
    return paths


def _show(name: str, steps: int, contest: Any, found: dict[str, Any], results: Any) -> None:
    from fxcurv.cli import render, standings

    shown = standings.columns(found, steps)
    many = f", {len(contest.seeds)} seeds (mean ± standard deviation)" if len(contest.seeds) > 1 else ""
    render.heading(f"{name}: {steps} steps{many}; losses are means of {contest.window} steps")
    render.table("", [title for title, _ in shown], [[cell(row) for _, cell in shown] for row in found["rows"]], True)
    for row in found["rows"]:
        if row["reason"]:
            render.paragraph(f"{row['method']}: {row['reason']}")
    if any(row["reason"] for row in found["rows"]):
        render.line()
    columns = ("method", "setting", "reached", "")
    render.table("Settings", columns, standings.settings(results), True)
