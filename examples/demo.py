"""The demo behind ``make demo``: K-FAC against tuned SGD and Adam on the MNIST autoencoder.

Compiles the model for K-FAC into a folder, trains it from one start with all three methods, and shows by how many steps
and seconds K-FAC is ahead: a table in the terminal and a picture.

    python examples/demo.py [--steps 100] [--out out/demo]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import fxcurv

sys.path.insert(0, str(Path(__file__).resolve().parent))
import mnist_autoencoder as task

METHODS = {"sgd": 1.0, "adam": 1.0, "kfac": 0.5}  # with the share of the steps that each gets
RATE = ("lr", "momentum", "nesterov")  # what the optimizer takes; the rest of the settings is the method's
WINDOW = 5  # steps over which a loss is averaged before two are compared


def train(method: str, steps: int, progress: Progress) -> tuple[list[float], list[float]]:
    """Losses and elapsed seconds of every step, from the start that seed 0 gives."""
    torch.manual_seed(0)
    options = dict(task.settings[method])
    rate = {name: options.pop(name) for name in RATE if name in options}
    model = compiled(method, options)
    optimizer = fxcurv.optimizer(model, **rate)
    bar = progress.add_task(method, total=steps, note="")
    losses: list[float] = []
    seconds: list[float] = []
    start = time.perf_counter()
    for inputs, targets in batches(steps):
        optimizer.zero_grad()
        outputs = model(*inputs)
        loss = task.loss.value(outputs, targets)
        model.backward(loss, outputs)
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        progress.update(bar, advance=1, note=f"{losses[-1]:.1f} nats an image")
    return losses, seconds


def compiled(method: str, options: dict[str, Any]) -> fxcurv.CurvatureModule:
    """The model under a method. With a batch to weigh costs by, and weight gradients only where they pay."""
    example = next(iter(batches(1)))[0]
    loss = task.loss
    return fxcurv.transform(
        task.build_model(), method, example_inputs=example, loss=loss, weight_gradients=False, **options
    )


def batches(steps: int) -> Iterator[tuple[tuple[torch.Tensor], torch.Tensor]]:
    """The first batches of the task, epoch after epoch."""
    return islice(chain.from_iterable(map(task.batches, count())), steps)


def smooth(losses: list[float], step: int) -> float:
    """Mean of the last WINDOW losses up to and including ``step``, counted from 1."""
    part = losses[max(0, step - WINDOW) : step]
    return sum(part) / len(part)


def smooth_text(losses: list[float], step: int) -> str:
    """The smoothed loss, or a dash after the run's end."""
    return f"{smooth(losses, step):.2f}" if step <= len(losses) else "-"


def draw(runs: dict[str, tuple[list[float], list[float]]], path: Path) -> None:
    """Both curves, over steps and over seconds."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for method, (losses, seconds) in runs.items():
        axes[0].plot(range(1, len(losses) + 1), losses, label=method)
        axes[1].plot(seconds, losses, label=method)
    for axis, label in zip(axes, ("step", "seconds"), strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("nats an image")
    axes[0].set_ylim(top=max(losses[0] for losses, _ in runs.values()))
    axes[0].legend()
    figure.suptitle("MNIST autoencoder, training loss")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(steps: int = 100, out: str = "out/demo") -> dict[str, list[float]]:
    """Run the demo; returns the losses by method.

    K-FAC is compared with what SGD and Adam reach at the end of theirs, in steps and in seconds.
    """
    console = Console()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    options = {name: value for name, value in task.settings["kfac"].items() if name not in RATE}
    model = compiled("kfac", options)
    artifact = fxcurv.save(model, folder / "mnist_autoencoder.kfac", force=True)
    rewrites = ", ".join(f"{record.name} {record.rewrites}" for record in model.history)
    console.print(f"compiled {len(model.layers)} layers into {artifact} (rewrites: {rewrites})")
    columns = (TextColumn("{task.description:6}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), TextColumn("{task.fields[note]}"), console=console) as progress:
        runs = {method: train(method, max(WINDOW, round(share * steps)), progress) for method, share in METHODS.items()}
    table = Table(title=f"training loss in nats an image (mean of {WINDOW} steps)")
    table.add_column("step", justify="right")
    for method in METHODS:
        table.add_column(method, justify="right")
    for step in sorted({*range(steps // 5, steps + 1, max(1, steps // 5)), steps}):
        table.add_row(str(step), *(smooth_text(runs[method][0], step) for method in METHODS))
    table.add_row("seconds", *(f"{runs[method][1][-1]:.1f}" for method in METHODS), style="dim")
    console.print(table)
    draw(runs, folder / "curves.png")
    console.print(f"curves: {folder / 'curves.png'}")
    losses, seconds = runs["kfac"]
    for other in ("sgd", "adam"):
        goal, elapsed = smooth(runs[other][0], steps), runs[other][1][-1]
        ahead = next((s for s in range(WINDOW, len(losses) + 1) if smooth(losses, s) < goal), None)
        start = f"{other} ends at {goal:.2f} nats after {steps} steps and {elapsed:.1f} s; K-FAC "
        if ahead is None:
            console.print(f"{start}does not reach that within {len(losses)} steps.")
        else:
            console.print(f"{start}passes that after {ahead} steps and {seconds[ahead - 1]:.1f} s.")
    return {method: losses for method, (losses, _) in runs.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="K-FAC against tuned SGD and Adam on the MNIST autoencoder.")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", default="out/demo")
    given = parser.parse_args()
    main(given.steps, given.out)
