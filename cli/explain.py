"""``fxcurv explain``: what a method costs on a model, before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

from fxcurv.cli.verb import Backend, File, Frontend, Fused, Inputs, Json, LossName, MethodName, OnlyLayers, Skip, counts

DeviceName = Annotated[str, typer.Option("--device", help="cpu (measured here), a100, h100, h200 or mi300x.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="A row for every layer, and the whole critical path.")]


def run(
    file: File,
    hyper: dict[str, Any],
    method: MethodName = "kfac",
    device: DeviceName = "cpu",
    verbose: Verbose = False,
    loss: LossName = None,
    input: Inputs = None,
    frontend: Frontend = "auto",
    backend: Backend = "auto",
    layers: OnlyLayers = None,
    skip: Skip = None,
    fused: Fused = None,
    json: Json = False,
) -> None:
    """Estimate what a method costs: every step, when statistics and when refreshes are due.

    Operations, bytes, launches and time at roofline of every cadence, in units of a plain training step; memory; the
    critical path; and advice with numbers. They are for the first batch of the file's 'batches', else for its example
    inputs, or for --input. Costs are those of the code that would run, recorded on fake tensors; the
    first use measures this machine (fxcurv bench --calibrate repeats that).
    """
    from fxcurv.cli import render, tables
    from fxcurv.cli.build import build, first_batch
    from fxcurv.cli.modelfile import load_model_file
    from fxcurv.tools.devices import device as device_by_name
    from fxcurv.tools.explain import explain

    source = load_model_file(file, input, loss, hyper.get("seed"))
    batch = None if input else first_batch(source)
    if batch is not None and not isinstance(batch[0], dict):  # what a step really sees, not only what shows the shapes
        inputs = tuple(batch[0]) if isinstance(batch[0], (tuple, list)) else (batch[0],)
        source = replace(source, example_inputs=inputs)
    with render.working("measuring this machine"):
        chosen = device_by_name(device)
    module = build(
        source, method, hyper, frontend=frontend, backend=backend, layers=layers, skip=skip, fused=counts(fused)
    )
    with render.working("recording a step on fake tensors"), source.running():
        found = explain(module, chosen)
    if json:
        render.print_json(found)
    else:
        tables.explained(found, verbose)
