"""``fxcurv approx``: each method's curvature of a layer beside the exact block."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from fxcurv.cli.verb import Backend, File, Frontend, Inputs, Json, LossName, OnlyLayers
from fxcurv.errors import FxcurvError

Names = Optional[str]  # noqa: UP045
Count = Optional[int]  # noqa: UP045
Out = Optional[Path]  # noqa: UP045
USUAL = ("diag", "kfac", "ekfac", "tkfac", "tekfac", "kpsvd", "deflation", "lanczos", "kfac_corrected", "foof", "eva")


def run(
    file: File,
    hyper: dict[str, Any],
    methods: Annotated[
        Names, typer.Option("--methods", "-m", help="Names with commas between, 'family' (of K-FAC), or 'all'.")
    ] = None,
    batch: Annotated[Count, typer.Option("--batch", min=1, help="Examples of the first batch; all of it.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Largest d_out * d_in of a dense block.")] = 2000,
    out: Annotated[Out, typer.Option("--out", "-o", metavar="DIR", help="Write approx.json and spectra.png.")] = None,
    loss: LossName = None,
    input: Inputs = None,
    frontend: Frontend = "auto",
    backend: Backend = "auto",
    layers: OnlyLayers = None,
    json: Json = False,
) -> None:
    """Measure how far each method's curvature is from the exact block, layer by layer.

    On one batch of the file, in float64 and evaluation mode, the exact block C of the mean loss's Gauss-Newton matrix
    (--fisher empirical: of the empirical Fisher) comes from plain autograd. Methods take their statistics from that
    batch alone and, where they have a choice, exactly, so that the difference is the structure and not the sampling;
    the column statistics says what they took.

    error: of the block, relative, in Frobenius norm. solve: of (block + damping I)^-1 gradient against the exact one,
    as cosine and relative error. own: the same for the direction that the method takes by its own way of damping.
    trace: in units of the exact one. condition: of the damped block. One --damping (0.001) for all.
    """
    from fxcurv.cli import render
    from fxcurv.cli.contenders import chosen_methods
    from fxcurv.cli.modelfile import load_model_file
    from fxcurv.methods import PUBLISHED
    from fxcurv.tools.approx import approximations

    names = chosen_methods(methods) if methods else tuple(name for name in USUAL if name in PUBLISHED)
    kind, damping = str(hyper.pop("fisher", "ggn")), float(hyper.pop("damping", 1e-3))
    if damping <= 0:
        raise FxcurvError(f"--damping {damping}: it must be above 0, since blocks are singular.")
    source = load_model_file(file, input, loss, hyper.pop("seed", 0))
    unknown = [name for name in hyper if not any(name in PUBLISHED[method].defaults for method in names)]
    if unknown:
        raise FxcurvError(f"none of the methods has a hyper-parameter '{unknown[0]}'.")
    chosen = {method: _settings(source, method, hyper) for method in names}
    taken = _batch(source, batch)
    with render.Saying() as say, source.running():
        found = approximations(
            source.model.double().eval(),
            taken,
            chosen,
            example_inputs=_doubled(source.example_inputs),
            kind=kind,
            damping=damping,
            limit=limit,
            patterns=layers or (),
            options={"frontend": frontend, "backend": backend},
            report=say,
        )
    data = {"file": source.path.name, **found.to_dict()}
    if json:
        render.print_json(data)
    else:
        _show(source.path.name, found)
    if out is not None:
        for path in _written(out, data, found, source.path.name):
            if not json:
                render.line(f"written to {path}")


def _settings(source: Any, method: str, given: dict[str, Any]) -> dict[str, Any]:
    """What makes the structure: the file's settings without what is the same for all methods, and the given ones."""
    from fxcurv.methods import PUBLISHED
    from fxcurv.tools.approx import ALONE

    fixed = {*ALONE, "fisher", "fisher_samples", "damping"}
    known = PUBLISHED[method].defaults
    kept = {name: value for name, value in source.settings.get(method, {}).items() if name not in fixed}
    return {name: value for name, value in {**kept, **given}.items() if name in known}


