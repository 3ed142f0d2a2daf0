"""Train on several processes: DistributedDataParallel around the transformed model.

    torchrun --nproc-per-node 2 examples/distributed.py
    python examples/distributed.py

Both print the same losses, up to rounding. The wrapper averages the gradients, ``precondition_`` (here inside the
optimizer) sums the statistics, and sampled labels depend on the row in the global batch, not on who draws them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fxcurv

sys.path.insert(0, str(Path(__file__).resolve().parent))
from digits_cnn import digits

BATCH = 128  # rows of the global batch: a multiple of the number of processes makes all their shares equal


def build_model() -> nn.Module:
    """A network without BatchNorm, whose statistics in training mode would be those of each process's own rows."""
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 16, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def main(epochs: int = 3) -> list[float]:
    """Train; returns the mean training loss of every epoch."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")  # "nccl" on GPUs
    (images, labels), (held_out, answers) = digits()

    torch.manual_seed(0)  # the same start everywhere, for the model and for the order of the rows
    # 1. Transform first, wrap second. The wrapper is what runs; the model is what knows about curvature.
    model = fxcurv.transform(build_model(), "kfac", loss="cross_entropy", damping=0.1, kl_clip=0.1)
    wrapper = DistributedDataParallel(model) if world > 1 else model
    optimizer = fxcurv.optimizer(model, lr=0.03)

    history = []
    for epoch in range(epochs):
        total = torch.zeros(())
        batches = torch.randperm(len(labels)).split(BATCH)[:-1]
        for rows in batches:
            mine = rows.chunk(world)[rank]  # the global batch is the ranks' batches, one after the other
            optimizer.zero_grad()
            outputs = wrapper(images[mine])
            loss = F.cross_entropy(outputs, labels[mine])
            # 2. On the model: its pass for the statistics does not go through the wrapper; that for the gradients does.
            model.backward(loss, outputs)
            # 3. All processes take the same step, from the same numbers.
            optimizer.step()
            total += loss.detach() / len(batches)
        history.append(mean_over_ranks(total, world))
        if rank == 0:
            with torch.no_grad():
                accuracy = (model(held_out).argmax(1) == answers).float().mean()
            print(f"epoch {epoch}: loss {history[-1]:.4f}, held-out accuracy {float(accuracy):.3f}", flush=True)
    if world > 1:
        dist.destroy_process_group()
    return history


def mean_over_ranks(value: Tensor, world: int) -> float:
    """The average of a number over the processes."""
    if world > 1:
        dist.all_reduce(value)
    return float(value) / world


if __name__ == "__main__":
    main()
