"""``fxcurv inspect``: look at either graph, at any stage."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from fxcurv.cli.verb import Backend, Frontend, Fused, Inputs, Json, LossName, MethodName, OnlyLayers, Skip, counts
from fxcurv.errors import FxcurvError

GRAPHS = ("forward", "program", "both")
Source = Annotated[
    str, typer.Argument(metavar="FILE", help="Model file (it is run), artifact folder, or program text (.fxc).")
]
PassName = Optional[str]  # noqa: UP045


def run(
    file: Source,
    hyper: dict[str, Any],
    method: MethodName = "kfac",
    graph: Annotated[str, typer.Option("--graph", help="forward, program or both.")] = "both",
    after: Annotated[PassName, typer.Option("--after", help="The program after this pass.")] = None,
    diff: Annotated[PassName, typer.Option("--diff", help="What this pass changed.")] = None,
    coverage: Annotated[
        bool, typer.Option("--coverage", help="How every parameter is treated; with --json one row for each.")
    ] = False,
    kernels: Annotated[bool, typer.Option("--kernels", help="The sources of the generated kernels.")] = False,
    html: Annotated[Optional[Path], typer.Option("--html", help="Write the report as a page.")] = None,  # noqa: UP045
    loss: LossName = None,
    input: Inputs = None,
    frontend: Frontend = "auto",
    backend: Backend = "auto",
    layers: OnlyLayers = None,
    skip: Skip = None,
    fused: Fused = None,
    json: Json = False,
) -> None:
    """Print the tapped forward graph and the update program, after any pass, or what a pass changed.

    --coverage prints how every trainable parameter is treated: layers by kind, use, shape and memory, and for what is
    left out the reason, the nodes on its way and the line of code. Its --json has a stable schema: rows (parameter,
    tensor, elements, layer, kind, shape, uses, statistic, status, reason, source, chain, state_bytes, shared_bytes,
    transient_bytes), covered (share of elements), kinds (layers, elements, share), state_bytes, transient_bytes,
    method, fisher, frontend, notes.
    """
    from fxcurv.cli import render

    if graph not in GRAPHS:
        raise FxcurvError(f"--graph {graph}: choose one of {', '.join(GRAPHS)}.")
    path = Path(file)
    if path.is_dir():
        view = _from_artifact(path)
    elif path.suffix == ".fxc":
        view = _from_program(path)
    else:
        options = {"frontend": frontend, "backend": backend, "layers": layers, "skip": skip, "fused": counts(fused)}
        view = _from_model(file, method, hyper, loss, input, options)
    if html is not None:
        if not view["html"]:
            raise FxcurvError("--html needs a model file or an artifact: program text alone has no report.")
        html.write_text(view["html"], encoding="utf-8")
        render.line(f"written to {html}")
    elif kernels:
        _show_kernels(view["kernels"], json)
    elif diff is not None:
        _show_diff(view, diff, json)
    elif after is not None:
        text = _text_after(view, after)[1]
        if json:
            render.print_json({"after": after, "program": text})
        else:
            render.source(text)
    elif coverage:
        if not view["report"]:
            raise FxcurvError("--coverage needs a model file or an artifact: program text alone names no model.")
        if json:
            render.print_json(view["report"]["report"])
        else:
            render.coverage(view["report"])
    elif json:
        shown = {"forward": view["forward"], "program": view["program"]}
        parts = shown if graph == "both" else {graph: shown[graph]}
        render.print_json({**parts, "report": view["report"], "cost": view["cost"]})
    else:
        _show(view, graph)


def _show(view: dict[str, Any], graph: str) -> None:
    from fxcurv.cli import render

    if graph in ("forward", "both") and view["forward"]:
        render.source(view["forward"])
        render.line()
    if graph in ("program", "both"):
        render.source(view["program"])
        render.line()
        if graph == "both":
            render.cost(view["cost"])


def _show_kernels(sources: dict[str, str], json: bool) -> None:
    from fxcurv.cli import render

    if json:
        render.print_json(sources)
        return
    if not sources:
        render.line("no kernel was generated: without a GPU they are with --backend triton")
    for name, text in sources.items():
        render.heading(name)
        render.source(text)
        render.line()


def _show_diff(view: dict[str, Any], name: str, json: bool) -> None:
    from fxcurv.cli import render
    from fxcurv.runtime.pages import diff_lines

    before, after = _text_after(view, name)
    lines = diff_lines(before, after, name)
    if json:
        render.print_json({"pass": name, "diff": lines})
    elif lines:
        render.diff(lines)
    else:
        render.line(f"{name} left the program's text as it was")


def _text_after(view: dict[str, Any], name: str) -> tuple[str, str]:
    """The program's text before and after a pass."""
    texts: list[tuple[str, str]] = view["history"]
    index = next((i for i, (step, _) in enumerate(texts) if step == name), None)
    if index is None:
        ran = ", ".join(step for step, _ in texts) or "none on program text: see fxcurv opt"
        raise FxcurvError(f"no pass '{name}' ran here; those that did: {ran}.")
    return (texts[index - 1][1] if index else ""), texts[index][1]


def _from_model(
    file: str, method: str, hyper: dict[str, Any], loss: str | None, inputs: list[str] | None, options: dict[str, Any]
) -> dict[str, Any]:
    from fxcurv.cli.build import build
    from fxcurv.cli.modelfile import load_model_file
    from fxcurv.runtime.describe import describe
    from fxcurv.runtime.pages import forward_page, generated, html_page

    module = build(load_model_file(file, inputs, loss, hyper.get("seed")), method, hyper, **options)
    report = describe(module)
    return {
        "forward": forward_page(module),
        "program": module.program.text(),
        "history": [(record.name, record.text) for record in module.history],
        "kernels": {kernel.source.name: kernel.source.text for kernel in generated(module)},
        "report": report,
        "cost": report["cost"],
        "html": html_page(module, report),
    }


def _from_artifact(folder: Path) -> dict[str, Any]:
    from fxcurv.runtime.artifact import PROGRAM, read_program, read_report

    report = read_report(folder)
    text, history = "", []
    for entry in report["passes"]:
        text = (folder / entry["file"]).read_text(encoding="utf-8").rstrip() if entry["file"] else text
        history.append((entry["name"], text))
    return {
        "forward": (folder / "forward.py").read_text(encoding="utf-8"),
        "program": read_program(folder / PROGRAM).text(),
        "history": history,
        "kernels": _generated_files(folder, report["files"]),
        "report": report,
        "cost": report["cost"],
        "html": (folder / "report.html").read_text(encoding="utf-8"),
    }


def _generated_files(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """The generated sources of an artifact; kernels of other backends lie beside them under the backend's name."""
    paths = [folder / name for name in files if name.startswith("kernels/") and not name.startswith("kernels/aten_")]
    return {path.stem: path.read_text(encoding="utf-8") for path in paths}


def _from_program(path: Path) -> dict[str, Any]:
    from fxcurv.ir.verify import verify
    from fxcurv.runtime.artifact import read_program
    from fxcurv.runtime.describe import cost

    program = read_program(path)
    verify(program, str(path))
    return {
        "forward": "", "program": program.text(), "history": [], "kernels": {}, "report": None,
        "cost": cost(program, 1), "html": "",
    }  # fmt: skip
