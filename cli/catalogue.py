"""``fxcurv methods``, ``ops``, ``passes`` and ``kernels``: what there is, as a table or a page about one."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Annotated, Any, Optional

import typer

from fxcurv.cli.verb import Json
from fxcurv.errors import FxcurvError

Name = Annotated[Optional[str], typer.Argument(metavar="[NAME]", help="One of them, in full.")]  # noqa: UP045


def methods(name: Name = None, json: Json = False) -> None:
    """List the methods, or one with its equations and hyper-parameters."""
    from fxcurv.methods import PUBLISHED

    found = {
        key: {"name": key, "summary": m.summary, "papers": list(m.papers), "defaults": m.defaults, "doc": m.doc}
        for key, m in sorted(PUBLISHED.items())
    }
    _show("method", found, name, json, {"method": "name", "what": "summary", "papers": "papers"})


def ops(name: Name = None, json: Json = False) -> None:
    """List the ops of update programs, or one with its schema, traits and definition."""
    _show("op", found_ops(), name, json, {"op": "name", "schema": "schema", "traits": "traits", "what": "summary"})


def passes(name: Name = None, json: Json = False) -> None:
    """List the passes in the order in which they run, or one with its options."""
    columns = {"pass": "name", "what": "summary", "needs": "needs", "options": "defaults"}
    _show("pass", found_passes(), name, json, columns)


def kernels(
    name: Name = None,
    aot: Annotated[
        bool, typer.Option("--aot", help="Compile the generated kernels for sm_80, sm_90 and gfx942; no GPU is needed.")
    ] = False,
    every: Annotated[
        bool, typer.Option("--all", help="With --aot every variant, not only the representative ones.")
    ] = False,
    jobs: Annotated[int, typer.Option("--jobs", min=0, help="Processes for --aot; 0: one a core.")] = 0,
    json: Json = False,
) -> None:
    """List the kernels that may run in place of an op's reference, or one with its measurements.

    --aot compiles the representative variants of every generated kernel, or of the family NAME, and prints registers,
    spills, shared memory, tensor-core instructions and seconds, then the bytes that each variant moves beside the least
    that it must. Results are kept; the first run takes minutes, with --all an hour.
    """
    if aot:
        _compiled([name] if name else [], every, jobs, json)
        return
    columns = {"kernel": "name", "op": "op", "backend": "backend", "claims": "when", "how": "summary"}
    _show("kernel", found_kernels(), name, json, columns)


def found_ops() -> dict[str, dict[str, Any]]:
    """The ops by name: schema, traits, summary and doc."""
    import fxcurv.ir.ops  # noqa: F401
    from fxcurv.ir.op import OPS

    return {
        key: {
            "name": key,
            "schema": op.schema,
            "traits": sorted(trait.value for trait in op.traits),
            "summary": op.doc.partition("\n")[0],
            "doc": op.doc,
        }
        for key, op in sorted(OPS.items())
    }


def found_passes() -> dict[str, dict[str, Any]]:
    """The passes in their order: summary, needs, options ("defaults") and doc."""
    import dataclasses

    from fxcurv.passes import PIPELINE

    found = {}
    for step in PIPELINE:
        doc = inspect.getdoc(inspect.getmodule(type(step))) or ""
        options = {field.name: getattr(step, field.name) for field in dataclasses.fields(step)}
        summary = doc.partition("\n")[0].partition(": ")[2] or doc.partition("\n")[0]
        doc = f"{doc}\n\n{inspect.getdoc(type(step)) or ''}".strip()
        found[step.name] = {
            "name": step.name, "summary": summary, "needs": list(step.needs), "defaults": options, "doc": doc,
        }  # fmt: skip
    return found


def found_kernels() -> dict[str, dict[str, Any]]:
    """The kernels: op, backend, when they claim a node, summary and doc; a name that two have is spelled out."""
    from fxcurv.kernels.registry import BACKENDS, KERNELS, load

    for backend in BACKENDS:
        load(backend)
    found: dict[str, dict[str, Any]] = {}
    for kernel in KERNELS:
        doc = (kernel.doc or "").strip()
        entry = {
            "name": kernel.name,
            "op": kernel.op,
            "backend": kernel.backend,
            "when": " ".join((kernel.when.__doc__ or "").split()),
            "summary": " ".join(doc.split()).partition(". ")[0].rstrip("."),
            "doc": doc,
        }
        found[kernel.name if kernel.name not in found else f"{kernel.backend}.{kernel.op}.{kernel.name}"] = entry
    return found


def _compiled(names: list[str], every: bool, processes: int, json: bool) -> None:
    """What the compilers make of the generated kernels, and what they move."""
    import dataclasses
    import os
    from importlib.util import find_spec

    from fxcurv.cli import render

    if find_spec("triton") is None:
        raise FxcurvError("--aot needs the package triton: pip install triton.")
    from fxcurv.kernels import aot, traffic

    work = aot.jobs(names, quick=not every)
    progress = render.Counting("kernels compiled", len(work))
    with progress:
        binaries = []
        for found in aot.table(work, processes or os.cpu_count() or 1):
            binaries += found
            progress.advance()
        moved = list(traffic.table(work))
    if json:
        ratios = [{**dataclasses.asdict(one), "ratio": one.ratio, "intensity": one.intensity} for one in moved]
        render.print_json({"binaries": [dataclasses.asdict(one) for one in binaries], "traffic": ratios})
        return
    render.binaries(binaries)
    render.traffic(moved)


def _show(
    kind: str, found: Mapping[str, dict[str, Any]], name: str | None, json: bool, columns: dict[str, str]
) -> None:
    """A table of everything, or the page of one."""
    from fxcurv.cli import render

    if name is None:
        if json:
            render.print_json([{k: v for k, v in entry.items() if k != "doc"} for entry in found.values()])
        else:
            rows = [[text(e[key]) for key in columns.values()] for e in found.values()]
            render.table("", list(columns), rows, names=True)
        return
    if name not in found:
        near = difflib.get_close_matches(name, found, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(found)}."
        raise FxcurvError(f"there is no {kind} '{name}'; {hint}")
    entry = found[name]
    if json:
        render.print_json(entry)
        return
    render.heading(name + entry.get("schema", ""))
    render.line()
    render.line(inspect.cleandoc(entry["doc"]))
    render.line()
    rest = {key: value for key, value in entry.items() if key not in ("name", "schema", "summary", "doc", "defaults")}
    for key, value in rest.items():
        if value:
            render.line(f"{key}: {text(value)}")
    if entry.get("defaults"):
        title = "Hyper-parameters" if kind == "method" else "Options"
        render.table(title, ("name", "default"), [(key, text(value)) for key, value in entry["defaults"].items()])


def text(value: Any) -> str:
    """A value for reading: what it holds, with commas between."""
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value)
    return "none" if value is None else str(value)
