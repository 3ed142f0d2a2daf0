"""The operations of update programs, one module a subject; importing this package registers them all."""

from fxcurv.ir import cadence
from fxcurv.ir.ops import (
    apply,
    chain,
    damping,
    lagged,
    layout,
    linalg,
    moments,
    oracle,
    pointwise,
    ratios,
    scalars,
    statistics,
    tracking,
    vectors,
)

__all__ = [
    "apply",
    "cadence",
    "chain",
    "damping",
    "lagged",
    "layout",
    "linalg",
    "moments",
    "oracle",
    "pointwise",
    "ratios",
    "scalars",
    "statistics",
    "tracking",
    "vectors",
]
