"""Layout ops as views of their operand: not kernels, since an op never returns a view, but what the pass ``views`` puts
in their place where nobody can tell the difference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


def matricize(W: Tensor, perm: Sequence[int], shape: Sequence[int]) -> Tensor:
    """``matricize``, a copy only where the order of the axes makes one necessary."""
    return W.permute(tuple(perm)).reshape(tuple(shape))


def tensorize(M: Tensor, perm: Sequence[int], shape: Sequence[int]) -> Tensor:
    """``tensorize``, with the strides that the permutation gives."""
    inverse = sorted(range(len(perm)), key=lambda position: perm[position])
    return M.reshape([shape[axis] for axis in perm]).permute(inverse)


def weight_columns(M: Tensor) -> Tensor:
    """All columns but the last."""
    return M[..., :-1]


def last_column(M: Tensor) -> Tensor:
    """The last column, flat."""
    return M[..., -1].reshape(-1)


VIEWS: dict[str, Callable[..., Tensor]] = {
    "matricize": matricize,
    "tensorize": tensorize,
    "weight_columns": weight_columns,
    "last_column": last_column,
}
"""Name of an op -> its result as a view."""
