"""What a slice asks of the device, found without a device: its calls are run on fake tensors and every one is noted.

A slice is a straight line of kernels and references, so one run under ``FakeTensorMode`` on fake CUDA tensors (which
need no GPU) reaches the dispatcher with exactly the operations that a real step would. Each is noted with the program
node it works for, whether it launches work on the device, and why the host would have to wait for the device there.
Counting launches and refusing synchronisation are two ways to read that list: :mod:`fxcurv.passes.launches` and
:mod:`fxcurv.passes.syncfree`.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxcurv.ir.cost import sized
from fxcurv.ir.program import Role
from fxcurv.ir.types import Type
from fxcurv.passes.lower import Bundle, Lowered, Slice

WAITS = {
    "aten._local_scalar_dense": "reads a number on the host",
    "aten.equal": "compares on the host",
    "aten.is_nonzero": "reads a truth value on the host",
    "aten.nonzero": "the size of its result depends on values",
    "aten.masked_select": "the size of its result depends on values",
    "aten.unique_dim": "the size of its result depends on values",
    "aten._unique2": "the size of its result depends on values",
    "aten.unique_consecutive": "the size of its result depends on values",
    "aten.unique_dim_consecutive": "the size of its result depends on values",
    "aten.bincount": "the size of its result depends on values",
    "aten.repeat_interleave": "the size of its result depends on values",
    "aten._linalg_check_errors": "looks at the errors of a factorisation",
    "aten._linalg_eigh": "looks at the errors of the decomposition, and has no form that does not",
    "aten._linalg_eigvals": "looks at the errors of the decomposition, and has no form that does not",
    "aten.linalg_eig": "looks at the errors of the decomposition, and has no form that does not",
    "aten._linalg_svd": "looks at the errors of the decomposition, and has no form that does not",
    "aten.linalg_lstsq": "looks at the errors of the solve",
    "aten.cholesky_inverse": "looks at the errors of the inversion",
}
"""Dispatcher op (without overload) -> why the host waits for a GPU in it."""

ALLOCATES = frozenset({"aten.empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty", "aten.lift_fresh"})
ALLOCATES |= {"aten.new_empty_strided", "aten.detach", "aten.alias", "prim.device"}
"""Dispatcher ops that do no work on the device."""


@dataclass(frozen=True)
class Dispatched:
    """One operation that reached the dispatcher.

    node: name of the program node it worked for. op: such as "aten.mm", or "triton.<kernel>" for a generated kernel.
    launches: whether it starts work on the device; an operation of a library (a factorisation) counts as one.
    waits: why the host waits for the device in it; empty if it does not.
    """

    node: str
    op: str
    launches: bool
    waits: str = ""


class FakeOracle:
    """Stands for the model in ops that call it: products of the right shape, at no cost."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """A fresh vector for each one given."""
        return [torch.empty_like(vector) for vector in vectors]


def dispatched(lowered: Lowered, piece: Slice, rows: int = 64, device: str = "cuda") -> tuple[Dispatched, ...]:
    """Everything a slice would ask of ``device``, in order, up to the first operation that needs a real value.

    rows: taken for every size that is known only when the program runs, such as the rows of a statistic.
    """
    recorder = Recorder(piece.function.__code__.co_filename, piece.source.splitlines(), device)
    with torch.no_grad(), FakeTensorMode():
        inputs = list(fake_inputs(lowered, piece, rows, device))
        with Unguarded(), recorder:
            try:
                piece.function(*inputs)
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                recorder.stopped(error)
    return tuple(recorder.found)


def fake_inputs(lowered: Lowered, piece: Slice, rows: int, device: str) -> Iterator[Any]:
    """A value of the right size for every input of a slice, made under the fake mode in force."""
    types = {role: node.meta["type"] for role, node in lowered.program.inputs().items()}
    for role in piece.inputs:
        if isinstance(role, Bundle):
            one = fake(types[role.roles[0]], rows, device)
            yield one.new_empty(len(role.roles), *one.shape)
        else:
            yield fake_oracle(types, device) if role.kind == "oracle" else fake(types[role], rows, device)


def fake(type_: Type, rows: int, device: str) -> Tensor:
    """An empty tensor of a type."""
    full = sized(type_, rows)
    return torch.empty([size or 0 for size in full.shape], dtype=full.dtype, device=device)


def fake_oracle(types: Mapping[Role, Type], device: str) -> FakeOracle:
    """An oracle over the parameters whose gradients a program reads."""
    return FakeOracle([fake(type_, 1, device) for role, type_ in types.items() if role.kind == "grad"])


class Unguarded(TorchFunctionMode):
    """The few tensor methods that ask torch for the device itself, which a build without GPU support refuses.

    Indexing and copies are spelled with other operations of the same effect; reading a value on the host is what no
    fake tensor can do.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__getitem__:
            x, index = args
            parts = index if isinstance(index, tuple) else (index,)
            if all(part is None or part is Ellipsis or isinstance(part, (int, slice)) for part in parts):
                return _indexed(x, parts)
        elif func is torch.Tensor.contiguous and not kwargs and len(args) == 1:
            x = args[0]
            return x if x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)
        elif func in READ_ON_HOST:
            raise DataDependentOutputException(READ_ON_HOST[func])
        return func(*args, **kwargs)


