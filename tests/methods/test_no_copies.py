"""A method is a composition: what two of them share is a part, an op or a function, never a run of equal lines."""

from __future__ import annotations

import ast
from itertools import combinations
from pathlib import Path

import fxcurv.methods

METHODS = Path(fxcurv.methods.__file__).parent
LONGEST = 6
"""Lines that two compositions may have in common one after the other: the call of ``Method`` with equal arguments."""


def code_lines(path: Path) -> list[str]:
    """The lines of a file without imports, docstrings and comments."""
    text = path.read_text(encoding="utf-8")
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        plain = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if plain or isinstance(node, (ast.Import, ast.ImportFrom)):
            skipped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = (line.strip() for n, line in enumerate(text.splitlines(), 1) if n not in skipped)
    return [line for line in lines if line and not line.startswith("#")]


def shared_run(one: list[str], other: list[str]) -> list[str]:
    """The longest run of equal lines."""
    best: list[str] = []
    lengths = [0] * (len(other) + 1)
    for i, line in enumerate(one):
        row = [0] * (len(other) + 1)
        for j, candidate in enumerate(other):
            if line == candidate:
                row[j + 1] = lengths[j] + 1
                if row[j + 1] > len(best):
                    best = one[i + 1 - row[j + 1] : i + 1]
        lengths = row
    return best


def test_runs_are_found() -> None:
    assert shared_run(list("abcdxy"), list("zbcdq")) == list("bcd")
    assert shared_run(list("ab"), list("cd")) == []


def test_no_two_files_share_a_run_of_lines() -> None:
    files = sorted([*METHODS.glob("*.py"), *(METHODS / "parts").glob("*.py")])
    lines = {path.name: code_lines(path) for path in files}
    runs = {(a, b): shared_run(lines[a], lines[b]) for a, b in combinations(lines, 2)}
    too_long = {pair: run for pair, run in runs.items() if len(run) > LONGEST}
    assert not too_long, "\n".join(f"{a} and {b} share:\n  " + "\n  ".join(run) for (a, b), run in too_long.items())
