"""Compiled for GPUs that are not there: ``fxcurv kernels --aot``, ``python -m fxcurv.kernels.aot [FAMILY ...]``.

A family's ``launch`` is run with its kernels replaced by recorders, so what is compiled is exactly what would have been
started: signature, constants, alignment, warps and stages. The compilers for all targets ship with Triton and need no
device. From the result come registers, spills, shared memory and the number of tensor-core instructions. Results are
kept in the kernel cache under a hash of everything that decides on them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.kernels.generator import cache_folder, load, write
from fxcurv.kernels.interpret import selected
from fxcurv.kernels.triton import FAMILIES
from fxcurv.kernels.triton.family import interpreting

Job = tuple[str, str, str]  # family, variant, architecture
FORMAT = 1
"""Raised when what is stored changes its meaning."""


@dataclass(frozen=True)
class Target:
    """A kind of GPU: Triton's name for it, threads of a warp, and the largest shared memory of a block in bytes."""

    backend: str
    arch: int | str
    warp: int
    shared: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 166_912),  # A100: 163 KB a block
    "sm_90": Target("cuda", 90, 32, 232_448),  # H100: 227 KB a block
    "gfx942": Target("hip", "gfx942", 64, 65_536),  # MI300: 64 KB of LDS
}
TENSOR_CORES = {
    "cuda": re.compile(r"^\s*(?:@\S+\s+)?(?:mma\.sync|wgmma\.mma_async)", re.M),
    "hip": re.compile(r"^\s*v_mfma", re.M),
}


@dataclass(frozen=True)
class Launch:
    """One recorded start of a kernel: arguments by name, in order, and options such as ``num_warps``."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]
    grid: tuple[int, ...]


@dataclass(frozen=True)
class Binary:
    """What the compiler made of one kernel of a variant.

    registers: of a thread; spills: bytes of a thread (cuda) or registers (hip) that did not fit; shared: bytes of a
    block; tensor_cores: matrix instructions in the code; seconds: to compile, when it was.
    """

    family: str
    variant: str
    arch: str
    kernel: str
    registers: int
    spills: int
    shared: int
    tensor_cores: int
    warps: int
    seconds: float


class Recorder:
    """Stands for a kernel in a generated module: ``recorder[grid](...)`` notes the call and starts nothing."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def start(*positional: Any, **named: Any) -> None:
            names = self.kernel.arg_names
            arguments = dict(zip(names, positional, strict=False))
            arguments |= {name: named.pop(name) for name in names if name in named}
            missing = [p.name for p in self.kernel.params if p.name not in arguments and not p.has_default]
            if missing:
                raise FxcurvError(f"kernel {self.kernel.__name__} is started without '{missing[0]}'.")
            arguments |= {p.name: p.default for p in self.kernel.params if p.name not in arguments}
            sizes = grid(arguments) if callable(grid) else grid
            self.launches.append(
                Launch(self.kernel, {name: arguments[name] for name in names}, named, tuple(map(int, sizes)))
            )

        return start


