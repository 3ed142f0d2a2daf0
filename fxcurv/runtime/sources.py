"""Sources of curvature: which backward passes a call of ``model.backward`` makes.

Every pass back-propagates a *column*: a tensor shaped like the outputs whose outer product is, in expectation or in
sum, the Hessian of the summed loss terms. The program divides by their number.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxcurv.errors import FxcurvError, FxcurvWarning
from fxcurv.layers.tap import asking
from fxcurv.losses import Euclidean, Loss
from fxcurv.methods.method import Source
from fxcurv.runtime.deferred import Found, Notes, reduce_together
from fxcurv.runtime.statistics import Statistics, notes_behind

MANY_COLUMNS = 64
NOT_RECORDED = (
    "no statistics can be delivered, because the outputs do not come from a recorded forward pass of the transformed "
    "model in this step; run it with gradients enabled, and under activation checkpointing with use_reentrant=False."
)


def columns(
    source: Source,
    loss: Loss,
    outputs: Tensor,
    key: tuple[int, ...],
    targets: Tensor | None,
    mask: Tensor | None,
    examples: int | None,
    first_row: int = 0,
) -> Iterator[Tensor]:
    """The columns of a source for one micro-batch; ``key`` = (seed, step, micro-batch) fixes all random draws.

    first_row: number of rows of this micro-batch that earlier ranks have.
    """
    if source.euclidean:
        loss = Euclidean(like=loss)
    if source.passes == "mc":
        for sample in range(source.samples):
            yield loss.sample(outputs, (*key, sample), targets, mask, first_row)
    elif source.passes == "ggn_signs":
        for sample in range(source.samples):
            yield from loss.sign_columns(outputs, (*key, sample), targets, mask, first_row)
    else:
        count = loss.column_count(outputs, examples)
        if count > MANY_COLUMNS:
            warnings.warn(
                f"fisher='{source.kind}' runs {count} backward passes for every batch of this shape (one for each "
                "output column and position); 'ggn_signs' or 'mc' are unbiased with far fewer.",
                FxcurvWarning,
                stacklevel=4,
            )
        yield from loss.columns(outputs, targets, mask, examples)


def run_columns(statistics: Statistics, outputs: Tensor, found: Iterator[Tensor]) -> None:
    """Back-propagate columns into the slots and collect; no weight gradient is computed.

    Raises :class:`FxcurvError` when no forward pass has made slots, or the graph contains reentrant checkpointing.
    """
    notes = [one for one in notes_behind(outputs) if one.noted]
    for index, column in enumerate(found):
        slots = statistics.targets(first=index == 0)
        if not slots:
            raise FxcurvError(NOT_RECORDED)
        try:
            if notes:
                ask(statistics, outputs, column, slots, notes, first=index == 0)
            else:
                torch.autograd.backward([outputs], [column], inputs=slots, retain_graph=True)
        except RuntimeError as error:
            if "heckpoint" in str(error):
                raise FxcurvError(
                    "reentrant activation checkpointing cannot deliver sampled or exact statistics; use "
                    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
                ) from error
            raise
        if index == 0 and not statistics.plain:  # the slots are leaves of another graph
            raise FxcurvError(NOT_RECORDED)
        statistics.collect_rows()
    statistics.collect()


def ask(
    statistics: Statistics, outputs: Tensor, column: Tensor, slots: list[Tensor], notes: list[Notes], first: bool
) -> None:
    """Back-propagate one column into the slots, and to the outputs that deferred taps noted; reduce these."""
    noted = [use for one in notes for use in one.noted]
    edges = [edge for one in notes for edge in one.edges]
    with asking(slots):
        places: Any = [*slots, *edges]
        given = torch.autograd.grad([outputs], places, [column], retain_graph=True, allow_unused=True)
    for slot, gradient in zip(slots, given, strict=False):
        if gradient is not None:
            slot.grad = gradient if slot.grad is None else slot.grad + gradient
    pairs = zip(noted, given[len(slots) :], strict=True)
    reduce_together([Found(use, g) for use, g in pairs if g is not None], statistics.deliver, input_side=first)


def weight(source: Source, loss: Loss | None, terms: float, scale: float) -> float:
    """The factor on sums of squares of captured gradients that gives the curvature of the mean loss.

    Sampled and exact columns belong to the summed loss: 1/N, and 1/samples for draws. Empirical gradients are those of
    the user's scalar: with a mean they are g/N, so N; with a sum 1/N. ``scale`` is that of a gradient scaler.
    """
    if terms <= 0:
        return 0.0
    if source.kind == "empirical":
        return (1.0 / terms if loss is not None and loss.reduction == "sum" else terms) / scale**2
    return 1.0 / (terms * (source.samples if source.passes in ("mc", "ggn_signs") else 1))
