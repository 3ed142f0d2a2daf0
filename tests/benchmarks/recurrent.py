"""A training step of a recurrent network: the exposed graph beside torch's own module.

    python tests/benchmarks/recurrent.py [--hidden 256 --steps 32 --batch 32 --threads 1 --repeats 30]

Prints the medians of forward + backward in milliseconds, interleaved, and their ratio: "graph" is the exposed graph
without taps (what the rewrite costs), "kfac" a step of the transformed model on which it measures both factors of every
weight with plain ``loss.backward()``. Nothing here is a test; tests/layers/test_recurrent*.py are.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that the script runs from a checkout as it is

import fxcurv  # noqa: E402
from fxcurv.capture import Call, Runner, capture  # noqa: E402
from fxcurv.layers.detect import detect  # noqa: E402

NETS: dict[str, Callable[..., nn.Module]] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}


class Tagger(nn.Module):
    """A recurrent network and a linear layer on every step."""

    def __init__(self, kind: str, hidden: int) -> None:
        super().__init__()
        self.rnn, self.head = NETS[kind](hidden, hidden, batch_first=True), nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        return self.head(y)


def timed(model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Milliseconds of a forward and backward pass."""
    model.zero_grad()
    start = time.perf_counter()
    forward(x).square().mean().backward()
    return 1e3 * (time.perf_counter() - start)


def compare(kind: str, options: argparse.Namespace) -> dict[str, float]:
    """Median by way of running the net."""
    net, x = Tagger(kind, options.hidden), torch.randn(options.batch, options.steps, options.hidden)
    captured = capture(net, Call.of(net, (x,)), "symbolic")
    detect(captured, net)
    runner = Runner(captured)
    model = fxcurv.transform(net, "kfac", example_inputs=(x,), loss="mse", fisher="empirical")
    ways: dict[str, Callable[[Tensor], Tensor]] = {"plain": net, "graph": lambda x: runner(net, x), "kfac": model}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(options.repeats + 3):
        for way, forward in ways.items():
            milliseconds = timed(model if way == "kfac" else net, forward, x)
            if turn >= 3:
                times[way].append(milliseconds)
    return {way: statistics.median(values) for way, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("hidden", 256), ("steps", 32), ("batch", 32), ("threads", 1), ("repeats", 30)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(
        f"hidden {options.hidden}, T {options.steps}, batch {options.batch}, {options.threads} thread(s), milliseconds"
    )
    for kind in NETS:
        found = compare(kind, options)
        plain = found.pop("plain")
        ways = "".join(f"   {way} {value:7.2f} ({value / plain:.2f}x)" for way, value in found.items())
        print(f"{kind:5} plain {plain:7.2f}{ways}")


if __name__ == "__main__":
    main()
