"""Chains of point-wise ops: a line of Triton for every step, so that a chain is one walk over memory.

The generator is the table ``LINES``. A value is "full" (a number for every element), "one" (a scalar) or has a number
for every so many elements (a scalar for each row of a stack). What the steps of an optimizer's tail write and read back
between them, and a launch for each, is what this saves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from fxcurv.ir.ops.chained import Value, parse_step, run_steps
from fxcurv.ir.types import Scalar, Type
from fxcurv.kernels.triton.family import Family, Geometry, Traffic, Variant, normal

LINES = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "square": "{0} * {0}",
    "sqrt": "tl.sqrt({0})",
    "neg": "-{0}",
    "copy": "{0}",
    "scale": "{0} * {1}",
    "mean": "{0} / tl.maximum({1}, 1.0)",
    "damped_divide": "{0} / ({1} + {2})",
    "ema": "tl.where({2} == 1.0, {0}, {2} * {0} + (1.0 - {2}) * {1})",
    "moving": "tl.where({2} == 1.0, {0}, {2} * {0} + (1.0 - {2}) * {1})",
    "ema_scaled": "tl.where({3} == 1.0, {0}, {3} * {0} + (1.0 - {3}) * ({2} * {1}))",
    "ema_mean": "tl.where({3} == 1.0, {0}, {3} * {0} + (1.0 - {3}) * ({1} / tl.maximum({2}, 1.0)))",
}
"""Op -> its value, from those of its operands."""
MOST = 24
"""Operands and results of one kernel."""


def lines_of(step: str, number: int) -> list[str]:
    """The statements that compute value ``number`` by a step."""
    op, operands = parse_step(step)
    names, lines = [], []
    for place, x in enumerate(operands):
        names.append(f"x{int(x)}" if isinstance(x, Value) else f"c{number}_{place}")
        if not isinstance(x, Value):  # a literal has no type of its own in Triton, and tl.maximum wants one
            lines.append(f"{names[-1]} = tl.full((), {float(x)!r}, tl.float32)")
    return [*lines, f"x{number} = {LINES[op].format(*names)}"]


def chain_geometry(kinds: Sequence[str | int], steps: Sequence[str], kept: Sequence[int]) -> Geometry:
    """kinds: of the operands, "full", "one" or the number of elements that share one."""
    return {
        "count": len(steps),
        "inputs": tuple(kinds),
        "steps": tuple(steps),
        "lines": tuple(line for k, step in enumerate(steps) for line in lines_of(step, len(kinds) + k)),
        "kept": tuple(kept),
        "like": kinds.index("full"),
    }


def geometry(results: Any, xs: Any, steps: Any, kept: Any) -> Geometry | None:
    """Chains of known ops on values of one known shape, in float32."""
    full = next((x for x in xs if not isinstance(x, Scalar) or x.shape == results[0].shape), None)
    if full is None or None in full.shape or len(xs) + len(kept) > MOST:
        return None
    if any(parse_step(step)[0] not in LINES for step in steps) or any(r.shape != full.shape for r in results):
        return None
    kinds = [kind(x, full) for x in xs]
    if None in kinds or any(x.dtype != torch.float32 for x in (*results, *xs)):
        return None
    return chain_geometry([known for known in kinds if known is not None], steps, kept)


def kind(operand: Type, full: Type) -> str | int | None:
    """What an operand is beside a full value; ``None`` where it is none of what is known."""
    if operand.shape == full.shape:
        return "full"
    if operand.shape == ():
        return "one"
    known = isinstance(operand, Scalar) and operand.shape == full.shape[: len(operand.shape)]
    return prod(size or 0 for size in full.shape[len(operand.shape) :]) if known else None


def _ema(old: Tensor, new: Tensor, weight: Any) -> Tensor:
    return torch.where(torch.as_tensor(weight) == 1, old, weight * old + (1 - weight) * new)


NAIVE: dict[str, Any] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "square": lambda x: x**2,
    "sqrt": lambda x: x**0.5,
    "neg": lambda x: 0 - x,
    "copy": lambda x: x + 0,
    "scale": lambda x, c: x * c,
    "mean": lambda x, n: x / max(float(n), 1.0),
    "damped_divide": lambda x, y, c: x / (y + c),
    "ema": _ema,
    "moving": _ema,
    "ema_scaled": lambda old, x, c, w: _ema(old, x * c, w),
    "ema_mean": lambda old, x, n, w: _ema(old, x / max(float(n), 1.0), w),
}


def _naive(xs: Sequence[Tensor], steps: Sequence[str], kept: Sequence[int]) -> tuple[Tensor, ...]:
    full = max(xs, key=lambda x: x.ndim)
    wide = [x.double().reshape(*x.shape, *(1,) * (full.ndim - x.ndim)) if x.ndim else x.double() for x in xs]
    values = run_steps(wide, steps, lambda op, operands: NAIVE[op](*operands))
    return tuple(values[index] for index in kept)


ADAM = (
    "square(x2)",
    "moving(x0, x2, x3)",
    "moving(x1, x6, x4)",
    "div(x7, x5)",
    "sqrt(x8)",
    "damped_divide(x9, x10, 1e-08)",
)
CHAINS: dict[str, tuple[str, tuple[str, ...], tuple[int, ...]]] = {
    "adam": ("fpfsss", ADAM, (7, 8, 11)),
    "momentum": ("ffss", ("scale(x1, x2)", "moving(x0, x4, x3)", "neg(x5)"), (5, 6)),
    "average": ("ffsr", ("ema_mean(x0, x1, x2, x3)", "ema_scaled(x0, x1, 0.5, x3)", "sub(x4, x5)"), (4, 6)),
    "rows": ("fr", ("scale(x0, x1)", "add(x2, x0)", "mul(x3, x3)"), (4,)),
    "kept": ("ffs", ("ema(x0, x1, 1.0)", "mean(x3, x2)", "copy(x4)"), (3, 5)),
}
"""Letters of operands: full, positive and full, scalar, one a row."""


def _chain(name: str, shape: tuple[int, ...]) -> tuple[list[Tensor], list[str], list[int]]:
    letters, steps, kept = CHAINS[name]
    xs = []
    for k, letter in enumerate(letters):
        full = normal(*shape, seed=k)
        numbers = torch.linspace(0.2, 1, shape[0])
        xs.append({"f": full, "p": full.abs() + 0.1, "s": torch.tensor(0.3 + 0.1 * k), "r": numbers}[letter])
    return xs, list(steps), list(kept)


def kinds_of(letters: str, row: int) -> list[str | int]:
    """The kinds of a chain's operands, ``row`` elements sharing a number of "r"."""
    named: dict[str, str | int] = {"s": "one", "r": row}
    return [named.get(letter, "full") for letter in letters]


