"""An op is declared once, with all its faces: schema, type rule, reference, cost, samples, docs.

From one :class:`Op` object come the dispatcher op ``torch.ops.fxcurv.<name>`` (with FakeTensor support),
the type inference and the cost model of programs, the ``opcheck`` and float64 tests and the page of
``fxcurv ops NAME``. Faster implementations attach from :mod:`fxcurv.kernels`; the reference stays the
definition.

The reference is plain torch and pure: it never writes to an argument and never returns one (or a view
of one). Scalars such as a damping are 0-dimensional tensors, so that changing one never recompiles.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from fxcurv.errors import FxcurvError
from fxcurv.ir.types import Type


class Trait(Enum):
    """Facts about an op that passes rely on."""

    ADDITIVE = "additive"  # f(rows of batch 1 and 2) = f(rows of 1) + f(rows of 2): may move into a tap
    ROWWISE = (
        "rowwise"  # f(rows of batch 1 and 2) = f(rows of 1) beside f(rows of 2): may move into a tap with a reduction
    )
    BATCHABLE = "batchable"  # leading batch dimensions are independent: equal shapes may be stacked
    LINEAR = "linear"  # linear in its first operand
    ORACLE = "oracle"  # calls the model: not constant for equal operands


@dataclass(frozen=True)
class Cost:
    """Floating-point operations and bytes moved (each input read once, each output written once)."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def _types(value: Any) -> Iterator[Type]:
    """All types in a nest of tuples and lists."""
    if isinstance(value, Type):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _types(item)


OPS: dict[str, Op] = {}
_LIBRARY = torch.library.Library("fxcurv", "DEF")


@dataclass(frozen=True, eq=False)
class Op:
    """One operation of update programs.

    name: the name in program text and of ``torch.ops.fxcurv.<name>``.
    schema: operands and results in dispatcher syntax, e.g. ``"(Tensor x, Tensor c) -> Tensor"``;
        a number may stand wherever the schema says Tensor and the operand is a scalar.
    reference: the definition, in plain torch.
    infer: types of the operands (Python literals as they are) -> type of the result, or a tuple of
        types for several results.
    samples: a function yielding operand tuples in float64, for tests and benchmarks.
    flops: types of the operands -> floating-point operations; bytes follow from the types.
    fake: shapes alone, where the reference looks at values; ``None`` lets it run on fake tensors.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    infer: Callable[..., Type | tuple[Type, ...]]
    samples: Callable[[], Iterable[tuple[Any, ...]]]
    flops: Callable[..., float] = lambda *operands: 0.0
    traits: frozenset[Trait] = frozenset()
    fake: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if self.name in OPS:
            raise FxcurvError(f"op '{self.name}' is defined twice; import fxcurv.ir.ops only as part of fxcurv.")
        OPS[self.name] = self
        if Trait.ORACLE not in self.traits:  # an oracle operand is a Python object, unknown to the dispatcher
            _LIBRARY.define(self.name + self.schema)
            _LIBRARY.impl(self.name, self.reference, "CompositeExplicitAutograd")
            torch.library.register_fake(f"fxcurv::{self.name}", self.fake or self.reference, lib=_LIBRARY)

    @property
    def __name__(self) -> str:
        return self.name

    @property
    def doc(self) -> str:
        """What the op computes, from the reference's docstring."""
        return inspect.getdoc(self.reference) or ""

    @property
    def arity(self) -> int:
        """Number of operands; -1 when the schema takes a list."""
        return -1 if "[]" in self.schema.split("->")[0] else len(inspect.signature(self.reference).parameters)

    def cost(self, result: Type | tuple[Type, ...], *operands: Any) -> Cost:
        """Cost of one execution, from types alone."""
        moved = sum(t.nbytes for t in _types((result, operands)))
        return Cost(float(self.flops(*operands)), float(moved))

    def __call__(self, *operands: Any) -> Any:
        return self.reference(*operands)

    def __repr__(self) -> str:
        return f"Op({self.name}{self.schema})"
