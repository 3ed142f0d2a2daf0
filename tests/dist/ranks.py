"""All ranks of a test: ``python -m tests.dist.ranks WORLD FOLDER NAME...`` runs cases and checks on each.

What they return is saved as ``FOLDER/<rank>.pt``. The ranks are forks of one process, so that torch is imported once;
the first that fails stops the others.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # the wrapper imports it when first used: once, before the fork
import torch.distributed as dist
from torch import multiprocessing

from tests.dist.cases import CASES, run
from tests.dist.checks import CHECKS


def work(rank: int, world: int, folder: Path, names: list[str]) -> None:
    """What one rank does."""
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    found = {}
    for name in names:
        print(f"rank {rank}: {name}", flush=True)
        found[name] = run(CASES[name], rank, world) if name in CASES else CHECKS[name](rank, world)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def main() -> None:
    world, folder, names = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    multiprocessing.start_processes(work, (world, folder, names), nprocs=world, start_method="fork")


if __name__ == "__main__":
    main()
