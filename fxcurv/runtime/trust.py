"""Levenberg-Marquardt: damping follows how well the last change of the loss was predicted (sheet kronecker-1, 6)."""

from __future__ import annotations

import math

POOR, GOOD = 0.25, 0.75
"""Shares of the predicted decrease below which damping rises, and above which it falls."""


def adapted(damping: float, change: float, predicted: float, lower: float, raised: float, floor: float) -> float:
    """The next damping after a step that changed the loss by ``change`` where ``predicted`` was expected.

    lower < 1 < raised: factors on the damping; floor: its smallest value. The two changes are compared by their ratio,
    and a ratio alone would call it a success when the loss rose as predicted: a prediction that is no decrease, or
    anything that is not finite, counts as a failure.
    """
    sound = math.isfinite(change) and math.isfinite(predicted) and predicted < 0
    ratio = change / predicted if sound else -math.inf
    if ratio < POOR:
        return damping * raised
    return max(damping * lower, floor) if ratio > GOOD else damping
