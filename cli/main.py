"""The ``fxcurv`` command: its verbs and how they fail.

Importing this must stay cheap (``fxcurv --help`` answers without torch), so verbs import what they need when they run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from fxcurv.cli import approx, bench, catalogue, check, compare, compile, docs, explain, inspect, opt, papers, train
from fxcurv.cli.verb import verb

EPILOG = (
    "A model file is Python and is run. It defines 'model' or 'build_model()', and optionally 'example_inputs', "
    "'loss', 'batches(epoch)', 'evaluate(model)', 'prepare(model)' and 'settings'; see the examples."
)

app = typer.Typer(
    name="fxcurv",
    help="Curvature for PyTorch by rewriting graphs: second-order optimisers as compiled programs.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

VERBS: dict[str, dict[str, Callable[..., None]]] = {
    "Compile and train": {
        "compile": compile.run,
        "train": train.run,
        "compare": compare.run,
        "approx": approx.run,
        "inspect": inspect.run,
        "explain": explain.run,
        "bench": bench.run,
        "check": check.run,
        "opt": opt.run,
    },
    "What there is": {
        "methods": catalogue.methods,
        "papers": papers.run,
        "ops": catalogue.ops,
        "passes": catalogue.passes,
        "kernels": catalogue.kernels,
        "docs": docs.run,
    },
}
for panel, verbs in VERBS.items():
    for name, function in verbs.items():
        app.command(name, rich_help_panel=panel)(verb(function))


def _version(show: bool) -> None:
    if show:
        import fxcurv

        typer.echo(f"fxcurv {fxcurv.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Curvature for PyTorch by rewriting graphs: second-order optimisers as compiled programs."""


def main() -> None:
    """Entry point of the ``fxcurv`` script."""
    app()
