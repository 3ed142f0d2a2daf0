"""Timing of sides that take turns, so that a busy machine slows all of them, and what is said of the times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch


def interleaved(
    sides: Mapping[str, Callable[[], object]], rounds: int = 10, warm: int = 2, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of every round by side; a round runs each side once, in order, after ``warm`` rounds that do not count.

    On "cuda" the clock stops when the device has finished.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(warm + rounds):
        for name, run in sides.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            if i >= warm:
                times[name].append(time.perf_counter() - start)
    return times


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    ordered = sorted(values)
    if len(ordered) == 1:
        return {"p20": ordered[0], "p50": ordered[0], "p80": ordered[0]}
    cuts = statistics.quantiles(ordered, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}


def ratio(times: Mapping[str, Sequence[float]], side: str, to: str) -> float:
    """Median over rounds of one side's time in units of another's."""
    return statistics.median(a / b for a, b in zip(times[side], times[to], strict=True))


def repeats(run: Callable[[], object], at_least: float = 1e-3) -> int:
    """How many calls make one measurement of ``at_least`` seconds, for calls that are too short for a clock."""
    run()
    start = time.perf_counter()
    run()
    return max(1, min(10_000, int(at_least / max(time.perf_counter() - start, 1e-7))))


def fastest(run: Callable[[], object], rounds: int = 5, at_least: float = 1e-3) -> float:
    """Seconds of one call, the least of several measurements: what others on the machine add is not the call's."""
    count = repeats(run, at_least)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(count):
            run()
        times.append((time.perf_counter() - start) / count)
    return min(times)
