"""The trace rule of THOR: whether a layer's curvature has moved enough to be taken over, or has settled for good."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import Op
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.rules import accumulator, need, need_scalar, number, promote
from fxcurv.ir.ops.statistics import wide
from fxcurv.ir.types import Diag, Psd, Scalar, Type


def _block_trace(factors: Sequence[Tensor], groups: int) -> Tensor:
    """Trace of a layer's block: the product of the traces of its ``factors``, summed over groups, Scalar.

    factors: Psd or Diag, with a leading G for ``groups`` > 1; any further leading dimension counts diagonal blocks of
    one factor.
    """
    total: Tensor | float = 1.0
    for factor in factors:
        x = wide(factor if groups > 1 else factor.unsqueeze(0))
        total = total * (x if x.ndim == 2 else x.diagonal(dim1=-2, dim2=-1)).flatten(1).sum(1)
    return torch.as_tensor(total).sum()


def _infer_block_trace(factors: Sequence[Type], groups: int) -> Type:
    if not factors:
        raise FxcurvError("op 'block_trace' needs at least one factor.")
    for factor in factors:
        need("block_trace", "factors", factor, Psd, Diag)
        if groups > 1 and factor.shape[0] != groups:
            raise FxcurvError(f"op 'block_trace' got {factor} for {groups} groups; the groups come first.")
    return Scalar((), accumulator(promote(*factors)))


def _trace_samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(53)
    yield [draw.psd(3), draw.psd(4)], 1
    yield [draw.psd(3, 2), draw.positive(4)], 1
    yield [draw.psd(2, 3), draw.positive(3, 3)], 3
    yield [draw.psd(2, 3, 2), draw.psd(4, 3)], 3
    yield [draw.psd(2, 5)], 5


block_trace = Op(
    "block_trace",
    "(Tensor[] factors, int groups) -> Tensor",
    _block_trace,
    _infer_block_trace,
    _trace_samples,
    flops=lambda factors, groups: sum(f.numel / (1 if isinstance(f, Diag) else f.shape[-1]) for f in factors),
)


def _trace_rule(
    trace: Tensor, accepted: Tensor, retired: Tensor, count: Tensor, move: Tensor, settle: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(1 to take the candidate over else 0, trace of the last one accepted, 1 once the layer has settled), Scalars.

    With D = |trace - accepted| / accepted: D > move accepts; settle <= D <= move keeps what there is; D < settle keeps
    it for ever. The first candidate is always accepted; ``count`` = 0 rows are none. Chen et al. 2021, section 4, with
    the last *accepted* trace in place of the last one, so that a slow drift adds up.
    """
    seen, known, over = number(count, accepted) > 0, accepted > 0, retired > 0
    change = (trace - accepted).abs() / torch.where(known, accepted, torch.ones_like(accepted))
    take = seen & over.logical_not() & (known.logical_not() | (change > move))
    stop = seen & known & (change < settle)
    last = torch.where(take, trace, accepted)
    return take.to(accepted.dtype), last.to(accepted.dtype), (over | stop).to(retired.dtype)


def _infer_trace_rule(trace: Type, accepted: Type, retired: Type, count: Any, move: Any, settle: Any) -> Any:
    for name, given in (("trace", trace), ("accepted", accepted), ("retired", retired)):
        need("trace_rule", name, given, Scalar)
    for name, given in (("count", count), ("move", move), ("settle", settle)):
        need_scalar("trace_rule", name, given)
    return accepted, accepted, retired


def _rule_samples() -> Iterator[tuple[Tensor, ...]]:
    for numbers in (
        (2.0, 0.0, 0.0, 3.0, 0.01, 0.001),  # the first
        (2.0, 1.0, 0.0, 3.0, 0.01, 0.001),  # moved
        (1.005, 1.0, 0.0, 3.0, 0.01, 0.001),  # kept
        (1.0005, 1.0, 0.0, 3.0, 0.01, 0.001),  # settled
        (9.0, 1.0, 1.0, 3.0, 0.01, 0.001),  # over
        (9.0, 1.0, 0.0, 0.0, 0.01, 0.001),  # not reached
        (0.5, 1.0, 0.0, 3.0, 0.01, 0.0),
    ):
        yield tuple(torch.tensor(number, dtype=torch.float64) for number in numbers)


trace_rule = Op(
    "trace_rule",
    "(Tensor trace, Tensor accepted, Tensor retired, Tensor count, Tensor move, Tensor settle) "
    "-> (Tensor, Tensor, Tensor)",
    _trace_rule,
    _infer_trace_rule,
    _rule_samples,
)
