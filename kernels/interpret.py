"""Kernels in Triton's interpreter, on the CPU, against float64: ``python -m fxcurv.kernels.interpret [FAMILY ...]``.

Triton decides between interpreter and compiler when a kernel is first loaded, so this runs in a process of its own
(:func:`outcomes` starts one for many variants: starting costs seconds). Memory that is allocated and not written holds
NaN. Every load and store is counted, element by element under its mask: that is the traffic of the kernel as it is, to
be compared with the family's model of it. Matrix products round as tensor cores do: Triton's interpreter by itself
multiplies the bit patterns of bfloat16 as integers, and knows no tf32.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS
from fxcurv.kernels.generator import load
from fxcurv.kernels.triton import FAMILIES, Family, Variant
from fxcurv.kernels.triton.family import tensors

ARCH = "interpret"


@dataclass(frozen=True)
class Outcome:
    """What one variant did in the interpreter.

    error: largest error of any result, relative to its largest entry or to 1. problem: what else is wrong, or "".
    loaded, stored: bytes counted; modelled_load, modelled_store: by the family's model; floor: every input read once,
    every output written once. launches: kernels started.
    """

    family: str
    variant: str
    error: float
    tolerance: float
    problem: str
    loaded: int
    stored: int
    modelled_load: float
    modelled_store: float
    floor: int
    launches: int
    seconds: float

    @property
    def correct(self) -> bool:
        """Whether the results are right."""
        return not self.problem and self.error <= self.tolerance


def outcomes(families: Iterable[str] = (), timeout: float = 600) -> dict[tuple[str, str], Outcome]:
    """Run all variants of some families (none: of all) in a new process; by family and variant.

    Raises :class:`FxcurvError` when the process fails as a whole.
    """
    root = str(Path(__file__).resolve().parents[1])
    search = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "fxcurv.kernels.interpret", "--json", *families],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    found = [Outcome(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode not in (0, 1) or not found:
        after = f"after {found[-1].family} {found[-1].variant}" if found else "before the first variant"
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise FxcurvError(f"the interpreter's process ended {after}: {why}")
    return {(outcome.family, outcome.variant): outcome for outcome in found}


def interpret(family: Family, variant: Variant) -> Outcome:
    """Run one variant in this process, which must have set TRITON_INTERPRET=1 before it imported Triton."""
    start = time.perf_counter()
    operands = variant.operands()
    before = _nest(operands, torch.clone)
    expected = (variant.naive or family.naive)(*operands)
    module = load(family.source(variant.geometry, ARCH))
    counts = {"load": 0, "store": 0, "launch": 0}
    problem, result, error = "", None, 0.0
    with poisoned(), counted(counts), rounded():
        try:
            result = module.launch(*operands)
        except Exception as failure:
            problem = f"launch failed: {type(failure).__name__}: {str(failure) or failure.__cause__}"
    if not problem:
        got, want = list(tensors(result)), list(tensors(expected))
        problem = _structure(got, want) or _purity(operands, before, got)
        if family.op and variant.naive is None:
            problem = problem or _definition(family, operands, got, want)
        error = max((_error(x, y) for x, y in zip(got, want, strict=False)), default=0.0)
    model = family.cost(family.values(variant.geometry, ARCH), *operands)
    return Outcome(
        family.name,
        variant.name,
        error,
        variant.tolerance,
        problem,
        counts["load"],
        counts["store"],
        model.read + model.reread,
        model.written,
        floor(operands, result),
        counts["launch"],
        time.perf_counter() - start,
    )


def floor(operands: Any, result: Any) -> int:
    """Bytes of every distinct input read once and every output written once."""
    inputs = {(x.untyped_storage().data_ptr(), x.storage_offset(), x.shape, x.stride()): x for x in tensors(operands)}
    read = sum(min(x.numel() * x.dtype.itemsize, x.untyped_storage().nbytes()) for x in inputs.values())
    return read + sum(x.numel() * x.dtype.itemsize for x in tensors(result))


def _structure(got: list[Tensor], want: list[Tensor]) -> str:
    """What is wrong with number or shapes of the results."""
    shapes, wanted = [tuple(x.shape) for x in got], [tuple(x.shape) for x in want]
    return "" if shapes == wanted else f"results have shapes {shapes}, not {wanted}"


def _definition(family: Family, operands: tuple[Any, ...], got: list[Tensor], want: list[Tensor]) -> str:
    """Whether dtypes are those of the op, and the family's own float64 results are what the op defines."""
    reference = OPS[family.op].reference
    dtypes, given = [x.dtype for x in tensors(reference(*operands))], [x.dtype for x in got]
    if dtypes != given:
        return f"results have dtypes {given}, the op's {dtypes}"
    exact = tensors(reference(*_nest(operands, lambda x: x.double() if x.is_floating_point() else x)))
    worst = max((_error(x, y) for x, y in zip(want, exact, strict=True)), default=0.0)
    return f"naive differs from the op's reference by {worst:.0e}" if worst > 1e-9 else ""


