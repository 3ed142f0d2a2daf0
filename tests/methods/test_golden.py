"""The text of every method's program on one small model, before and after the passes.

A change of a method or a pass shows here as a readable difference. When it is meant, accept it:
``FXCURV_ACCEPT=1 pytest tests/methods/test_golden.py``, and read the diff before committing.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fxcurv.ir.text import parse_program
from fxcurv.ir.verify import verify
from fxcurv.methods import PUBLISHED
from tests.passes.programs import build, compiled, facts, linear, norm

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("method", sorted(PUBLISHED))
def test_program_text(method: str) -> None:
    model = facts(linear("q", 2, 3), linear("k", 2, 3, "q"), norm("ln", 3))
    program = build(method, model)
    built = program.text("as built")
    c = compiled(program, "sink,share,simplify,cadence,guard")
    assert c.program is not None
    text = f"{built}\n\n{c.program.text('after sink, share, simplify, cadence, guard')}\n"
    path = GOLDEN / f"{method}.fxc"
    if os.environ.get("FXCURV_ACCEPT"):
        path.write_text(text)
    assert path.exists(), f"there is no golden text of {method}; accept this one with FXCURV_ACCEPT=1"
    assert path.read_text() == text


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.fxc")), ids=lambda path: path.stem)
def test_golden_text_is_a_program(path: Path) -> None:
    assert path.stem in PUBLISHED
    for part in path.read_text().split("\n\n"):
        verify(parse_program(part))
