"""From templates to kernels: readable Triton source, specialised to a geometry, cached by what it says.

``render`` fills a template; the same geometry always gives the same text. ``load`` writes the text into the user's own
cache folder and imports it from there. The text is the identity: equal sources are one module, however they came about,
and a file that was changed on disk is never run, because what is executed is the text at hand.

Nothing here needs Triton until a source is loaded, so kernels can be written out and read on any machine.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sys
import tempfile
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.exceptions import TemplateError

from fxcurv.errors import FxcurvError

TEMPLATES = Path(__file__).parent / "triton" / "templates"

HEADER = '''"""{title}

{made}{tuned}Stands alone: `launch` takes tensors on one device and returns new ones, without waiting for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


'''


@dataclass(frozen=True)
class Source:
    """A generated kernel file. name: readable and unique for its text; key: SHA-256 of the text."""

    name: str
    text: str
    key: str


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def render(
    template: str,
    *,
    title: str,
    label: str,
    geometry: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    arch: str = "",
) -> Source:
    """Source of a template whose variables are those of ``geometry`` and ``config``.

    title: first line of the file's docstring; label: start of the source's name; config: block sizes and
    the like, tuned for ``arch``. Raises :class:`FxcurvError` for a missing variable or a wrong template.
    """
    config = config or {}
    both = set(geometry) & set(config)
    if both:
        raise FxcurvError(f"template {template}: '{min(both)}' is given by the geometry and by the tuning table.")
    try:
        body = _environment().get_template(template).render(**geometry, **config)
    except TemplateError as error:
        raise FxcurvError(f"template {template} cannot be rendered: {error}.") from error
    tuned = _paragraph(f"Tuned for {arch}: {_listed(config)}.") if config else ""
    made = _paragraph(f"Generated from {template} for {_listed(geometry)}.")
    text = HEADER.format(title=title, made=made, tuned=tuned) + tidy(body)
    key = hashlib.sha256(text.encode()).hexdigest()
    return Source(re.sub(r"\W+", "_", f"{label}_{key[:6]}"), text, key)


def tidy(body: str) -> str:
    """Python text with two empty lines between definitions and none within, whatever the template's tags left over."""
    lines: list[str] = []
    for line in filter(None, map(str.rstrip, body.splitlines())):
        starts = line[0] not in " )" and (lines[-1:] or "@")[0][0] not in "@#"
        if starts and (lines[-1][0] in " )" or line.startswith(("@", "def "))):
            lines += ["", ""]
        lines.append(line)
    return "\n".join(lines) + "\n"


def _listed(values: Mapping[str, Any]) -> str:
    items = [f"{key} = {value}" for key, value in values.items()]
    return ", ".join(item.replace(" ", "\0") if len(item) < 100 else item for item in items) or "any operands"


def _paragraph(text: str) -> str:
    """Wrapped to 118 columns, a "name = value" in one piece."""
    return "\n".join(textwrap.wrap(text, 118, break_long_words=False, break_on_hyphens=False)).replace("\0", " ") + "\n"


def cache_folder(*parts: str) -> Path:
    """A folder below $FXCURV_CACHE, or below ~/.cache/fxcurv, that belongs to the user alone.

    Code is imported from here: raises :class:`FxcurvError` if the folder belongs to somebody else or cannot be made.
    """
    root = Path(os.environ.get("FXCURV_CACHE") or Path.home() / ".cache" / "fxcurv")
    folder = root
    for part in ("", *parts):
        folder = folder / part if part else folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = folder.stat()
        except OSError as error:
            why = f"the kernel cache '{folder}' cannot be used: {error.strerror}; set FXCURV_CACHE."
            raise FxcurvError(why) from None
        if os.name == "posix" and found.st_uid != os.getuid():
            raise FxcurvError(
                f"the kernel cache '{folder}' belongs to another user; set FXCURV_CACHE to a folder of yours."
            )
        if stat.S_IMODE(found.st_mode) & 0o022:
            folder.chmod(0o700)
    return folder


def write(path: Path, text: str) -> None:
    """Write a file in one piece: readers see the old text, the new text or no file."""
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def launcher(path: Path) -> Callable[..., Any]:
    """The host function of a generated file, loaded when first called."""
    text = path.read_text(encoding="utf-8")
    source = Source(path.stem, text, hashlib.sha256(text.encode()).hexdigest())

    def launch(*operands: Any) -> Any:
        return load(source).launch(*operands)

    return launch


@cache
def load(source: Source) -> ModuleType:
    """The module of a source; raises :class:`FxcurvError` where Triton is not installed."""
    if find_spec("triton") is None:
        raise FxcurvError(f"kernel {source.name} needs the package triton: pip install triton, or use backend='aten'.")
    path = cache_folder("generated") / f"{source.name}_{source.key[:16]}.py"
    if not path.is_file() or path.read_text(encoding="utf-8") != source.text:
        write(path, source.text)
    name = f"fxcurv_generated.{path.stem}"
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # where inspect, and so Triton, looks for the source of a function
    try:
        exec(compile(source.text, str(path), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module