def _purity(operands: tuple[Any, ...], before: Any, got: list[Tensor]) -> str:
    """Whether an operand was written, or a result shares its memory."""
    for x, y in zip(tensors(operands), tensors(before), strict=True):
        if not torch.equal(x.nan_to_num(), y.nan_to_num()):
            return "an operand was written"
    storages = {x.untyped_storage().data_ptr() for x in tensors(operands) if x.numel()}
    shared = any(x.untyped_storage().data_ptr() in storages for x in got if x.numel())
    return "a result shares memory with an operand" if shared else ""


def _error(got: Tensor, want: Tensor) -> float:
    """Largest error relative to the largest finite entry, or to 1; infinite where one is finite and the other not."""
    got, want = got.double(), want.double()
    if got.shape != want.shape:
        return float("inf")
    same = (got == want) | (got.isnan() & want.isnan())
    if bool((~same & ~(got.isfinite() & want.isfinite())).any()):
        return float("inf")
    difference = torch.where(same, 0.0, got - want)
    scale = torch.where(want.isfinite(), want, 0.0).abs().amax() if want.numel() else torch.zeros(())
    return float(difference.abs().amax() / scale.clamp_min(1.0)) if want.numel() else 0.0


def _nest(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    return [_nest(item, change) for item in value] if isinstance(value, (list, tuple)) else value


@contextmanager
def poisoned() -> Iterator[None]:
    """Let every way to allocate without writing give NaN (the largest number for integers)."""

    def full_of_nan(make: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            fresh: Tensor = make(*args, **kwargs)
            return fresh.fill_(float("nan") if fresh.is_floating_point() else torch.iinfo(fresh.dtype).max)

        return made

    places = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")]
    originals = [getattr(owner, name) for owner, name in places]
    try:
        for (owner, name), make in zip(places, originals, strict=True):
            setattr(owner, name, full_of_nan(make))
        yield
    finally:
        for (owner, name), make in zip(places, originals, strict=True):
            setattr(owner, name, make)


@contextmanager
def counted(counts: dict[str, int]) -> Iterator[None]:
    """Count bytes loaded and stored by kernels, element by element where the mask is true, and kernels started."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load_, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def size(pointers: Any, mask: Any) -> int:
        return int(mask.data.sum()) * (pointers.get_element_ty().primitive_bitwidth // 8)

    def loading(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        counts["load"] += size(ptrs, mask)
        return load_(self, ptrs, mask, *rest)

    def storing(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        counts["store"] += size(ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    def launching(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts["launch"] += 1
        return call(self, *args, **kwargs)

    try:
        builder.create_masked_load, builder.create_masked_store, executor.__call__ = loading, storing, launching
        yield
    finally:
        builder.create_masked_load, builder.create_masked_store, executor.__call__ = load_, store, call


@contextmanager
def rounded() -> Iterator[None]:
    """Multiply bfloat16 as the numbers that they are, and float32 rounded to 10 bits where a product says tf32."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot
    tf32 = interpreter._ir.INPUT_PRECISION.TF32

    def numbers(handle: Any, precision: Any) -> Any:
        bits = handle.data
        if handle.dtype.scalar == interpreter.tl.bfloat16:
            wide = (bits.astype(np.uint32) << 16).view(np.float32)
        elif handle.dtype.scalar == interpreter.tl.float32 and precision == tf32:
            wide = ((bits.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
        else:
            return handle
        return interpreter.TensorHandle(wide, interpreter.tl.float32)

    def multiplied(self: Any, a: Any, b: Any, d: Any, precision: Any, *rest: Any) -> Any:
        return dot(self, numbers(a, precision), numbers(b, precision), d, precision, *rest)

    try:
        builder.create_dot = multiplied
        yield
    finally:
        builder.create_dot = dot


def selected(names: Sequence[str]) -> list[Family]:
    """Families by name, all without names; raises :class:`FxcurvError` for one that does not exist."""
    unknown = [name for name in names if name not in FAMILIES]
    if unknown:
        raise FxcurvError(f"there is no kernel family '{unknown[0]}'; there are {', '.join(FAMILIES)}.")
    return [FAMILIES[name] for name in names or FAMILIES]


def main(arguments: Sequence[str]) -> int:
    """Print the outcome of every variant; returns 1 if one is wrong."""
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise FxcurvError("Triton is already imported for compiling: set TRITON_INTERPRET=1 before the process starts.")
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    as_json, wrong = "--json" in arguments, 0
    for family in selected([name for name in arguments if name != "--json"]):
        for variant in family.variants():
            if not variant.run:
                continue
            found = interpret(family, variant)
            wrong += not found.correct
            if as_json:
                print(json.dumps(dataclasses.asdict(found)), flush=True)
            else:
                verdict = "ok   " if found.correct else "WRONG"
                print(
                    f"{verdict} {found.family} {found.variant}: error {found.error:.1e} of {found.tolerance:.0e}, "
                    f"loads {found.loaded} (model {found.modelled_load:.0f}), stores {found.stored} (model "
                    f"{found.modelled_store:.0f}), floor {found.floor}, {found.launches} launches, "
                    f"{found.seconds:.2f} s {found.problem}",
                    flush=True,
                )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
