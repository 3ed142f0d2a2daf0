"""Where in the user's code something happened: stack frames outside torch and outside the capture itself."""

from __future__ import annotations

import linecache
import os
import re
import traceback
from collections.abc import Iterable
from types import FrameType
from typing import Any

import torch
from torch import fx

_OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def is_user_file(filename: str) -> bool:
    """Whether a source file belongs neither to torch nor to this package's capture."""
    return not filename.startswith((_OURS, _TORCH, "<"))


def user_stack(frame: FrameType | None, stop: Any) -> str:
    """Frames of user code from ``frame`` outwards to the frame running code object ``stop``, innermost last."""
    lines: list[str] = []
    while frame is not None and frame.f_code is not stop:
        filename = frame.f_code.co_filename
        if is_user_file(filename):
            code = linecache.getline(filename, frame.f_lineno).strip()
            lines.append(f'  File "{filename}", line {frame.f_lineno}, in {frame.f_code.co_name}\n    {code}')
        frame = frame.f_back
    return "\n".join(reversed(lines))


def source(node: fx.Node) -> str:
    """The user's line that made a node, as ``model.py:12: x = F.linear(x, w)``; "" when unknown."""
    for filename, line in reversed(_FRAME.findall(node.stack_trace or "")):
        if is_user_file(filename):
            return _line(filename, int(line))
    return ""


def raised_at(error: BaseException) -> str:
    """The innermost user line of an exception's traceback, in the format of :func:`source`; "" when unknown."""
    for filename, line in reversed([(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]):
        if is_user_file(filename) and line is not None and "site-packages" + os.sep + "sympy" not in filename:
            return _line(filename, line)
    return ""


def user_line(stack: Iterable[traceback.FrameSummary]) -> str:
    """The innermost user line of frames listed outermost first, in the format of :func:`source`; "" when unknown."""
    for frame in reversed(list(stack)):
        if is_user_file(frame.filename) and frame.lineno is not None:
            return _line(frame.filename, frame.lineno)
    return ""


def _line(filename: str, line: int) -> str:
    code = linecache.getline(filename, line).strip()
    return f"{os.path.basename(filename)}:{line}" + (f": {code}" if code else "")