def _batch(source: Any, count: int | None) -> Any:
    """The first examples of the file's first batch, in float64."""
    from fxcurv.cli.build import call_model, first_batch
    from fxcurv.losses import resolve_loss
    from fxcurv.tools.exact import Batch

    loss = resolve_loss(source.loss)
    if loss is None:
        raise FxcurvError(f"{source.path} has no 'loss': define it, or pass --loss cross_entropy.")
    pair = first_batch(source)
    if pair is None:
        raise FxcurvError(f"{source.path} has no 'batches(epoch)': define it to yield pairs (inputs, targets).")
    inputs, targets = (_doubled(_first(part, count)) for part in pair)
    return Batch(lambda model: call_model(model, inputs), targets, loss)


def _first(value: Any, count: int | None) -> Any:
    """The first ``count`` examples of tensors within tuples, lists and dictionaries."""
    from torch import Tensor

    if count is None:
        return value
    if isinstance(value, Tensor):
        return value[:count] if value.ndim else value
    return _inside(value, lambda part: _first(part, count))


def _doubled(value: Any) -> Any:
    """Floating-point tensors within tuples, lists and dictionaries, in float64."""
    from torch import Tensor

    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return _inside(value, _doubled)


def _inside(value: Any, change: Any) -> Any:
    if isinstance(value, dict):
        return {name: change(part) for name, part in value.items()}
    return type(value)(change(part) for part in value) if isinstance(value, (tuple, list)) else value


def _written(out: Path, data: dict[str, Any], found: Any, name: str) -> list[Path]:
    from fxcurv.cli import render
    from fxcurv.cli.store import write, write_text
    from fxcurv.tools.plot import spectra

    paths = [out / "approx.json", out / "spectra.png"]
    write_text(paths[0], render.json_text(data))
    try:
        write(paths[1], lambda path: spectra(found.spectra(), path, f"{name}: eigenvalues of the blocks"))
    except FxcurvError as error:  # without matplotlib the numbers are no less true
        typer.echo(f"warning: {error}", err=True)
        return paths[:1]
    return paths


def _show(name: str, found: Any) -> None:
    from fxcurv.cli import render

    what = "Gauss-Newton" if found.kind == "ggn" else "empirical Fisher"
    render.heading(f"{name}: exact {what} blocks over {found.terms:.0f} loss terms, damping {found.damping:g}")
    columns = (
        "method", "statistics", "#error", "#solve cosine", "#error", "#own cosine", "#error", "#trace", "#condition",
        "#largest", "#smallest",
    )  # fmt: skip
    reasons: dict[tuple[str, str], list[str]] = {}
    for layer in dict.fromkeys(row.layer for row in found.rows):
        rows = [row for row in found.rows if row.layer == layer]
        shape = " x ".join(str(size) for size in rows[0].shape)
        title = f"{layer or '(the model)'}: {rows[0].kind}, {shape}"
        render.table(title, columns, [_cells(row) for row in rows], True)
        for row in rows:
            if row.reason:
                reasons.setdefault((row.method, row.reason), []).append(layer or "(the model)")
    for (method, reason), where in reasons.items():
        render.paragraph(f"{method} ({', '.join(where)}): {reason}")
    for layer, reason in found.left_out:
        render.paragraph(f"{layer or '(the model)'} is not measured: {reason}")


def _cells(row: Any) -> list[str]:
    values = row.eigenvalues
    ends = [_number(values[-1]), _number(values[0])] if values else ["", ""]
    return [
        row.method, row.source, _number(row.error), _number(row.cosine, 4), _number(row.solve_error),
        _number(row.own_cosine, 4), _number(row.own_error), _number(row.trace), _number(row.condition), *ends,
    ]  # fmt: skip


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}"
