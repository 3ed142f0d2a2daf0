"""Devices that costs are expressed for: what the vendors state, and this machine as it was measured.

A time at roofline is the larger of arithmetic at the peak rate and bytes at the peak bandwidth, plus what a launch
costs. For a GPU it is a bound that good kernels come near; factorisations do not, and their rates are guesses that say
so. For the CPU the rates are measurements by size (``fxcurv bench --calibrate``), so its times are estimates.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from fxcurv.errors import FxcurvError
from fxcurv.ir.types import DTYPE_NAMES
from fxcurv.tools.recorder import Work

Curve = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Device:
    """A machine to estimate for.

    rates: flop/s by kind of work, as (size, rate) points; a kind without an entry runs as a product. relative: speed
    of a dtype in units of float32's. bandwidth: byte/s as (bytes, rate) points. launch: seconds that every call costs.
    source: where the numbers are from. kind: "cpu" or "cuda", the tensors that kernels choose their form by.
    """

    name: str
    rates: Mapping[str, Curve]
    relative: Mapping[str, float]
    bandwidth: Curve
    launch: float
    source: str
    notes: tuple[str, ...] = field(default=())
    kind: str = "cpu"

    def seconds(self, works: Iterable[Work]) -> float:
        """Estimated time of works that run one after another."""
        return sum(self._one(work) * work.count for work in works)

    def _one(self, work: Work) -> float:
        moving = work.bytes / interpolate(self.bandwidth, work.bytes) if work.bytes else 0.0
        if work.kind == "pointwise" or not work.flops:
            return moving + self.launch
        curve = self.rates.get(work.kind, self.rates["product"])
        rate = interpolate(curve, work.size) * self.relative.get(DTYPE_NAMES.get(work.dtype, "f32"), 1.0)
        return max(work.flops / rate, moving) + self.launch


def interpolate(curve: Curve, at: float) -> float:
    """A value on a curve, linear in the logarithms, constant beyond its ends."""
    if at <= curve[0][0] or len(curve) == 1:
        return curve[0][1]
    if at >= curve[-1][0]:
        return curve[-1][1]
    k = bisect.bisect([x for x, _ in curve], at)
    (x0, y0), (x1, y1) = curve[k - 1], curve[k]
    part = math.log(at / x0) / math.log(x1 / x0)
    return math.exp(math.log(y0) + part * math.log(y1 / y0))


GUESS = "factorisations at 2 % (Cholesky, inverse) and 0.2 % (eigenvectors) of the float32 peak: an assumption"

LAUNCH = "a launch at 5 us, as eager PyTorch has it: an assumption"


def _gpu(name: str, f32: float, tf32: float, half: float, f64: float, bandwidth: float, source: str) -> Device:
    """f32, tf32, half, f64: dense peaks in Tflop/s; bandwidth in TB/s. Products of float32 run in tf32 if allowed."""
    product = tf32 if torch.backends.cuda.matmul.allow_tf32 else f32
    rates = {
        "product": ((1.0, product * 1e12),),
        "convolution": ((1.0, (tf32 if torch.backends.cudnn.allow_tf32 else f32) * 1e12),),
        "cholesky": ((1.0, 0.02 * f32 * 1e12),),
        "inverse": ((1.0, 0.02 * f32 * 1e12),),
        "eigen": ((1.0, 0.002 * f32 * 1e12),),
    }
    relative = {"f32": 1.0, "bf16": half / product, "f16": half / product, "f64": f64 / product}
    return Device(name, rates, relative, ((1.0, bandwidth * 1e12),), 5e-6, source, (GUESS, LAUNCH), "cuda")


VENDORS = {
    "a100": (19.5, 156.0, 312.0, 19.5, 2.039, "NVIDIA A100 SXM 80 GB data sheet, dense rates"),
    "h100": (67.0, 494.7, 989.4, 67.0, 3.35, "NVIDIA H100 SXM data sheet, dense rates (half of those with sparsity)"),
    "h200": (67.0, 494.7, 989.4, 67.0, 4.8, "NVIDIA H200 SXM data sheet, dense rates (half of those with sparsity)"),
    "mi300x": (163.4, 653.7, 1307.4, 163.4, 5.3, "AMD Instinct MI300X data sheet, dense rates"),
}
"""Peaks (float32, tf32, bf16/fp16, float64 with matrix units) in Tflop/s, bandwidth in TB/s, source."""

NAMES = ("cpu", *VENDORS)


def device(name: str = "cpu") -> Device:
    """A device by name; "cpu" is this machine, measured on first use. Raises :class:`FxcurvError` for another name."""
    if name in VENDORS:
        return _gpu(name, *VENDORS[name])
    if name != "cpu":
        raise FxcurvError(f"there is no device '{name}' to estimate for; there are {', '.join(NAMES)}.")
    from fxcurv.tools.calibrate import this_cpu

    return this_cpu()
