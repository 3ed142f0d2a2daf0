"""One node of a program, or one statistic of a tap, executed on fake tensors: its works, and the memory it needs.

Equal functions on equal types cost the same, so a model of a hundred equal layers is worked out once. What cannot run
on fake tensors (a result whose size depends on values, a kernel that looks at one) runs for real on simple values; what
cannot run at all, a product with the model, has the cost that its op states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxcurv.ir.cost import sized
from fxcurv.ir.op import Trait
from fxcurv.ir.program import op_of, operand_types
from fxcurv.ir.types import Scalar, Type
from fxcurv.passes.dispatched import Unguarded
from fxcurv.tools.recorder import Recorder, Work, storage_key, summed, tensors


@dataclass(frozen=True)
class Executed:
    """works: what ran. fresh: bytes of new memory that the result holds; aliases: indices of the operands whose memory
    it holds too; peak: most bytes of new memory at once.
    """

    works: tuple[Work, ...]
    fresh: int = 0
    aliases: tuple[int, ...] = ()
    peak: int = 0

    @property
    def flops(self) -> float:
        """Operations of all works."""
        return sum(work.flops * work.count for work in self.works)

    @property
    def bytes(self) -> float:
        """Bytes moved by all works."""
        return sum(work.bytes * work.count for work in self.works)

    @property
    def launches(self) -> int:
        """Calls that do something."""
        return sum(work.count for work in self.works)


@dataclass
class Executor:
    """Executes on fake tensors of one device, "cpu" or "cuda" (which needs no GPU), and remembers.

    rows: number of rows of a statistic where a type does not say it.
    """

    rows: int = 1
    device: str = "cpu"
    known: dict[Any, Executed] = field(default_factory=dict)

    def node(self, node: fx.Node, kernel: str, function: Callable[..., Any]) -> Executed:
        """What a program's node costs with the kernel that claimed it; ``kernel`` is its name."""
        operands = [self._sized(operand) for operand in operand_types(node)]
        key = (kernel, op_of(node).name, _frozen(operands))
        if key not in self.known:
            self.known[key] = self._node(node, function, operands)
        return self.known[key]

    def _node(self, node: fx.Node, function: Callable[..., Any], operands: list[Any]) -> Executed:
        op = op_of(node)
        if Trait.ORACLE in op.traits:
            return self._stated(node, operands)
        found = self.run(function, operands)
        if found is None:
            return self._stated(node, operands)
        if all(work.kind != "kernel" for work in found.works):
            return found
        flops = op.cost(self._sized(node.meta["type"]), *operands).flops
        return Executed((_scaled(found, flops, op.name),), found.fresh, found.aliases, found.peak)

    def _stated(self, node: fx.Node, operands: list[Any]) -> Executed:
        op, result = op_of(node), self._sized(node.meta["type"])
        cost = op.cost(result, *operands)
        types = result if isinstance(result, tuple) else (result,)
        nbytes = sum(t.nbytes for t in types)
        return Executed((Work("product", cost.flops, cost.bytes, types[0].dtype, 1.0),), nbytes, (), nbytes)

    def _sized(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._sized(item) for item in value]
        return sized(value, self.rows) if isinstance(value, (Type, tuple)) else value

    def call(self, key: Any, function: Callable[..., Any], operands: Sequence[Any]) -> Executed | None:
        """What ``function`` costs on operands given as types; equal keys are executed once."""
        if key not in self.known:
            found = self.run(function, list(operands))
            if found is None:
                return None
            self.known[key] = found
        return self.known[key]

    def run(self, function: Callable[..., Any], operands: list[Any]) -> Executed | None:
        """Execute on fake tensors, else for real on simple values, else not at all."""
        modes = (FakeTensorMode(allow_non_fake_inputs=True), None) if self.device == "cpu" else (FakeTensorMode(),)
        for mode in modes:
            try:
                return self._execute(function, operands, mode)
            except Exception:  # any error of a kernel that was not made for fake tensors, or for zeros
                continue
        return None

    def _execute(self, function: Callable[..., Any], operands: list[Any], mode: FakeTensorMode | None) -> Executed:
        with torch.no_grad():
            if mode is None:
                given = _made(operands, _plain_value)
                return _recorded(function, given)
            with mode, Unguarded() if self.device == "cuda" else nullcontext():
                given = _made(operands, self._empty)
                return _recorded(function, given)

    def _empty(self, type_: Type) -> Tensor:
        return torch.empty([size or 0 for size in type_.shape], dtype=type_.dtype, device=self.device)


def _plain_value(type_: Type) -> Tensor:
    """A value on which no kernel falls back: a half for a number, the identity for a square matrix, else zeros."""
    if type_.square:
        eye = torch.eye(type_.shape[-1] or 0, dtype=type_.dtype)
        return eye.expand(type_.shape).contiguous()  # type: ignore[arg-type]
    value = 0.5 if isinstance(type_, Scalar) else 0.0
    return torch.full(type_.shape, value, dtype=torch.float64).to(type_.dtype)  # type: ignore[arg-type]


def _recorded(function: Callable[..., Any], given: list[Any]) -> Executed:
    with Recorder() as recorder:
        result = function(*given)
    held = {key for key in map(storage_key, tensors(result)) if key is not None}
    owners = [{storage_key(t) for t in tensors(operand)} for operand in given]
    aliases = tuple(i for i, keys in enumerate(owners) if keys & held)
    fresh = {storage_key(t): t.untyped_storage().nbytes() for t in tensors(result)}
    new = sum(size for key, size in fresh.items() if not any(key in keys for keys in owners))
    return Executed(tuple(summed(recorder.works)), new, aliases, recorder.peak)


def _made(value: Any, make: Callable[[Type], Tensor]) -> Any:
    if isinstance(value, (list, tuple)):
        return [_made(item, make) for item in value]
    return make(value) if isinstance(value, Type) else value


def _scaled(found: Executed, flops: float, op: str) -> Work:
    first = found.works[0]
    kind = "product" if flops > 4 * found.bytes / first.dtype.itemsize else "pointwise"
    return Work(kind, flops, found.bytes, first.dtype, max(1.0, (flops / 2) ** (1 / 3)), found.launches)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value
