"""``fxcurv docs``: the reference pages, generated from docstrings and registries."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from fxcurv.cli.verb import Json
from fxcurv.errors import FxcurvError

FORMATS = ("md", "html")
_SPECIAL = re.compile(r"[<*]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|\](?=\()")
_CODE = re.compile(r"``(.+?)``|:\w+:`~?([^`]+)`")


def run(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write into.")],
    format: Annotated[str, typer.Option("--format", "-f", help="md or html.")] = "md",
    json: Json = False,
) -> None:
    """Write the reference: a page a method, pages of operations, passes, kernels, commands and papers, and an index.

    A method's page has its idea and equations, its hyper-parameters with defaults, cost, when to choose it, source, the
    papers with the tests that show them, and its program for one linear layer. Files of the same names are replaced.
    """
    from fxcurv.cli import render
    from fxcurv.cli.docpages import pages
    from fxcurv.cli.main import VERBS
    from fxcurv.cli.store import write_text

    if format not in FORMATS:
        raise FxcurvError(f"--format {format}: choose one of {', '.join(FORMATS)}.")
    template = _template(format)
    with render.Saying() as say:
        found = pages(VERBS, say)
    written = []
    for page in found:
        path = out / f"{page.name}.{format}"
        write_text(path, template.render(page=page, root="../" * page.name.count("/")).rstrip() + "\n")
        written.append(str(path))
    if json:
        render.print_json(written)
    else:
        render.line(f"{len(written)} pages written to {out}, the first is {written[0]}")


def _template(format: str) -> Any:
    from jinja2 import Environment, FileSystemLoader

    folder = Path(__file__).parent / "templates"
    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=format == "html", trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["inline"] = _markdown if format == "md" else _html
    environment.filters["cell"] = lambda text: _markdown(text).replace("|", "\\|")
    return environment.get_template(f"page.{format}")


def _markdown(text: str) -> str:
    """A line for Markdown: code stays code, and nothing else of it is markup."""
    return "".join(f"`{part}`" if code else _SPECIAL.sub(r"\\\g<0>", part) for code, part in _parts(text))


def _html(text: str) -> Any:
    from markupsafe import Markup, escape

    return Markup("").join(
        Markup("<code>{}</code>").format(part) if code else escape(part) for code, part in _parts(text)
    )


def _parts(text: str) -> list[tuple[bool, str]]:
    """(whether it is code, text) in turn: ``x`` and roles such as :class:`x` are code."""
    found, end = [], 0
    for match in _CODE.finditer(text):
        found += [(False, text[end : match.start()]), (True, match[1] or match[2])]
        end = match.end()
    return [part for part in [*found, (False, text[end:])] if part[1]]
