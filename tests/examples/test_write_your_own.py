"""The four lessons run and prove what they say, each in a process of its own: what one registers stays there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SAYS = {  # the line in which a lesson states its result
    "op": "spectral: loss",
    "pass": "a wrong pass is caught",
    "method": "kfac_relative: loss",
    "layer": "a wrong form is found",
}


def run(lesson: str) -> subprocess.CompletedProcess[str]:
    """Runs a lesson as a script, with the package of this checkout."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / f"write_your_own_{lesson}.py")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("lesson", sorted(SAYS))
def test_lesson_runs(lesson: str) -> None:
    result = run(lesson)
    assert result.returncode == 0, result.stderr
    assert SAYS[lesson] in result.stdout
    assert "Warning" not in result.stderr


def test_every_lesson_is_run() -> None:
    assert {path.stem.rpartition("_")[2] for path in EXAMPLES.glob("write_your_own_*.py")} == set(SAYS)
