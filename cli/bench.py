"""``fxcurv bench``: times of ops, methods and steps, printed only for results that are right."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from fxcurv.cli.verb import Backend, Frontend, Inputs, Json, LossName
from fxcurv.errors import FxcurvError

WHAT = ("ops", "methods", "step")
Names = Optional[list[str]]  # noqa: UP045
Out = Optional[Path]  # noqa: UP045


def run(
    hyper: dict[str, Any],
    what: Annotated[
        str, typer.Argument(metavar="[WHAT]", help="ops, methods, step, or a model file (methods).")
    ] = "ops",
    file: Annotated[Optional[str], typer.Argument(metavar="[FILE]", help="Model file; it is run.")] = None,  # noqa: UP045
    method: Annotated[str, typer.Option("--method", "-m", help="Methods, with commas between.")] = "kfac",
    op: Annotated[Names, typer.Option("--op", help="An op; repeatable.")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, or cuda where there is a GPU.")] = "cpu",
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Measurements of each side.")] = 20,
    threads: Annotated[int, typer.Option("--threads", min=0, help="Of the CPU; 0: as torch has it.")] = 0,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine for explain, and keep it.")
    ] = False,
    csv: Annotated[Out, typer.Option("--csv", help="Write the rows as CSV.")] = None,
    plot: Annotated[Out, typer.Option("--plot", help="Draw the times, e.g. times.png.")] = None,
    loss: LossName = None,
    input: Inputs = None,
    frontend: Frontend = "auto",
    backend: Backend = "auto",
    json: Json = False,
) -> None:
    """Measure, after comparing: no time is printed for a result that differs from the reference's.

    ops: each kernel against the op's reference. methods FILE: whole training steps as ratios to the plain step, each
    method on its own schedule. step FILE: one method's steps with nothing else, statistics, and a refresh due, beside
    the estimate of 'fxcurv explain'. Sides take turns; times are 20th, 50th and 80th percentiles.
    """
    import torch

    from fxcurv.cli import render, tables
    from fxcurv.tools.rows import BenchRow, to_csv

    if threads:
        torch.set_num_threads(threads)
    if calibrate:
        _calibrate(json)
        return
    if what not in WHAT:
        what, file = "methods", what
    if what != "ops" and file is None:
        raise FxcurvError(f"fxcurv bench {what} needs a model file: fxcurv bench {what} FILE --method kfac.")
    rows: list[BenchRow]
    with render.working("comparing, then measuring"):
        if what == "ops":
            from fxcurv.tools.bench_ops import bench_ops

            rows = list(bench_ops(op or (), device, rounds))
        else:
            options = {"frontend": frontend, "backend": backend}
            rows = _steps(what, str(file), method, hyper, loss, input, options, device, rounds)
    if csv is not None:
        csv.write_text(to_csv(rows), encoding="utf-8")
    if plot is not None:
        from fxcurv.tools.plot import plot as draw

        draw(rows, plot)
    if json:
        render.print_json([row.to_dict() for row in rows])
    else:
        tables.benched([row.to_dict() for row in rows])
    if any(row.status == "wrong" for row in rows):
        raise typer.Exit(1)


def _steps(
    what: str,
    file: str,
    method: str,
    hyper: dict[str, Any],
    loss: str | None,
    input: list[str] | None,
    options: dict[str, Any],
    device: str,
    rounds: int,
) -> list[Any]:
    from fxcurv.cli.build import hushed, split_hyper
    from fxcurv.cli.modelfile import load_model_file
    from fxcurv.tools.bench_steps import Workload, bench_methods, bench_step

    source = load_model_file(file, input, loss, hyper.get("seed"))
    names = [name.strip() for name in method.split(",") if name.strip()]
    chosen = {name: split_hyper(source, name, hyper)[0] for name in names}
    inputs, targets, loss_object = _batch(source)
    work = Workload(source.model, inputs, targets, loss_object, options, chosen)
    case = source.path.name
    with source.running(), hushed():
        if what == "methods":
            return list(bench_methods(work, names, device, rounds, case))
        return [row for name in names for row in bench_step(work, name, device, rounds, case)]


def _batch(source: Any) -> tuple[tuple[Any, ...], Any, Any]:
    """Inputs, targets and the loss object: the file's first batch, or example inputs with targets that fit."""
    import copy

    import torch

    from fxcurv.cli.build import first_batch
    from fxcurv.losses import CrossEntropy, resolve_loss

    loss = resolve_loss(source.loss)
    if loss is None:
        raise FxcurvError(f"{source.path} has no 'loss': define it, or pass --loss cross_entropy.")
    batch = first_batch(source)
    if batch is not None:
        inputs, targets = batch
        if isinstance(inputs, dict):
            raise FxcurvError(
                f"{source.path}: bench needs batches whose inputs are tensors in order, not a dictionary."
            )
        return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), targets, loss
    if source.example_inputs is None:
        raise FxcurvError(f"{source.path}: define 'batches' or 'example_inputs', or pass --input.")
    with source.running(), torch.no_grad():
        outputs = copy.deepcopy(source.model).eval()(*source.example_inputs)
    targets = outputs.argmax(dim=1) if isinstance(loss, CrossEntropy) else torch.zeros_like(outputs)
    return source.example_inputs, targets, loss


def _calibrate(json: bool) -> None:
    from fxcurv.cli import render, tables
    from fxcurv.tools.calibrate import measure, save

    with render.working("measuring this machine"):
        found = measure()
    path = save(found)
    if json:
        render.print_json({**found, "file": str(path)})
    else:
        tables.calibrated(found)
        render.line(f"kept in {path}")
