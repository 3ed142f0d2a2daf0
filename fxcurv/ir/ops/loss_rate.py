"""How fast the loss falls, and whether it has stopped to: the switch of hybrid methods (MKOR-H)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxcurv.ir.op import Op
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.rules import need, need_scalar, number
from fxcurv.ir.types import Scalar, Type


def _loss_averages(loss: Tensor, k: Tensor, fast: Tensor, slow: Tensor, quick: Tensor, lasting: Tensor) -> Any:
    """(k + 1, next fast, next slow): averages of the loss with weights min(k / (k + 1), quick or lasting) on the old.

    All Scalars, k the number of losses so far; a loss that is not finite changes nothing.
    """
    seen = torch.isfinite(loss)
    value = torch.where(seen, loss, torch.zeros_like(loss)).to(k.dtype)
    following = [torch.where(seen, k + 1, k)]
    for old, weight in ((fast, quick), (slow, lasting)):
        weight = torch.minimum(k / (k + 1), number(weight, k))
        following.append(torch.where(seen, weight * old + (1 - weight) * value, old))
    return tuple(following)


def _infer_averages(loss: Any, k: Type, fast: Type, slow: Type, quick: Any, lasting: Any) -> Any:
    for name, given in (("k", k), ("fast", fast), ("slow", slow)):
        need("loss_averages", name, given, Scalar)
    for name, given in (("loss", loss), ("quick", quick), ("lasting", lasting)):
        need_scalar("loss_averages", name, given)
    return k, k, k


def _loss_rule(fast: Tensor, slow: Tensor, best: Tensor, over: Tensor, k: Tensor, below: Tensor, after: Tensor) -> Any:
    """(largest slow - fast so far, 1 once slow - fast is less than ``below`` times that, after ``after`` losses).

    slow - fast is the decrease of the loss between the middles of the two windows, whatever the loss's zero and unit.
    All Scalars; ``over`` stays 1.
    """
    rate = slow - fast
    best = torch.maximum(best, rate)
    late = k >= number(after, k)
    return best, torch.where(late & (rate < below * best), torch.ones_like(over), over)


def _infer_rule(fast: Type, slow: Type, best: Type, over: Type, k: Type, below: Any, after: Any) -> Any:
    for name, given in (("fast", fast), ("slow", slow), ("best", best), ("over", over), ("k", k)):
        need("loss_rule", name, given, Scalar)
    need_scalar("loss_rule", "below", below)
    need_scalar("loss_rule", "after", after)
    return best, over


def _averages_samples() -> Iterator[tuple[Tensor, ...]]:
    draw = Draw(71)
    for loss, k in ((2.5, 0.0), (2.5, 3.0), (2.5, 500.0), (float("nan"), 3.0), (float("inf"), 0.0)):
        yield tuple(draw.number(value) for value in (loss, k, 4.0, 5.0, 0.9, 0.98))


def _rule_samples() -> Iterator[tuple[Tensor, ...]]:
    draw = Draw(72)
    for slow, best, over, k in (
        (2.0, 0.5, 0.0, 9.0),
        (1.04, 0.5, 0.0, 9.0),
        (1.04, 0.5, 0.0, 7.0),
        (3.0, 0.5, 1.0, 9.0),
    ):
        yield tuple(draw.number(value) for value in (1.0, slow, best, over, k, 0.1, 8.0))


loss_averages = Op(
    "loss_averages",
    "(Tensor loss, Tensor k, Tensor fast, Tensor slow, Tensor quick, Tensor lasting) -> (Tensor, Tensor, Tensor)",
    _loss_averages,
    _infer_averages,
    _averages_samples,
    flops=lambda *operands: 12,
)
loss_rule = Op(
    "loss_rule",
    "(Tensor fast, Tensor slow, Tensor best, Tensor over, Tensor k, Tensor below, Tensor after) -> (Tensor, Tensor)",
    _loss_rule,
    _infer_rule,
    _rule_samples,
    flops=lambda *operands: 5,
)
