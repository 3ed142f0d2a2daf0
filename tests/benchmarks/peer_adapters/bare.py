"""The matrix products of K-FAC alone, without any library: what no implementation can be faster than.

Grams are made of half the flops (slabs of the lower triangle) where that is faster than the plain product, layers with
the same input share a factor, a refresh is a Cholesky factorisation and the inverse from it, an apply two products.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from workloads import Workload

from peer_adapters.lean import invert
from peer_adapters.rows import Rows, observe

Action = Callable[[], object]


def slabs(x: Tensor, block: int) -> Callable[[], object]:
    """x^T x for rows x (n, d), the lower triangle alone in blocks of columns."""
    out = x.new_empty(x.shape[1], x.shape[1])

    def run() -> None:
        for start in range(0, len(out), block):
            stop = min(start + block, len(out))
            torch.mm(x[:, start:stop].T, x[:, :stop], out=out[start:stop, :stop])

    return run


def fastest(candidates: list[Action], rounds: int = 5) -> Action:
    """The candidate with the smallest time."""
    spent = []
    for run in candidates:
        run()
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        spent.append(min(times))
    return candidates[spent.index(min(spent))]


def gram(x: Tensor) -> Action:
    """The fastest way to x^T x, mirroring not counted."""
    x = x.contiguous()
    out = x.new_empty(x.shape[1], x.shape[1])
    return fastest([lambda: torch.mm(x.T, x, out=out), *(slabs(x, b) for b in (128, 256) if b < x.shape[1])])


def autocorrelation(image: Tensor, module: nn.Conv2d) -> Action:
    """Products of a stride-1 convolution's input factor by lags: with k^2 taps, (2k - 1)^2 // 2 + 1 products (C, C).

    On zero-padded images in one row of pixels after another, a lag is the same rows shifted.
    """
    up, left = module.padding  # type: ignore[misc]
    high, wide = module.kernel_size
    padded = nn.functional.pad(image, (left, left, up, up)).permute(0, 2, 3, 1).flatten(0, 2).contiguous()
    line = image.shape[3] + 2 * left
    lags = [y * line + x for y in range(high) for x in range(1 - wide if y else 0, wide)]
    out = padded.new_empty(padded.shape[1], padded.shape[1])

    def run() -> None:
        for lag in lags:
            torch.mm(padded[: len(padded) - lag].T, padded[lag:], out=out)

    return run


def can_correlate(rows: Rows) -> bool:
    """Whether the input factor of a layer has the cheaper form."""
    m = rows.module
    return isinstance(m, nn.Conv2d) and m.stride == (1, 1) and m.dilation == (1, 1) and m.kernel_size != (1, 1)


def actions(work: Workload, net: nn.Module) -> dict[str, list[Action]]:
    """Products by phase.

    "autocorrelation" is "gram" with that form of the input factors where it is faster (models with convolutions only).
    "from rows" is the weight gradients together with the apply, (G^-1 g^T)(a A^-1) where a batch has fewer rows than
    the layer is wide; "gradient" is the weight gradients alone, which the plain step pays for as well.
    """
    observed = observe(work, net)
    phases = ("gram", "autocorrelation", "apply", "gradient", "from rows", "refresh")
    found: dict[str, list[Action]] = {phase: [] for phase in phases}
    shared: set[tuple[int, int]] = set()
    for rows in observed.values():
        a, g = rows.joined()
        inputs, outputs = gram(a), gram(g)
        if (rows.source, a.shape[1]) not in shared or rows.uses > 1:
            shared.add((rows.source, a.shape[1]))
            found["gram"].append(inputs)
            by_lags = isinstance(rows.module, nn.Conv2d) and rows.image is not None and can_correlate(rows)
            cheaper = fastest([inputs, autocorrelation(rows.image, rows.module)]) if by_lags else inputs
            found["autocorrelation"].append(cheaper)
            found["refresh"].append(partial(invert, a.T @ a / len(a), 0.1))
        for phase in ("gram", "autocorrelation"):
            found[phase].append(outputs)
        found["refresh"].append(partial(invert, g.T @ g, 0.1))
        left, middle, right = g.T @ g, g.T @ a, a.T @ a
        found["apply"].append(partial(chain, left, middle, right))
        found["gradient"].append(partial(torch.mm, g.T, a))
        (n, d_in), d_out = a.shape, g.shape[1]
        few = n * (d_in**2 + d_out**2) < d_in * d_out * (d_in + d_out)
        found["from rows"].append(
            partial(from_rows, left, g, a, right) if few else together([found["gradient"][-1], found["apply"][-1]])
        )
    if not any(isinstance(rows.module, nn.Conv2d) for rows in observed.values()):
        del found["autocorrelation"]
    return found


def chain(left: Tensor, middle: Tensor, right: Tensor) -> Tensor:
    """G^-1 V A^-1."""
    return left @ middle @ right


def from_rows(left: Tensor, g: Tensor, a: Tensor, right: Tensor) -> Tensor:
    """The same from rows (n, d) of both sides, without V."""
    return (left @ g.T) @ (a @ right)


def together(runs: list[Action]) -> Action:
    """All of them, one after the other."""

    def run() -> None:
        for each in runs:
            each()

    return run
