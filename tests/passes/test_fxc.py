"""Every ``.fxc`` file here is a test of passes: a program, the passes to run on it and lines to find in the result.

    # RUN: -p "share,simplify"      what to run (one line; fuel=N limits the rewrites)
    # CHECK: text                   the result has a line with this text, after the lines that were checked before
    # CHECK-NOT: text               no line with this text before the next checked line (or the end)
    # ERROR: text                   instead of a result: an error that says this

Spaces count as one. The result is verified, printed, parsed back, and compared numerically with the program it came
from, unless a pass changed the inputs.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fxcurv.errors import FxcurvError
from fxcurv.ir.text import parse_program
from fxcurv.ir.verify import verify
from fxcurv.passes import PASSES, Compilation, parse_pipeline, run_passes
from fxcurv.passes.validate import compare

FILES = sorted(Path(__file__).parent.glob("*.fxc"))
_DIRECTIVE = re.compile(r"#\s*(RUN|CHECK|CHECK-NOT|ERROR):\s*(.*)")


def directives(text: str) -> list[tuple[str, str]]:
    found = (_DIRECTIVE.fullmatch(line.strip()) for line in text.splitlines())
    return [(match[1], " ".join(match[2].split())) for match in found if match]


def command(text: str) -> tuple[str, int | None]:
    words = shlex.split(next(rest for kind, rest in directives(text) if kind == "RUN"))
    fuel = [int(word.removeprefix("fuel=")) for word in words if word.startswith("fuel=")]
    return words[words.index("-p") + 1], fuel[0] if fuel else None


def check(result: str, wanted: list[tuple[str, str]]) -> None:
    """Find the checked lines in order."""
    lines = [" ".join(line.split()) for line in result.splitlines()]
    position, forbidden = 0, []
    for kind, text in [*wanted, ("END", "")]:
        if kind == "CHECK-NOT":
            forbidden.append(text)
        elif kind in ("CHECK", "END"):
            rest = range(position, len(lines))
            found = len(lines) if kind == "END" else next((i for i in rest if text in lines[i]), None)
            assert found is not None, f"no line with '{text}' after line {position} of\n{result}"
            for bad in forbidden:
                hit = next((lines[i] for i in range(position, found) if bad in lines[i]), None)
                assert hit is None, f"'{bad}' is in '{hit}' of\n{result}"
            position, forbidden = found + 1, []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file(path: Path) -> None:
    text = path.read_text()
    pipeline, fuel = command(text)
    wanted = directives(text)
    expected = [rest for kind, rest in wanted if kind == "ERROR"]
    if expected:
        with pytest.raises(FxcurvError, match=re.escape(expected[0])):
            program = parse_program(text)
            verify(program)
            run_passes(Compilation(program=program, fuel=fuel, check="numeric"), parse_pipeline(pipeline, PASSES))
        return
    assert any(kind.startswith("CHECK") for kind, _ in wanted), "the file checks nothing"
    before = parse_program(text)
    verify(before)
    passes = parse_pipeline(pipeline, PASSES)
    c = run_passes(Compilation(program=before.copy(), fuel=fuel, check="numeric"), passes)
    assert c.program is not None
    if all(step.semantic for step in passes):
        compare(before, c.program, pipeline)
    result = c.program.text()
    check(result, wanted)
    again = parse_program(result)
    verify(again)
    assert again.text() == result


def test_files_are_found() -> None:
    assert len(FILES) >= 8


@pytest.mark.parametrize(
    "wanted",
    [
        [("CHECK", "absent")],
        [("CHECK", "two"), ("CHECK", "one")],
        [("CHECK-NOT", "two")],
        [("CHECK", "one"), ("CHECK-NOT", "two"), ("CHECK", "three")],
    ],
)
def test_check_can_fail(wanted: list[tuple[str, str]]) -> None:
    with pytest.raises(AssertionError):
        check("one\ntwo\nthree", wanted)


def test_check_between_lines() -> None:
    check("one\ntwo\nthree", [("CHECK-NOT", "three"), ("CHECK", "two"), ("CHECK-NOT", "one"), ("CHECK", "three")])
