"""The example prints the same under torchrun as on one process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "examples" / "distributed.py")
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT]


def losses(command: list[str]) -> list[float]:
    """The losses that the example prints."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stderr
    return [float(value) for value in re.findall(r"loss (\d+\.\d+)", done.stdout)]


def test_two_processes_print_what_one_prints() -> None:
    one, two = losses([sys.executable, SCRIPT]), losses(TWO)
    assert len(one) == 3 and one[-1] < 0.5 * one[0]
    assert two == pytest.approx(one, rel=1e-3)
