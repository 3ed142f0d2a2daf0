"""Benchmarks of ops: every kernel against the reference, timed only after both have been compared.

Each case is a list of operand types at a size. Before anything is timed the kernel's results on odd sizes and on the
very operands of the measurement are compared with the reference in float64; a kernel that is wrong gets no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS, Op
from fxcurv.ir.program import Role
from fxcurv.ir.types import Mat, Orth, Psd, Rows, Scalar, Type
from fxcurv.kernels.registry import BACKENDS, KERNELS, Kernel, load
from fxcurv.passes.validate import random_value
from fxcurv.tools.clock import interleaved, ratio, repeats
from fxcurv.tools.recorder import tensors
from fxcurv.tools.rows import WRONG, BenchRow, timed

ODD = (1, 3, 17)  # sizes of the comparison, beside those that are timed
SIZES = (64, 256, 1024)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3}
BASE = "reference"


def _rows(n: int, d: int, positions: int = 1) -> Rows:
    return Rows((n, positions, 1, d))


CASES: dict[str, Callable[[int], list[Any]]] = {
    "gram": lambda d: [_rows(2 * d, d)],
    "diag_gram": lambda d: [_rows(2 * d, d)],
    "grad_square": lambda d: [_rows(8, d, 4), _rows(8, d, 4)],
    "second_moment": lambda d: [_rows(8, d, 4), _rows(8, d, 4), Orth((d, d)), Orth((d, d))],
    "ema": lambda d: [Psd((d, d)), Psd((d, d)), Scalar()],
    "moving": lambda d: [Psd((d, d)), Psd((d, d)), Scalar()],
    "inverse": lambda d: [Psd((d, d)), Scalar()],
    "eigh": lambda d: [Psd((d, d))],
    "kron_apply": lambda d: [Mat((d, d)), Psd((d, d)), Psd((d, d))],
    "rotate": lambda d: [Mat((d, d)), Orth((d, d)), Orth((d, d))],
    "mean": lambda d: [Psd((d, d)), Scalar()],
    "dot": lambda d: [Mat((d, d)), Mat((d, d))],
    "finite": lambda d: [[Mat((d, d))] * 8],
}
"""Operand types of an op by size; an op that is not listed has no benchmark."""


def bench_ops(
    names: Iterable[str] = (), device: str = "cpu", rounds: int = 20, sizes: Iterable[int] = SIZES
) -> Iterator[BenchRow]:
    """Rows of every case of the named ops (all with a case), the reference of each case first.

    Raises :class:`FxcurvError` for an op without a case, and on a device that is not there.
    """
    check_device(device)
    chosen = list(names) or list(CASES)
    for name in chosen:
        if name not in CASES or name not in OPS:
            raise FxcurvError(f"there is no benchmark of an op '{name}'; there are {', '.join(CASES)}.")
    for backend in BACKENDS:
        load(backend)
    for name in chosen:
        for size in sizes:
            yield from _case(OPS[name], size, device, rounds)


def check_device(device: str) -> None:
    """Raises :class:`FxcurvError` in one sentence when a device cannot be measured here."""
    if device not in ("cpu", "cuda"):
        raise FxcurvError(f"'{device}' is no device to measure on; choose cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise FxcurvError(
            "there is no GPU here, so nothing can be measured on cuda; fxcurv explain --device h100 estimates instead."
        )


def claiming(op: Op, operands: list[Any], device: str) -> list[Kernel]:
    """The kernels that would run an op on these types on a device."""
    result = op.infer(*operands)
    backends = ("aten",) if device == "cpu" else ("triton", "aten")
    mine = [kernel for kernel in KERNELS if kernel.op == op.name and kernel.backend in backends]
    return [kernel for kernel in mine if kernel.when(result, *operands)]


def _case(op: Op, size: int, device: str, rounds: int) -> Iterator[BenchRow]:
    types = CASES[op.name](size)
    given = values(types, device)
    case = ", ".join(f"{len(one)} x {one[0]}" if isinstance(one, list) else str(one) for one in types)
    row = BenchRow("ops", op.name, BASE, case, device, torch.get_num_threads(), error=0.0)
    sides: dict[str, Callable[[], Any]] = {BASE: lambda: op.reference(*given)}
    found = {BASE: row}
    wrong = []
    for kernel in claiming(op, types, device):
        name = f"{kernel.backend}.{kernel.name}"
        error = max((compare(op, kernel, CASES[op.name](n), device) for n in (*ODD, size)), default=0.0)
        found[name] = BenchRow("ops", op.name, name, case, device, torch.get_num_threads(), error=error)
        if error > TOLERANCE[torch.float32]:
            note = "its result differs from the reference's, so it is not timed"
            wrong.append(BenchRow(**{**found.pop(name).to_dict(), "status": WRONG, "note": note}))
            continue
        sides[name] = partial(kernel.run, *given)
    counts = {name: repeats(run) for name, run in sides.items()}
    times = interleaved({n: _repeated(run, counts[n]) for n, run in sides.items()}, rounds, 2, device)
    single = {name: [t / counts[name] for t in spent] for name, spent in times.items()}
    for name, spent in single.items():
        yield timed(found[name], spent, ratio(single, name, BASE))
    yield from wrong


def _repeated(run: Callable[[], Any], count: int) -> Callable[[], None]:
    def several() -> None:
        for _ in range(count):
            run()

    return several


def compare(op: Op, kernel: Kernel, types: list[Any], device: str) -> float:
    """Largest difference between a kernel and the float64 reference, relative to the reference's largest entry.

    Infinite where shapes differ or a number is not finite that should be; 0 where the kernel does not claim the types.
    """
    if not kernel.when(op.infer(*types), *types):
        return 0.0
    given = values(types, device)
    expected = list(tensors(op.reference(*_wide(given))))
    found = list(tensors(kernel.run(*_copied(given))))
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf")
    worst = 0.0
    for mine, theirs in zip(found, expected, strict=True):
        if not theirs.numel():
            continue
        if theirs.dtype == torch.bool:
            worst = max(worst, 0.0 if torch.equal(mine, theirs) else float("inf"))
            continue
        difference = float((mine.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp_min(1e-30))
        worst = max(worst, difference if difference == difference else float("inf"))
    return worst


def values(types: list[Any], device: str, seed: int = 0) -> list[Any]:
    """Random operands of the right kind."""

    def one(type_: Any, place: str) -> Any:
        if isinstance(type_, list):
            return [one(item, f"{place}.{k}") for k, item in enumerate(type_)]
        if not isinstance(type_, Type):
            return type_
        kind = "hyper" if isinstance(type_, Scalar) else "grad" if isinstance(type_, (Mat, Rows)) else "state"
        return random_value(Role(kind, place), type_, seed, double=False).to(device)

    return [one(type_, str(k)) for k, type_ in enumerate(types)]


def _wide(value: Any) -> Any:
    if isinstance(value, list):
        return [_wide(item) for item in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value.clone() if isinstance(value, Tensor) else value
