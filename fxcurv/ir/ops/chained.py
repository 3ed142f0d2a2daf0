"""A chain of point-wise ops as one op, with its parts written out, so that a program still says all that it does.

    %p : (Tensor[5,6], Tensor[5,6]) = pointwise([%m, %g, %beta], ['moving(x0, x1, x2)', 'sqrt(x3)'], [3, 4])

Values are numbered: first the operands x0, x1, ..., then the result of every step. The last operand lists the values
that are results. Types and meaning are those of the parts, one after the other; a kernel may do all in one walk.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS, Op, Trait
from fxcurv.ir.ops import pointwise as _parts  # noqa: F401  (steps name ops of these modules)
from fxcurv.ir.ops import ratios, scalars, tracking  # noqa: F401
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.rules import accumulator, need, need_scalar
from fxcurv.ir.types import Scalar, Type


@lru_cache(maxsize=4096)
def parse_step(text: str) -> tuple[str, tuple[Any, ...]]:
    """(op, operands) of a step such as ``"scale(x3, 0.5)"``; values are :class:`Value`, literals stay."""
    try:
        call = ast.parse(text, mode="eval").body
        assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.keywords
        operands = tuple(_operand(argument) for argument in call.args)
    except (SyntaxError, AssertionError, ValueError) as error:
        raise FxcurvError(f"'{text}' is not a step of op 'pointwise'; write for example 'scale(x3, 0.5)'.") from error
    if call.func.id not in OPS:
        raise FxcurvError(f"the step '{text}' has the unknown op '{call.func.id}'; 'fxcurv ops' lists the known ones.")
    return call.func.id, operands


class Value(int):
    """The number of a value, to be told from a literal."""


def _operand(argument: ast.expr) -> Any:
    if isinstance(argument, ast.Name):
        if argument.id[:1] != "x" or not argument.id[1:].isdigit():
            raise ValueError(argument.id)
        return Value(argument.id[1:])
    return ast.literal_eval(argument)


def run_steps(values: list[Any], steps: Sequence[str], apply: Callable[[str, list[Any]], Any]) -> list[Any]:
    """All values, the operands' first; ``apply`` gives the result of an op."""
    values = list(values)
    for step in steps:
        op, operands = parse_step(step)
        if any(isinstance(x, Value) and x >= len(values) for x in operands):
            raise FxcurvError(
                f"the step '{step}' of op 'pointwise' reads a value later than the {len(values)} before it."
            )
        values.append(apply(op, [values[x] if isinstance(x, Value) else x for x in operands]))
    return values


def _pointwise(xs: Sequence[Tensor], steps: Sequence[str], kept: Sequence[int]) -> tuple[Tensor, ...]:
    """The values ``kept`` of a chain of ops: x0, x1, ... are ``xs``, then comes the result of each of ``steps``."""
    values = run_steps(list(xs), steps, lambda op, operands: OPS[op].reference(*operands))
    return tuple(values[index] for index in kept)


def _infer_pointwise(xs: Sequence[Type], steps: Sequence[str], kept: Sequence[int]) -> tuple[Type, ...]:
    values = run_steps(list(xs), steps, lambda op, operands: OPS[op].infer(*operands))
    wrong = [index for index in kept if not len(xs) <= index < len(values)]
    if wrong or not kept:
        known = f"{len(xs)} to {len(values) - 1}"
        raise FxcurvError(f"op 'pointwise' keeps values {list(kept)}; the results of its steps are {known}.")
    return tuple(values[index] for index in kept)


def _flops(xs: Sequence[Type], steps: Sequence[str], kept: Sequence[int]) -> float:
    total = 0.0

    def apply(op: str, operands: list[Any]) -> Type:
        nonlocal total
        total += float(OPS[op].flops(*operands))
        return OPS[op].infer(*operands)  # type: ignore[return-value]

    run_steps(list(xs), steps, apply)
    return total


def _samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(71)
    m, v, g, beta = draw.normal(3, 4), draw.positive(3, 4), draw.normal(3, 4), draw.number(0.9)
    adam = ["square(x2)", "moving(x0, x2, x3)", "moving(x1, x4, x3)", "sqrt(x6)", "damped_divide(x5, x7, 0.1)"]
    yield [m, v, g, beta], adam, [5, 6, 8]
    yield [draw.normal(2, 5), draw.number(0.3, 2)], ["scale(x0, x1)", "neg(x2)"], [3]


pointwise = Op(
    "pointwise",
    "(Tensor[] xs, str[] steps, int[] kept) -> Tensor[]",
    _pointwise,
    _infer_pointwise,
    _samples,
    flops=_flops,
)


def _bias_factor(beta: Tensor, k: Tensor) -> Tensor:
    """1 - beta^k, what ``bias_correct`` divides by after k updates; 1 at k = 0. beta: number or Scalar; k: Scalar."""
    k = k.to(accumulator(k.dtype))
    base = beta.to(k.dtype) if isinstance(beta, Tensor) else beta
    return torch.where(k > 0, 1.0 - base**k, torch.ones_like(k))


def _infer_bias_factor(beta: Any, k: Type) -> Type:
    need_scalar("bias_factor", "beta", beta)
    return Scalar(need("bias_factor", "k", k, Scalar).shape, accumulator(k.dtype))


bias_factor = Op(
    "bias_factor",
    "(Tensor beta, Tensor k) -> Tensor",
    _bias_factor,
    _infer_bias_factor,
    lambda: ((torch.tensor(0.9, dtype=torch.float64), torch.tensor(k, dtype=torch.float64)) for k in (0.0, 1.0, 7.0)),
    flops=lambda beta, k: 2,
    traits=frozenset({Trait.BATCHABLE}),
)