def record(module: ModuleType, operands: tuple[Any, ...]) -> tuple[list[Launch], Any]:
    """Every kernel that ``module.launch(*operands)`` starts, and the results, whose memory is not written."""
    from triton.runtime import JITFunction

    launches: list[Launch] = []
    kernels = {name: value for name, value in vars(module).items() if isinstance(value, JITFunction)}
    try:
        vars(module).update({name: Recorder(kernel, launches) for name, kernel in kernels.items()})
        result = module.launch(*operands)
    finally:
        vars(module).update(kernels)
    return launches, result


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Types of the arguments, constants, and which are divisible by 16: how Triton itself specialises a call."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, param in enumerate(launch.kernel.params):
        value = launch.arguments[param.name]
        one = isinstance(value, int) and value == 1 and not param.do_not_specialize
        if param.is_constexpr or value is None or one:
            types[param.name], constants[param.name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            types[param.name] = "*" + _POINTERS[value.dtype]
            aligned = value.data_ptr() % 16 == 0
        elif isinstance(value, bool):
            types[param.name], aligned = "i1", False
        elif isinstance(value, int):
            types[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        elif isinstance(value, float):
            types[param.name], aligned = "fp32", False
        else:
            raise FxcurvError(f"kernel {launch.kernel.__name__} got a {type(value).__name__} for '{param.name}'.")
        if aligned and not param.do_not_specialize and not param.do_not_specialize_on_alignment:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


_POINTERS = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64", torch.int8: "i8",
    torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip


def compile_variant(family: str, variant: str, arch: str) -> list[Binary]:
    """Compile every kernel that a variant's ``launch`` starts for one of TARGETS; from the cache when it is there.

    Raises :class:`FxcurvError` in a process that runs kernels in the interpreter, or when a kernel does not compile.
    """
    if interpreting():
        raise FxcurvError("TRITON_INTERPRET=1 is set: kernels are interpreted in this process and cannot be compiled.")
    import triton

    one = next(v for v in FAMILIES[family].variants() if v.name == variant)
    source = FAMILIES[family].source(one.geometry, arch)
    launches, _ = record(load(source), one.operands())
    if not launches:
        raise FxcurvError(f"variant '{variant}' of kernel family '{family}' starts no kernel: give it other operands.")
    found, seen = [], set()
    for launch in launches:
        call = (launch.kernel.__name__, signature(launch), launch.options)
        what = repr((FORMAT, triton.__version__, arch, source.key, *call))
        if what not in seen:
            seen.add(what)
            numbers = _cached(hashlib.sha256(what.encode()).hexdigest(), partial(_compile, launch, arch))
            found.append(Binary(family=family, variant=variant, arch=arch, kernel=launch.kernel.__name__, **numbers))
    return found


def _cached(key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    path = cache_folder("aot") / f"{key}.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        numbers = compute()
        write(path, json.dumps(numbers))
        return numbers


def _compile(launch: Launch, arch: str) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = TARGETS[arch]
    types, constants, attributes = signature(launch)
    start = time.perf_counter()
    try:
        compiled = triton.compile(
            ASTSource(launch.kernel, types, constants, attributes),
            target=GPUTarget(target.backend, target.arch, target.warp),
            options={"enable_fp_fusion": True, **launch.options},
        )
    except Exception as error:
        raise FxcurvError(f"kernel {launch.kernel.__name__} does not compile for {arch}: {error}") from error
    seconds = time.perf_counter() - start
    if target.backend == "cuda":
        code, (registers, spills) = compiled.asm["ptx"], _cuda_resources(compiled.asm["cubin"])
    else:
        code = compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s*(\d+)", code)
        spills = _number(r"\.vgpr_spill_count:\s*(\d+)", code) + _number(r"\.sgpr_spill_count:\s*(\d+)", code)
    return {
        "registers": registers,
        "spills": spills,
        "shared": int(compiled.metadata.shared),
        "tensor_cores": len(TENSOR_CORES[target.backend].findall(code)),
        "warps": int(compiled.metadata.num_warps),
        "seconds": round(seconds, 2),
    }


def _cuda_resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack and local memory of the kernel in a binary, by the cuobjdump in Triton's wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if "REG:" in line)
    return _number(r"REG:(\d+)", line), _number(r"STACK:(\d+)", line) + _number(r"LOCAL:(\d+)", line)


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise FxcurvError(f"the compiler's output has no '{pattern}'; this version of Triton writes it differently.")
    return int(match[1])


def jobs(names: Iterable[str] = (), archs: Iterable[str] = tuple(TARGETS), quick: bool = False) -> list[Job]:
    """(family, variant, architecture) of everything to compile; quick: of the variants that are marked so."""
    return [
        (family.name, variant.name, arch)
        for family in selected(tuple(names))
        for variant in family.variants()
        for arch in archs
        if variant.compile and (variant.quick or not quick)
    ]


def table(work: Sequence[Job], processes: int = 1) -> Iterator[list[Binary]]:
    """The binaries of each job, compiled in several processes if there are many; in the order of ``work``."""
    if processes < 2 or len(work) < 2:
        yield from (compile_variant(*job) for job in work)
        return
    with ProcessPoolExecutor(min(processes, len(work)), mp_context=get_context("spawn")) as pool:
        yield from pool.map(compile_variant, *zip(*work, strict=True))


def main(arguments: Sequence[str]) -> int:
    """Print one line a binary."""
    for found in table(jobs(arguments)):
        for binary in found:
            print(json.dumps(dataclasses.asdict(binary)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