def variants() -> Iterator[Variant]:
    """Every op, every kind of operand, sizes of one and several programs, strided operands."""
    for name, (letters, steps, kept) in CHAINS.items():
        for shape in ((1, 1), (3, 5), (7, 31), (2, 3, 67)):
            values = chain_geometry(kinds_of(letters, prod(shape[1:])), steps, kept)
            yield Variant(f"{name}-{'x'.join(map(str, shape))}", values, partial(_chain, name, shape), compile=False)
        values = chain_geometry(kinds_of(letters, 785), steps, kept)
        operands = partial(_chain, name, (1000, 785))
        yield Variant(f"{name}-large", values, operands, run=False, quick=name in ("adam", "average"))


def _cost(values: Geometry, xs: Sequence[Tensor], steps: Sequence[str], kept: Sequence[int]) -> Traffic:
    """Full operands once, scalars for every program, numbers of rows for every element of them."""
    n = xs[values["like"]].numel()
    programs = -(-n // values["block"])
    kinds = values["inputs"]
    once = sum(x.numel() * 4 for x in xs)
    again = 4 * (programs - 1) * kinds.count("one")
    again += sum(4 * (n - x.numel()) for x, k in zip(xs, kinds, strict=True) if isinstance(k, int))
    return Traffic(once, 4.0 * n * len(kept), 2.0 * n * len(steps), again)


POINTWISE = Family(
    name="pointwise",
    op="pointwise",
    template="pointwise.py.jinja",
    label="{count}_steps",
    geometry=geometry,
    naive=_naive,
    variants=variants,
    cost=_cost,
    doc="""A chain of point-wise ops in one walk over memory. Each step is a line of the kernel; operands are read once,
results written once, scalars are read from memory, so changing a hyper-parameter changes no code. Claims chains on
values of one shape in fp32.""",
)
