"""``fxcurv compile``: from a model file to an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from fxcurv.cli.verb import Backend, File, Frontend, Fused, Inputs, Json, LossName, MethodName, OnlyLayers, Skip, counts

Output = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--output", "-o", help="Folder to write; default: FILE-METHOD.fxcurv here.", show_default=False),
]
Disable = Annotated[Optional[list[str]], typer.Option("--disable", help="A pass to leave out; repeatable.")]  # noqa: UP045


def run(
    file: File,
    hyper: dict[str, Any],
    method: MethodName = "kfac",
    output: Output = None,
    loss: LossName = None,
    input: Inputs = None,
    frontend: Frontend = "auto",
    backend: Backend = "auto",
    layers: OnlyLayers = None,
    skip: Skip = None,
    fused: Fused = None,
    strict: Annotated[bool, typer.Option("--strict", help="An uncovered parameter is an error.")] = False,
    disable: Disable = None,
    rows: Annotated[int, typer.Option("--rows", min=0, help="Rows that costs are counted for; 0: the batch.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact that was edited by hand.")] = False,
    json: Json = False,
) -> None:
    """Compile a model file: find layers, build and optimise the update program, write both graphs to a folder.

    Compiling runs the file. An older artifact in the folder is replaced.
    """
    from fxcurv.cli import render
    from fxcurv.cli.build import build
    from fxcurv.cli.modelfile import load_model_file
    from fxcurv.runtime.artifact import read_report, save

    source = load_model_file(file, input, loss, hyper.get("seed"))
    module = build(
        source, method, hyper, frontend=frontend, backend=backend, layers=layers, skip=skip, strict=strict,
        fused=counts(fused), disable=disable or (),
    )  # fmt: skip
    folder = save(module, output or Path(f"{source.path.stem}-{method}.fxcurv"), force=force, rows=rows)
    found = read_report(folder)
    if json:
        render.print_json({**found, "folder": str(folder)})
        return
    summary(found)
    render.line(f"written to {folder}; train on from it with fxcurv.load({str(folder)!r}, model)")


def summary(found: dict[str, Any]) -> None:
    """Print a description: layers, what is uncovered and why, graphs, passes, memory and cost."""
    from fxcurv.cli import render

    report, forward, program = found["report"], found["forward"], found["program"]
    by = f", captured by {forward['frontend']}" if forward["frontend"] else ""
    render.heading(f"{report['method']}: curvature from {report['fisher']}{by}")
    for note in report["notes"]:
        render.line(f"note: {note}")
    render.line()
    if found["layers"]:
        render.layers(found)
    render.line(f"{100 * report['covered']:.1f} % of the trainable elements are preconditioned.")
    render.uncovered(found)
    render.table(
        "Graphs",
        ("graph", "#nodes", "what crosses its border"),
        [
            ("forward", forward["nodes"] or "-", f"{forward['taps']} taps with {forward['slots']} slots"),
            ("update program", program["nodes"], ", ".join(f"{n} {kind}" for kind, n in program["inputs"].items())),
        ],
    )
    render.passes(found)
    rest = sum(count for name, count in found["kernels"].items() if name.endswith("_reference"))
    claimed = [(name, count) for name, count in found["kernels"].items() if not name.endswith("_reference")]
    render.table("Kernels", ("kernel", "#nodes"), [*claimed, ("(plain torch)", rest)])
    render.cost(found["cost"])
    memory = found["memory"]
    states, parameters = render.bytes_text(memory["states"]), render.bytes_text(memory["parameters"])
    render.line(f"states take {states}, parameters {parameters}")
