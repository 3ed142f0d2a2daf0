"""``fxcurv opt``: run passes on program text, for reading, for bisection, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer


def run(
    file: Annotated[str, typer.Argument(metavar="FILE.fxc", help="Program text; '-' reads standard input.")],
    passes: Annotated[str, typer.Option("--passes", "-p", help='E.g. "share,simplify" or "lower{backend=aten}".')] = "",
    print_between: Annotated[bool, typer.Option("--print-between", help="Print the program after every pass.")] = False,
    time: Annotated[bool, typer.Option("--time", help="Say on standard error what every pass did.")] = False,
    check: Annotated[bool, typer.Option("--verify/--no-verify", help="Check types after every pass.")] = True,
    numeric: Annotated[bool, typer.Option("--numeric", help="Compare results before and after every pass.")] = False,
    fuel: Annotated[Optional[int], typer.Option("--fuel", min=0, help="At most this many rewrites.")] = None,  # noqa: UP045
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="Write there, not to stdout.")] = None,  # noqa: UP045
) -> None:
    """Run passes on a program's text and print the result, which parses back."""
    import sys

    from fxcurv.cli import render
    from fxcurv.ir.text import parse_program
    from fxcurv.ir.verify import verify
    from fxcurv.passes import PASSES, Compilation, parse_pipeline, run_passes
    from fxcurv.runtime.artifact import read_program

    pipeline = parse_pipeline(passes, PASSES)
    program = parse_program(sys.stdin.read()) if file == "-" else read_program(Path(file))
    if check:
        verify(program, file)
    level = "numeric" if numeric else "types" if check else "none"
    compilation = Compilation(program=program, check=level, fuel=fuel)
    run_passes(compilation, pipeline)
    for record in compilation.history:
        if time:
            typer.echo(str(record), err=True)
        if print_between:
            render.source(record.text)
    text = program.text()
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
    elif not print_between or not pipeline:
        render.source(text)
