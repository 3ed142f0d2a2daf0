"""Kernels for GPUs: readable Triton source, generated for a node's types and geometry.

Importing this package registers a kernel for every family with an op. It needs no Triton and no GPU: sources are
rendered and read anywhere, and loaded only when they run. ``family.py`` says how to add one.
"""

from fxcurv.kernels.triton import (  # noqa: F401  (a module registers its families)
    conv_gram,
    conv_shifts,
    eig_apply,
    gram,
    gram_ema,
    grouped,
    kron_apply,
    newton_root,
    pointwise,
    rank1_apply,
    rank1_update,
    row_kernel,
    second_moment,
    triangle,
)
from fxcurv.kernels.triton.family import FAMILIES, Family, Specialised, Traffic, Variant, specialise

__all__ = ["FAMILIES", "Family", "Specialised", "Traffic", "Variant", "specialise"]
