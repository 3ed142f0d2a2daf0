"""What the structure costs: off-steps against the plain model, ``transform``, and the passes. Prints one table.

    python tests/benchmarks/structure.py [overhead] [transform] [passes] [warm]

Timings of the two sides of a comparison are interleaved, so that a busy machine slows both, and are reported as the
median of the pairwise ratios. Nothing is asserted here; the limits that the structure is held to stand beside the
numbers.
"""

from __future__ import annotations

import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that the script runs from a checkout as it is

import fxcurv  # noqa: E402
from fxcurv.capture import Call, capture  # noqa: E402

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
from workloads import workload  # noqa: E402

Row = tuple[str, str, str]
NEVER = 10**6  # a cadence that is due in the first step only


class Bottleneck(nn.Module):
    """The residual block of ResNet-50."""

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.down: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.bn3(self.conv3(y)) + self.down(x))


def resnet50() -> nn.Sequential:
    """ResNet-50 (He et al. 2016): 53 convolutions, 53 BatchNorms, one linear layer, 25.6 million parameters."""
    blocks: list[nn.Module] = []
    inputs = 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(count):
            blocks.append(Bottleneck(inputs, width, stride if i == 0 else 1))
            inputs = 4 * width
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


class Encoder(nn.Module):
    """A small transformer with separate q, k, v; input (batch, tokens, width)."""

    def __init__(self, width: int = 128, depth: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.qkvo = nn.ModuleList(nn.ModuleList(nn.Linear(width, width) for _ in range(4)) for _ in range(depth))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(depth)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        for i, (projections, mlp) in enumerate(zip(self.qkvo, self.mlps, strict=True)):
            h = self.norms[2 * i](x)
            q, k, v = (projection(h).unflatten(-1, (4, -1)).transpose(1, 2) for projection in list(projections)[:3])
            x = x + projections[3](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(x.mean(1))


def chain(depth: int) -> nn.Sequential:
    """``depth`` linear layers of 16 features."""
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(depth)))


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    """Name: (model, a batch of 10-class inputs)."""
    wide = nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(),
        nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10),
    )  # fmt: skip
    convolutions = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 64, 10),
    )  # fmt: skip
    return {
        "MLP 784-512-512-256-10, batch 256": (wide, torch.randn(256, 784)),
        "CNN 3x32x32, batch 32": (convolutions, torch.randn(32, 3, 32, 32)),
        "transformer 4x128, 16 x 64 tokens": (Encoder(), torch.randn(16, 64, 128)),
    }


def seconds(action: Callable[[], Any]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def overhead(pairs: int = 60) -> Iterator[Row]:
    """Forward and backward of an off-step against the plain model; the preconditioner's apply is not counted."""
    for name, (plain, x) in networks().items():
        y = torch.randint(0, 10, (len(x),))
        model = fxcurv.transform(
            copy.deepcopy(plain), "kfac", loss="cross_entropy", factor_every=NEVER, solve_every=NEVER
        )

        def plain_step(plain: nn.Module = plain, x: Tensor = x, y: Tensor = y) -> None:
            plain.zero_grad()
            F.cross_entropy(plain(x), y).backward()

        def off_step(model: Any = model, x: Tensor = x, y: Tensor = y) -> None:
            model.zero_grad()
            out = model(x)
            model.backward(F.cross_entropy(out, y), out)

        off_step()
        model.precondition_()  # the first step is the one that is due
        assert model.due() == {"statistics": False, "refresh": False}
        for _ in range(5):
            plain_step()
            off_step()
        times = [
            (seconds(plain_step), seconds(off_step)) if i % 2 else (seconds(off_step), seconds(plain_step))[::-1]
            for i in range(pairs)
        ]
        base, ratio = statistics.median(a for a, _ in times), statistics.median(b / a for a, b in times)
        yield f"off-step, {name}", f"{1e3 * base:.2f} ms plain, {100 * (ratio - 1):+.2f} %", "within 3 %"


def transforming() -> Iterator[Row]:
    """``transform`` beyond capture, of ResNet-50 and of chains of growing depth."""
    net = resnet50()
    spent: list[float] = []
    for _ in range(3):
        capturing = seconds(lambda: capture(net, Call.default(net), "symbolic"))
        spent.append(seconds(lambda: fxcurv.transform(net, "kfac", loss="cross_entropy")) - capturing)
    yield "transform beyond capture, ResNet-50 (symbolic)", f"{min(spent):.2f} s", "under 2 s"
    for method in ("kfac", "ekfac"):
        fxcurv.transform(chain(10), method, loss="cross_entropy")
        for depth in (10, 30, 100, 300, 1000):
            runs = [_transformed(depth, method) for _ in range(3 if depth < 300 else 1)]
            taken, spent = min(runs, key=lambda run: run[0])
            dearest = sorted(spent, key=lambda name: -spent[name])[:3]
            shown = ", ".join(f"{name} {1e3 * spent[name] / depth:.2f}" for name in dearest)
            found = f"{taken:.3f} s, {1e3 * taken / depth:.2f} ms a layer ({shown})"
            yield f"transform, {method}, {depth} layers", found, "linear"


def _transformed(depth: int, method: str) -> tuple[float, dict[str, float]]:
    """Seconds of a transform, and of each of its passes."""
    net = chain(depth)
    start = time.perf_counter()
    model = fxcurv.transform(net, method, loss="cross_entropy")
    return time.perf_counter() - start, {record.name: record.seconds for record in model.history}


def warming() -> Iterator[Row]:
    """Loading a compiled folder onto a model, and the first step's forward, beyond imports."""
    cases = {
        "MNIST autoencoder": (workload("W1").build(), torch.randn(64, 784), "mse"),
        "ResNet-20": (workload("W2").build(), torch.randn(64, 3, 32, 32), "cross_entropy"),
    }
    for name, (net, x, loss) in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "compiled"
            fxcurv.save(fxcurv.transform(copy.deepcopy(net), "kfac", example_inputs=(x,), loss=loss), target)
            runs = []
            for _ in range(3):
                fresh = copy.deepcopy(net)
                start = time.perf_counter()
                model = fxcurv.load(target, fresh)
                loaded = time.perf_counter() - start
                plain = seconds(lambda fresh=fresh, x=x: fresh(x))
                first = seconds(lambda model=model, x=x: model(x))
                runs.append((loaded, first, plain))
            loaded, first, plain = min(runs)
            shown = f"{loaded:.2f} s, then a first forward of {1e3 * first:.0f} ms (plain {1e3 * plain:.0f} ms)"
            yield f"loading a compiled {name}", shown, "under 1 s"


def passing() -> Iterator[Row]:
    """Build and all passes of a 200-layer model, from the history of its transform."""
    for method in ("kfac", "ekfac"):
        runs = []
        for _ in range(3):
            model = fxcurv.transform(chain(200), method, loss="cross_entropy")
            runs.append(sum(record.seconds for record in model.history))
        nodes = len(model.program)
        yield f"pipeline of {method}, 200 layers, {nodes} nodes", f"{min(runs):.2f} s", "under 1 s"


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "overhead": overhead,
    "transform": transforming,
    "passes": passing,
    "warm": warming,
}


def main(arguments: list[str] | None = None) -> None:
    """Run the parts named on the command line (all by default) and print a row for each measurement."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    chosen = arguments or list(PARTS)
    print(f"{'measurement':58s} {'result':36s} limit")
    for name in chosen:
        for what, result, limit in PARTS[name]():
            print(f"{what:58s} {result:36s} {limit}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
