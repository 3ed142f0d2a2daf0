"""What a step did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepInfo:
    """Returned by ``precondition_``.

    step: number of this step, from 0. statistics, refresh: whether statistics were used and factorisations renewed
    (with ``stagger``: some). terms: loss terms behind the statistics. kl_scale: common factor on all directions (the
    KL clip's, or of another ``rescale``), ``None`` without one.
    fallback: layers that kept their plain gradient because something was not finite. repaired: layers whose
    factorisation failed and was redone in float64 or with more damping. kept: layers whose factorisation failed for
    good, so that the previous one stays in use. skipped: nothing changed because the gradient scaler found overflow.
    Of a step that a quadratic model decides: rate and momentum, its alpha and mu; predicted, the change of the
    objective that the model expects of the step; change, the real one where it was looked at.
    """

    step: int
    statistics: bool = False
    refresh: bool = False
    terms: float = 0.0
    kl_scale: float | None = None
    fallback: tuple[str, ...] = ()
    repaired: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    skipped: bool = False
    rate: float | None = None
    momentum: float | None = None
    predicted: float | None = None
    change: float | None = None
