"""What every verb has in common: hyper-parameter options, ``--debug``, and errors in one line.

A verb is a plain function with typer annotations. A parameter called ``hyper`` becomes the options of HYPER (one table
for all verbs) and ``--set``; the verb gets the given ones as one dictionary.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Optional, get_type_hints

import typer

from fxcurv.errors import FxcurvError, FxcurvWarning

PANEL = "Hyper-parameters (defaults: fxcurv methods NAME)"
HYPER: dict[str, tuple[type, str]] = {
    "damping": (float, "Added to the curvature."),
    "ema": (float, "Weight of the old curvature; 0 uses this batch only."),
    "factor_every": (int, "Steps between statistics."),
    "solve_every": (int, "Steps between factorisations."),
    "fisher": (str, "mc, ggn, ggn_signs, logits, logits_mc or empirical."),
    "fisher_samples": (int, "Label draws or probes."),
    "kl_clip": (str, "Largest change of the predictions in a step; 'none' for no limit."),
    "lr": (float, "Learning rate."),
    "momentum": (float, "Of the optimizer."),
    "weight_decay": (float, "Of the optimizer; see --set decay=."),
    "max_factor_dim": (int, "A wider factor is kept diagonal."),
    "sharing": (str, "Positions of a shared weight: expand or reduce."),
    "seed": (int, "Of weights, label sampling and probes."),
}

File = Annotated[
    str,
    typer.Argument(metavar="FILE[:NAME]", help="Python file with the model; it is run. NAME: a module or a function."),
]
MethodName = Annotated[str, typer.Option("--method", "-m", help="A method of 'fxcurv methods'.")]
Inputs = Annotated[
    Optional[list[str]],  # noqa: UP045  (typer reads this at run time, on Python 3.10 too)
    typer.Option("--input", "-i", help='Example inputs, e.g. "f32[8,3,32,32]" or "i64[8,16]<100".', metavar="SPEC"),
]
LossName = Annotated[Optional[str], typer.Option("--loss", help="cross_entropy, bce, mse or gaussian.")]  # noqa: UP045
Frontend = Annotated[str, typer.Option("--frontend", help="auto, symbolic, export or dynamo.")]
Backend = Annotated[str, typer.Option("--backend", help="auto, aten, triton or reference kernels.")]
Patterns = Optional[list[str]]  # noqa: UP045
OnlyLayers = Annotated[Patterns, typer.Option("--layers", help="Patterns of layer names or kinds; repeatable.")]
Skip = Annotated[Patterns, typer.Option("--skip", help="Patterns of layers that keep their gradient; repeatable.")]
Fused = Annotated[
    Patterns,
    typer.Option("--fused", metavar="PATTERN=N", help="Divide the outputs of layers into N layers; repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """A typer command from a verb's function."""
    hints = get_type_hints(function, include_extras=True)
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "hyper":
            parameters += _hyper_options()
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name], kind=parameter.KEYWORD_ONLY))
    debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
    parameters.append(inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=debug))
    takes_hyper = "hyper" in hints

    @functools.wraps(function)
    def command(**options: Any) -> None:
        debug = options.pop("debug")
        with reported(debug):
            if takes_hyper:
                options["hyper"] = _collect(options)
            function(**options)

    del command.__wrapped__  # type: ignore[attr-defined]  # typer must see the signature made here
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _hyper_options() -> list[inspect.Parameter]:
    made = []
    for name, (kind, text) in HYPER.items():
        option = typer.Option(f"--{name.replace('_', '-')}", help=text, rich_help_panel=PANEL, show_default=False)
        made.append((name, Annotated[Optional[kind], option]))  # type: ignore[valid-type]  # noqa: UP045
    more = typer.Option("--set", metavar="NAME=VALUE", help="Any other; repeatable.", rich_help_panel=PANEL)
    made.append(("set_", Annotated[Optional[list[str]], more]))  # noqa: UP045
    keyword = inspect.Parameter.KEYWORD_ONLY
    return [inspect.Parameter(name, keyword, default=None, annotation=annotation) for name, annotation in made]


def _collect(options: dict[str, Any]) -> dict[str, Any]:
    """The given hyper-parameters, taken out of the options of a command."""
    given = {name: options.pop(name) for name in HYPER}
    hyper = {name: value for name, value in given.items() if value is not None}
    if "kl_clip" in hyper:
        hyper["kl_clip"] = literal("kl_clip", hyper["kl_clip"])
    for text in options.pop("set_") or []:
        name, equals, value = text.partition("=")
        if not equals or not name.strip().isidentifier():
            raise FxcurvError(f"--set {text}: write NAME=VALUE, for example --set damping=0.01.")
        hyper[name.strip()] = literal(name.strip(), value.strip())
    return hyper


def counts(given: list[str] | None) -> dict[str, int] | None:
    """``--fused`` options as a dictionary."""
    found = {}
    for text in given or []:
        pattern, equals, count = text.rpartition("=")
        if not equals or not pattern or not count.isdecimal():
            raise FxcurvError(f"--fused {text}: write PATTERN=N, for example --fused '*.qkv=3'.")
        found[pattern] = int(count)
    return found or None


def literal(name: str, text: str) -> Any:
    """A number, true, false, none, or the text itself."""
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if name == "kl_clip":
            raise FxcurvError(f"--kl-clip {text}: give a number or none.") from None
        return text


@contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Print errors and fxcurv's warnings as one line each; with ``debug`` the traceback too."""
    plain, stream = warnings.showwarning, sys.stderr  # a verb may hold back what others print there

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, FxcurvWarning):
            typer.echo(f"warning: {message}", file=stream)
        else:
            plain(message, category, *rest, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", FxcurvWarning)
        warnings.showwarning = show
        try:
            yield
        except FxcurvError as error:
            _fail(error, str(error), debug)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            sys.stderr.close()
            raise typer.Exit(1) from None
        except (typer.Exit, typer.Abort):
            raise
        except OSError as error:
            _fail(error, f"{error.filename or 'a file'}: {error.strerror or error}.", debug)
        except Exception as error:
            _fail(error, f"unexpected {type(error).__name__}: {error} (--debug shows where).", debug)


def _fail(error: Exception, message: str, debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exception(error)
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise typer.Exit(1) from error
