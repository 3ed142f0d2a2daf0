"""A family of generated kernels: one op, one template, every geometry that it claims.

How to add a family
-------------------
1. ``kernels/triton/templates/NAME.py.jinja``: one or more ``@triton.jit`` kernels and a host function ``launch`` that
   takes the op's operands, allocates the results with ``torch.empty``, starts the kernels and returns the results. The
   file header with the imports is written for you. Constants of the geometry are baked in; whatever may change from
   step to step (the number of rows, strides) is an argument. The rules: a comment on every pointer argument, addresses
   in int64 (``common.jinja`` has macros), every load and store masked, every element of every output written, no
   atomics, and nothing in ``launch`` that waits for the device (no ``.item()``, no shape that depends on values).
   Scalars are 0-dimensional tensors, read by the kernel; literal operands of a node are part of the geometry.
2. ``kernels/triton/NAME.py``: one :class:`Family`, which registers itself when the module is imported. Add the module
   to the list in ``kernels/triton/__init__.py``. Its parts:

   ``geometry(result_type, *operand_types)`` is the claim: the variables of the template, or ``None`` for a node that
   the family does not take. Types may have unknown sizes (``None``); a size that is baked in must be known.
   ``naive(*operands)`` computes the results in float64 in plain torch, written independently of the op's reference.
   ``variants()`` yields a :class:`Variant` for each specialisation to prove: odd sizes, primes, 1, dtypes, strides.
   ``cost(values, *operands)`` is the model of the traffic as a :class:`Traffic`, ``values`` being geometry and tuning.
3. ``kernels/tuned/NAME.toml``: block sizes, warps and stages by architecture and bucket (:mod:`fxcurv.kernels.tuned`).
   Its values are variables of the template too. ``num_warps`` and ``num_stages`` are passed on by ``launch``.

That is all. The tests then find the family by itself, and for every variant
  * run it in Triton's interpreter, uninitialised memory full of NaN, against ``naive`` (``kernels/interpret.py``);
  * count the bytes that the interpreter really loads and stores and compare them with ``cost``, and ``cost`` with the
    floor (every input read once, every output written once): at most 1.15 times it where memory is the limit;
  * compile exactly what ``launch`` would start, ahead of time for every target, and check spills, shared memory and
    tensor-core instructions (``kernels/aot.py``; ``fxcurv kernels --aot`` prints the table).

    python -m fxcurv.kernels.interpret NAME          # errors of all variants of a family, from a shell
    python -m fxcurv.kernels.aot NAME                # registers, spills, shared memory, instructions

A family with ``op=""`` claims no node: other code calls it by ``specialise(family, geometry)``. A family must not
import triton, only its generated sources do: rendering works on any machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.kernels.generator import Source, load, render
from fxcurv.kernels.registry import Kernel, register
from fxcurv.kernels.triton.library import add, as_operation, is_single, watched
from fxcurv.kernels.tuned import lookup

Geometry = Mapping[str, Any]
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Types of operands that kernels take, by their name in geometries."""


@dataclass(frozen=True)
class Traffic:
    """What one launch moves and computes, as bytes and operations.

    read, written: between memory and the chip. flops: floating-point operations (a multiply-add is two).
    reread: bytes that the second-level cache answers, because programs running at the same time have asked for them or
    the kernel before has just written them; the interpreter counts them with ``read``, the comparison with the floor
    does not.
    """

    read: float
    written: float
    flops: float
    reread: float = 0.0


