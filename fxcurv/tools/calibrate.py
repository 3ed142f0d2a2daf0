"""What this machine does: rates of products and factorisations by size, memory bandwidth, and what a call costs.

A few seconds of measurements, kept in the user's cache folder for the same processor, threads and version of torch.
The cost model reads them; they are never part of a result.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxcurv.errors import FxcurvError
from fxcurv.kernels.generator import cache_folder
from fxcurv.tools.clock import fastest
from fxcurv.tools.devices import Curve, Device
from fxcurv.tools.recorder import Recorder

FORMAT = 3
SIZES = (16, 32, 64, 128, 256, 512, 1024)
MATRICES = (32, 128, 512)  # sizes of factorisations
CHANNELS = ((16, 32), (64, 16), (256, 8))  # (channels, image side) of convolutions
MEGABYTES = (0.0625, 1.0, 16.0, 128.0)
DTYPES = {"f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}


def measure() -> dict[str, Any]:
    """All numbers as plain data, in about two seconds on an idle core."""
    with torch.no_grad():
        rates: dict[str, list[tuple[float, float]]] = {
            "product": [(float(n), _product(n, torch.float32)) for n in SIZES],
            "convolution": [_convolution(*geometry) for geometry in CHANNELS],
            "cholesky": [(float(n), _factorise(_cholesky, n, 1 / 3)) for n in MATRICES],
            "inverse": [(float(n), _factorise(torch.cholesky_inverse, n, 2 / 3)) for n in MATRICES],
            "eigen": [(float(n), _factorise(torch.linalg.eigh, n, 9.0)) for n in MATRICES],
        }
        at = 256
        base = _product(at, torch.float32)
        relative = {name: _product(at, dtype) / base for name, dtype in DTYPES.items()}
        bandwidth = [_bandwidth(size) for size in MEGABYTES]
    launch = _launch()
    return {
        "format": FORMAT, "processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "rates": rates, "relative": relative, "bandwidth": bandwidth, "launch": launch,
    }  # fmt: skip


def _product(n: int, dtype: torch.dtype) -> float:
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    out = torch.empty_like(a)
    return 2.0 * n**3 / fastest(lambda: torch.mm(a, b, out=out), 9)


def _convolution(channels: int, side: int) -> tuple[float, float]:
    """Rate of a 3 x 3 convolution with its two backward products, by (m n k)^(1/3) of one of them."""
    x, w = torch.randn(16, channels, side, side), torch.randn(channels, channels, 3, 3)
    flops = 2.0 * 16 * side * side * 9 * channels * channels
    g, geometry = torch.randn(16, channels, side, side), ([1, 1], [1, 1], [1, 1], False, [0, 0])

    def both() -> None:
        torch.conv2d(x, w, padding=1)
        torch.ops.aten.convolution_backward(g, x, w, None, *geometry, 1, [True, True, False])

    return (flops / 2) ** (1 / 3), 3 * flops / fastest(both, 7)


def _cholesky(A: torch.Tensor) -> Any:
    return torch.linalg.cholesky_ex(A)


def _factorise(run: Callable[[torch.Tensor], Any], n: int, factor: float) -> float:
    x = torch.randn(n, n)
    A = x @ x.mT / n + torch.eye(n)
    return factor * n**3 / fastest(lambda: run(A), 5)


def _bandwidth(megabytes: float) -> tuple[float, float]:
    """Rate of a sum of two tensors by the bytes that it moves."""
    n = int(megabytes * 1e6 / 12)
    a, b, out = torch.ones(n), torch.ones(n), torch.empty(n)
    return 12.0 * n, 12.0 * n / fastest(lambda: torch.add(a, b, out=out))


def _launch() -> float:
    """What a call costs when there is next to nothing to compute: a small network's step by the calls that it makes."""
    layers = [part for _ in range(20) for part in (nn.Linear(4, 4), nn.Tanh())]
    net, x = nn.Sequential(*layers), torch.ones(2, 4)

    def step() -> None:
        net.zero_grad()
        net(x).sum().backward()

    with Recorder() as recorder:
        step()
    return fastest(step, 9) / len(recorder.works)


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def file() -> Path:
    """Where the numbers of this processor, number of threads and torch version are kept."""
    key = f"{processor()}/{torch.get_num_threads()}/{torch.__version__}/{FORMAT}"
    return cache_folder("calibration") / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def save(found: dict[str, Any]) -> Path:
    """Keep measurements, in one piece: a reader sees the old file or the new one."""
    path = file()
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(found, stream)
        Path(partial).replace(path)
    finally:
        Path(partial).unlink(missing_ok=True)
    return path


def read() -> dict[str, Any] | None:
    """The kept measurements of this machine; ``None`` without any that can be used."""
    try:
        found = json.loads(file().read_text(encoding="utf-8"))
    except (OSError, ValueError, FxcurvError):
        return None
    return found if isinstance(found, dict) and _usable(found) else None


def _usable(found: dict[str, Any]) -> bool:
    curves = [*found.get("rates", {}).values(), found.get("bandwidth", [])]
    numbers = [value for curve in curves for point in curve for value in point]
    return found.get("format") == FORMAT and bool(numbers) and all(math.isfinite(x) and x > 0 for x in numbers)


def as_device(found: dict[str, Any]) -> Device:
    """The device that measurements describe."""

    def curve(points: Any) -> Curve:
        return tuple((float(x), float(y)) for x, y in points)

    return Device(
        "cpu",
        {kind: curve(points) for kind, points in found["rates"].items()},
        {"f32": 1.0, **found["relative"]},
        curve(found["bandwidth"]),
        float(found["launch"]),
        f"{found['processor']}, {found['threads']} thread{'s' * (found['threads'] > 1)}, measured here",
    )


def this_cpu(fresh: bool = False) -> Device:
    """This machine: as it was measured before or, the first time and with ``fresh``, as it is measured now."""
    found = None if fresh else read()
    if found is None:
        found = measure()
        with suppress(OSError, FxcurvError):  # a cache that cannot be written costs time, nothing else
            save(found)
    return as_device(found)
