"""Several gloo ranks under DistributedDataParallel train as one rank does on the global batch.

Real processes, started once for each number of ranks: a test takes all its cases.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.dist.cases import CASES, run
from tests.dist.checks import CHECKS, FOUR
from tests.dist.nets import NETS

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 480.0  # seconds; a fraction of that on an idle machine
TOLERANCE = {"hessian_free": 1e-6}  # conjugate gradients magnify the last bits
TWO = {  # on two ranks only, for time: four would show nothing else in them
    *("optimizer", "hessian_free", "adahessian-micro", "views", "unused", "static", "plain", "micro-plain", "rows"),
    *(f"{net}-empirical" for net in NETS if net not in ("mlp", "conv", "tokens")),
}


def launch(world: int, folder: Path, names: list[str]) -> list[dict[str, dict[str, Tensor]]]:
    """What every rank found, by name; fails with what the ranks printed when one fails."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.dist.ranks", str(world), str(folder), *names]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def difference(one: Tensor, several: Tensor) -> float:
    """Largest difference, relative to the largest entry; infinite for NaN."""
    if not one.numel():
        return 0.0
    one, several = one.double(), several.double()
    error = (one - several).abs().max() / one.abs().max().clamp_min(1e-12)
    return float(error.nan_to_num(float("inf")))


@pytest.mark.parametrize("world", [2, 4])
def test_several_ranks_equal_one_on_the_global_batch(world: int, tmp_path: Path, float64: torch.dtype) -> None:
    cases = [name for name in CASES if world == 2 or name not in TWO]
    checks = [name for name in CHECKS if (name in FOUR) == (world == 4)]
    found = launch(world, tmp_path, cases + checks)
    wrong: dict[tuple[str, str], float] = {}
    for name in cases:
        one = run(CASES[name], 0, 1)
        assert one.keys() == found[0][name].keys()
        errors = {(name, key): difference(value, found[0][name][key]) for key, value in one.items()}
        wrong |= {key: error for key, error in errors.items() if error > TOLERANCE.get(name, 1e-10)}
    assert not wrong
    unequal = [
        (name, key)
        for name in cases + checks
        for key, value in found[0][name].items()
        if not all(torch.equal(value, other[name][key]) for other in found)
    ]
    assert not unequal