_NUMBER = torch.ops.aten._local_scalar_dense.default
READ_ON_HOST = {
    torch.Tensor.item: _NUMBER,
    torch.Tensor.tolist: _NUMBER,
    torch.Tensor.__bool__: _NUMBER,
    torch.Tensor.__int__: _NUMBER,
    torch.Tensor.__float__: _NUMBER,
    torch.Tensor.__index__: _NUMBER,
    torch.Tensor.nonzero: torch.ops.aten.nonzero.default,
    torch.nonzero: torch.ops.aten.nonzero.default,
}
"""Functions whose result the host needs -> the operation that they come to."""


def _indexed(x: Tensor, parts: tuple[Any, ...]) -> Tensor:
    """``x[parts]`` for integers, slices, ``None`` and one ellipsis."""
    used = sum(part is not None and part is not Ellipsis for part in parts)
    axis = 0
    for part in parts:
        if part is Ellipsis:
            axis += x.ndim - axis - (used - sum(p is not None for p in parts[: parts.index(Ellipsis)]))
        elif part is None:
            x, axis = x.unsqueeze(axis), axis + 1
        elif isinstance(part, int):
            x = x.select(axis, part)
        else:
            start, stop, step = part.indices(x.shape[axis])
            x, axis = torch.ops.aten.slice.Tensor(x, axis, start, max(start, stop), step), axis + 1
    return x


class Recorder(TorchDispatchMode):
    """Notes every operation that the code of one file sends to the dispatcher.

    filename: the file that a frame of the slice names. lines: its text, one assignment a line; the running one says
    which node is being computed. device: where work counts.
    """

    supports_higher_order_operators = True

    def __init__(self, filename: str, lines: Sequence[str], device: str) -> None:
        super().__init__()
        self.filename, self.lines, self.device = filename, lines, torch.device(device).type
        self.found: list[Dispatched] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):  # a Triton kernel writes into its operands and returns nothing
            self.note(f"triton.{_kernel_name(kwargs)}", True, "")
            return None
        op = str(func.overloadpacket)
        if op == "fxcurv.generated":
            from fxcurv.kernels.triton.library import trace

            with self:  # the kernels inside are what is launched
                return trace(*args)
        try:
            result = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            self.note(op, False, WAITS.get(op, "needs a value on the host"))
            raise
        crossing = _crosses(args, kwargs, result)
        waits = "copies between the host and the device" if crossing else WAITS.get(op, "")
        if op in ("aten.linalg_cholesky_ex", "aten.linalg_inv_ex", "aten._linalg_solve_ex") and kwargs.get(
            "check_errors"
        ):
            waits = "looks at the errors of a factorisation"
        works = any(x.device.type == self.device for x in _tensors(result))
        self.note(op, works and op not in ALLOCATES and not _is_view(func), waits)
        return result

    def note(self, op: str, launches: bool, waits: str) -> None:
        """Add an operation of the node that is being run."""
        if launches or waits:
            self.found.append(Dispatched(self.node(), op, launches, waits))

    def node(self) -> str:
        """The node whose line is running; empty outside the slice's own code."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and not self.owns(frame):
            frame = frame.f_back
        return "" if frame is None else self.title(frame.f_lineno)

    def owns(self, frame: FrameType) -> bool:
        """Whether a frame is the slice's."""
        return frame.f_code.co_filename == self.filename

    def title(self, line: int) -> str:
        """The node that a line assigns."""
        return self.lines[line - 1].split(" = ")[0].strip()

    def stopped(self, error: Exception) -> None:
        """Note that nothing after a data-dependent operation could be seen."""
        op = str(error.args[0].overloadpacket)
        if not self.found or self.found[-1].op != op:
            lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if self.owns(frame)]
            node = self.title(lines[-1]) if lines else ""
            self.found.append(Dispatched(node, op, False, WAITS.get(op, "needs a value on the host")))


def _is_view(func: torch._ops.OpOverload) -> bool:
    """Whether an operation only gives its operand's memory another shape."""
    aliases = [result.alias_info for result in func._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def _tensors(*values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _crosses(args: Any, kwargs: Any, result: Any) -> bool:
    """Whether an operation moves data between CPU and device; a 0-dimensional CPU operand of arithmetic does not."""
    given = {x.device.type for x in _tensors(args, kwargs)}
    return (
        given == {"cpu"}
        and any(x.device.type != "cpu" for x in _tensors(result))
        or ("cpu" not in given and bool(given) and any(x.device.type == "cpu" for x in _tensors(result)))
    )


def _kernel_name(kwargs: Mapping[str, Any]) -> str:
    """The name of the kernel that a wrapped Triton launch runs."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    kernel: Any = kernel_side_table.get_kernel(kwargs["kernel_idx"])
    return str(getattr(kernel, "fn", kernel).__name__)
