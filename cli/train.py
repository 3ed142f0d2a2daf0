"""``fxcurv train``: a model file on its own data, with live progress and resumable checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from fxcurv.cli.verb import Backend, File, Frontend, Fused, Inputs, Json, LossName, MethodName, OnlyLayers, Skip, counts

Count = Optional[int]  # noqa: UP045
Checkpoint = Optional[Path]  # noqa: UP045


def run(
    file: File,
    hyper: dict[str, Any],
    method: MethodName = "kfac",
    steps: Annotated[Count, typer.Option("--steps", "-n", min=1, help="Steps in all, earlier ones included.")] = None,
    epochs: Annotated[Count, typer.Option("--epochs", min=1, help="Passes over the data; 1 without --steps.")] = None,
    save: Annotated[Checkpoint, typer.Option("--save", help="Write a checkpoint at the end, and on Ctrl-C.")] = None,
    resume: Annotated[Checkpoint, typer.Option("--resume", help="Go on from a checkpoint.")] = None,
    loss: LossName = None,
    input: Inputs = None,
    frontend: Frontend = "auto",
    backend: Backend = "auto",
    layers: OnlyLayers = None,
    skip: Skip = None,
    fused: Fused = None,
    json: Json = False,
) -> None:
    """Train the model of a file on its 'batches', with the method's complete update rule.

    Defaults of a method come from the file's 'settings', then from the paper. Baselines: --method sgd, --method adam.
    """
    from fxcurv.cli import render
    from fxcurv.cli.build import build, split_hyper
    from fxcurv.cli.modelfile import load_model_file
    from fxcurv.cli.training import Training
    from fxcurv.errors import FxcurvError
    from fxcurv.runtime import optimizer

    if steps is not None and epochs is not None:
        raise FxcurvError("--steps and --epochs both say when to stop; give one of them.")
    source = load_model_file(file, input, loss, hyper.get("seed"))
    chosen = {"layers": layers, "skip": skip, "fused": counts(fused)}
    module = build(source, method, hyper, frontend=frontend, backend=backend, **chosen)
    opt = optimizer(module, **split_hyper(source, method, hyper)[1])
    training = Training(source, module, opt)
    if resume is not None:
        training.resume(resume)
    total = steps if steps is not None else training.steps_in(epochs or 1)
    with source.running(), render.TrainingProgress(total, training.step, quiet=json) as progress:
        try:
            training.run(total, progress.update)
        except KeyboardInterrupt:
            progress.finish()
            if save is not None:
                training.save(save)
                typer.echo(f"interrupted at step {training.step}; written to {save}", err=True)
            raise
    if save is not None:
        training.save(save)
    found = training.result()
    if json:
        render.print_json(found)
        return
    shown = {name: value for name, value in found.items() if name not in ("losses", "scores")}
    rows = [(name.replace("_", " "), _text(value)) for name, value in {**shown, **found["scores"]}.items()]
    render.table("", (str(source.path.name), method), rows)
    if save is not None:
        render.line(f"written to {save}")


def _text(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
