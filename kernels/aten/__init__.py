"""Kernels in plain ATen: the same mathematics in fewer passes over memory, measured faster on one CPU core.

Importing this package registers them. Each is right on every device; where a variant pays only on the CPU, the kernel
looks at the device itself. ``kron_apply`` has none on purpose: both orders of its products take o i (o + i) steps.
"""

from fxcurv.kernels.aten import batched, finite, gram, inverse, moments, order, tracking

__all__ = ["batched", "finite", "gram", "inverse", "moments", "order", "tracking"]
