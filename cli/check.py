"""``fxcurv check``: is what was compiled right for this model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fxcurv.cli.verb import Backend, File, Frontend, Fused, Inputs, Json, LossName, MethodName, OnlyLayers, Skip, counts


def run(
    file: File,
    hyper: dict[str, Any],
    method: MethodName = "kfac",
    loss: LossName = None,
    input: Inputs = None,
    frontend: Frontend = "auto",
    backend: Backend = "auto",
    layers: OnlyLayers = None,
    skip: Skip = None,
    fused: Fused = None,
    strict: Annotated[bool, typer.Option("--strict", help="An uncovered parameter is a failure.")] = False,
    json: Json = False,
) -> None:
    """Check a compiled model: types, every pass numerically, the three proofs, a step, factors against dense blocks.

    Exits with 1 when a check fails. The distance of factors to the dense curvature is information: how good the
    method's approximation is on this model, for layers of up to 3000 parameters.
    """
    from fxcurv.cli import render
    from fxcurv.cli.checks import run_checks
    from fxcurv.cli.modelfile import load_model_file

    source = load_model_file(file, input, loss, hyper.get("seed"))
    options = {"frontend": frontend, "backend": backend, "layers": layers, "skip": skip, "fused": counts(fused)}
    checks = run_checks(source, method, hyper, options, strict)
    failed = any(check.status == "fail" for check in checks)
    if json:
        rows = [{"check": c.name, "status": c.status, "detail": c.detail, "value": c.value} for c in checks]
        render.print_json({"passed": not failed, "checks": rows})
    else:
        render.table("", ("check", "result", "detail"), [(c.name, c.status, c.detail) for c in checks])
    if failed:
        raise typer.Exit(1)
