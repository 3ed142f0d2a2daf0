"""Which kernel runs an op. An op's reference is its definition; a kernel is a faster way to the same result.

A kernel claims a node through its ``when``, a predicate on types alone, so the choice is made once, when a program is
lowered, and never while it runs. What is only known at run time (the number of rows, the device) a kernel decides
itself. A node that no kernel claims runs the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

import fxcurv.ir.ops  # noqa: F401  (an op must exist before a kernel can name it)
from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS

BACKENDS = {"aten": "fxcurv.kernels.aten", "triton": "fxcurv.kernels.triton"}
"""Name of a backend -> package whose import registers its kernels."""


@dataclass(frozen=True)
class Kernel:
    """A faster implementation of one op.

    op: name of the op; name: name of the kernel, unique for its op and backend.
    backend: "aten" (any device) or "triton" (a GPU).
    when: (result type, *operand types) -> whether the kernel is right and worth it for them; an op with several
        results gives a tuple of types, a list operand a list of types, a literal operand stays as it is.
    run: takes the op's operands and returns its result, pure as the reference is.
    doc: how it works and how much faster it was measured to be, where.
    specialised: for a kernel that is generated for the types of a node: (what runs on other devices or ``None``, result
        type, *operand types) -> what runs in place of ``run``.
    """

    op: str
    name: str
    backend: str
    when: Callable[..., bool]
    run: Callable[..., Any]
    doc: str
    specialised: Callable[..., Callable[..., Any]] | None = None

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise FxcurvError(f"kernel '{self.name}' is for an op '{self.op}' that does not exist.")
        if self.backend not in BACKENDS:
            raise FxcurvError(f"kernel '{self.name}' has backend '{self.backend}'; known are {', '.join(BACKENDS)}.")

    def __call__(self, *operands: Any) -> Any:
        return self.run(*operands)


KERNELS: list[Kernel] = []
"""All registered kernels; of several that claim a node, the first of the preferred backend runs."""


def register(kernel: Kernel) -> Kernel:
    """Add a kernel; raises :class:`FxcurvError` when its op and backend already have one of that name."""
    key = (kernel.op, kernel.backend, kernel.name)
    if any((known.op, known.backend, known.name) == key for known in KERNELS):
        raise FxcurvError(
            f"op '{kernel.op}' already has a {kernel.backend} kernel '{kernel.name}'; choose another name."
        )
    KERNELS.append(kernel)
    return kernel


@cache
def load(backend: str) -> bool:
    """Import a backend's kernels; returns whether it can be used here."""
    package = find_spec(BACKENDS[backend])
    if package is None or package.origin is None or (backend == "triton" and find_spec("triton") is None):
        return False
    import_module(BACKENDS[backend])
    return True


def preferred(backend: str) -> tuple[str, ...]:
    """Backends to try in order. "auto" is Triton before ATen with a GPU, ATen alone without; "reference" is none.

    Raises :class:`FxcurvError` for an unknown name.
    """
    if backend == "reference":
        return ()
    if backend == "auto":
        return ("triton", "aten") if torch.cuda.is_available() else ("aten",)
    if backend not in BACKENDS:
        raise FxcurvError(f"there is no backend '{backend}'; choose auto, reference, {' or '.join(BACKENDS)}.")
    if not load(backend):
        missing = backend == "triton" and find_spec("triton") is None
        why = "install the package triton" if missing else f"there are no {backend} kernels to load"
        raise FxcurvError(f"backend '{backend}' cannot be used here: {why}, or use 'auto'.")
    return (backend,)


def select(op_name: str, result_type: Any, operand_types: Any, backend: str = "auto") -> Kernel | None:
    """The kernel that runs an op on these types, or ``None`` for its reference.

    result_type: a type, or a tuple of them; operand_types: a sequence as ``Op.infer`` takes it. A generated kernel
    comes specialised to the types, under the name of its source. With "auto" it leaves tensors that are on the CPU to
    the kernel that would have been chosen without it.
    """
    claiming = [
        kernel
        for name in preferred(backend)
        if load(name)
        for kernel in KERNELS
        if kernel.op == op_name and kernel.backend == name and kernel.when(result_type, *operand_types)
    ]
    if not claiming:
        return None
    first = claiming[0]
    if first.specialised is None:
        return first
    other = next((kernel.run for kernel in claiming if kernel.specialised is None), OPS[op_name].reference)
    run = first.specialised(other if backend == "auto" else None, result_type, *operand_types)
    return replace(first, name=getattr(run, "__name__", first.name), run=run)