@dataclass(frozen=True)
class Variant:
    """One specialisation to prove.

    name: unique in its family. geometry: as ``Family.geometry`` gives it. operands: makes the operands, always the same
    ones, on the CPU. tolerance: largest error allowed, relative to the largest entry of each result (or to 1).
    dot: whether tensor cores must be used (a matrix product of fp16, bf16 or tf32 numbers).
    run: in the interpreter (a large variant only compiles). compile: ahead of time; quick: also in the default tests.
    naive: in place of the family's, where ``launch`` does more for these operands than the op.
    """

    name: str
    geometry: Geometry
    operands: Callable[[], tuple[Any, ...]]
    tolerance: float = 2e-5
    dot: bool = False
    run: bool = True
    compile: bool = True
    quick: bool = False
    naive: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Family:
    """A template and what it claims, computes and costs; see the module's docstring.

    name: of the family, of its tuning table and of its tests. op: name in OPS of the op it serves, or "".
    template: file in ``templates/``. label: start of the names of its sources, filled in from the geometry.
    doc: how it works; its first sentence heads the generated files. tuned: whose tuning table it uses, if not its own.
    """

    name: str
    op: str
    template: str
    label: str
    geometry: Callable[..., Geometry | None]
    naive: Callable[..., Any]
    variants: Callable[[], Iterable[Variant]]
    cost: Callable[..., Traffic]
    doc: str
    tuned: str = ""

    def __post_init__(self) -> None:
        if self.name in FAMILIES:
            raise FxcurvError(f"there are two families of kernels called '{self.name}'; choose another name.")
        FAMILIES[self.name] = self
        if self.op:
            register(Kernel(self.op, self.name, "triton", self._claim(), self.run, self.doc, self.specialised))

    def _claim(self) -> Callable[..., bool]:
        """Whether there is a geometry, documented as the geometry is."""

        def when(result: Any, *operands: Any) -> bool:
            return self.geometry(result, *operands) is not None

        when.__doc__ = (self.geometry.func if isinstance(self.geometry, partial) else self.geometry).__doc__
        return when

    def specialised(self, fallback: Callable[..., Any] | None, result: Any, *operands: Any) -> Specialised:
        """The kernel for a node of these types."""
        geometry = self.geometry(result, *operands)
        assert geometry is not None
        return specialise(self, geometry, fallback)

    def run(self, *operands: Any) -> Any:
        """Types decide on a kernel, so a family alone cannot run: :meth:`specialised` gives what can."""
        raise FxcurvError(f"kernel family '{self.name}' runs only after it is specialised to the types of a node.")

    def values(self, geometry: Geometry, arch: str) -> dict[str, Any]:
        """Geometry and tuning together: the variables of the template."""
        return {**geometry, **lookup(self.tuned or self.name, arch, geometry)}

    def source(self, geometry: Geometry, arch: str) -> Source:
        """The generated file for a geometry, tuned for an architecture."""
        return render(
            self.template,
            title=" ".join(self.doc.split()).partition(". ")[0].rstrip(".") + ".",
            label=f"{self.name}_{self.label.format(**geometry)}".rstrip("_"),
            geometry=geometry,
            config=lookup(self.tuned or self.name, arch, geometry),
            arch=arch,
        )


FAMILIES: dict[str, Family] = {}
"""All families by name; filled by importing :mod:`fxcurv.kernels.triton`."""


@dataclass(frozen=True)
class Specialised:
    """A kernel for one geometry: callable with the op's operands, its ``source`` to be read before anything runs.

    fallback: what runs instead when the operands are not on a GPU; without one that is an error. single: whether
    ``launch`` returns one tensor.
    """

    family: str
    source: Source
    fallback: Callable[..., Any] | None = None
    single: bool = True

    @property
    def __name__(self) -> str:
        return self.source.name

    @property
    def launch(self) -> Callable[..., Any]:
        """The host function of the generated module; loads it when first asked for."""
        return load(self.source).launch  # type: ignore[no-any-return]

    def __call__(self, *operands: Any) -> Any:
        on_gpu = next((tensor for tensor in tensors(operands) if tensor.is_cuda), None)
        if on_gpu is not None and watched():
            return as_operation(self.source.key, self.single, operands)
        if on_gpu is not None and on_gpu.device.index != torch.cuda.current_device():
            with torch.cuda.device(on_gpu.device):  # kernels start on the current device, wherever their operands are
                return self.launch(*operands)
        if on_gpu is not None or interpreting():
            return self.launch(*operands)
        if self.fallback is not None:
            return self.fallback(*operands)
        raise FxcurvError(
            f"kernel {self.source.name} needs a GPU and got tensors on the CPU: use backend='aten' or 'auto', move the "
            "model to a GPU, or set TRITON_INTERPRET=1 to run kernels in Triton's interpreter."
        )


def interpreting() -> bool:
    """Whether Triton's interpreter runs kernels on the CPU; it must be chosen before a kernel is first loaded."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def tensors(operands: Any) -> Iterator[Tensor]:
    """All tensors in a nest of tuples and lists."""
    if isinstance(operands, Tensor):
        yield operands
    elif isinstance(operands, (tuple, list)):
        for operand in operands:
            yield from tensors(operand)


def specialise(family: Family, geometry: Geometry, fallback: Callable[..., Any] | None = None) -> Specialised:
    """The kernel of a family for a geometry and the GPU at hand; equal ones are one object."""
    return _specialised(family.name, family.source(geometry, architecture()), fallback)


@cache
def _specialised(family: str, source: Source, fallback: Callable[..., Any] | None) -> Specialised:
    add(source)
    return Specialised(family, source, fallback, is_single(source))


@cache
def architecture() -> str:
    """What kernels are tuned for here: the GPU's name as in ``kernels/tuned``, sm_90 on a machine without one."""
    if not torch.cuda.is_available():
        return "sm_90"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(0).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def precision(dtype: torch.dtype) -> str:
    """How a matrix product of ``dtype`` is computed: "tf32" for float32 where torch may use it, else "ieee"."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Operands for variants: standard normal numbers, the same ones every time."""
    generator = torch.Generator().manual_seed(seed + 7919 * sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float32).to(dtype)
