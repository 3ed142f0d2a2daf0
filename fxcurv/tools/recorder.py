"""What a piece of torch code really executes: operations, bytes and memory, on tensors that may be fake.

A dispatch mode sees every ATen call of a kernel, a tap or a whole training step, so costs are those of the code that
runs (a convolution's Gram in the form that was chosen, a product in halves) and not of a formula beside it. Under a
``FakeTensorMode`` nothing is computed or allocated, and the bytes that would be alive are counted all the same.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

KINDS = ("product", "convolution", "cholesky", "inverse", "eigen", "pointwise", "kernel")
"""What a call spends its time on. A device has a rate for each but pointwise work, which is bound by memory, and a
generated kernel, of which the dispatcher knows nothing but its operands."""


@dataclass(frozen=True)
class Work:
    """One call, or several equal ones.

    kind: one of KINDS. flops, bytes: of one call; every operand read once, every result written once. size: of a
    product (m n k)^(1/3), of a factorisation its dimension, of one matrix of a batch. count: how often.
    """

    kind: str
    flops: float
    bytes: float
    dtype: torch.dtype
    size: float = 0.0
    count: int = 1


def _batch(A: Tensor) -> int:
    return math.prod(A.shape[:-2])


def _square(factor: float) -> Callable[..., float]:
    return lambda A, *rest, **options: factor * _batch(A) * A.shape[-2] * A.shape[-1] * min(A.shape[-2:])


def _solve(A: Tensor, B: Tensor, *rest: Any, **options: Any) -> float:
    n = max(A.shape[-1], B.shape[-2])
    return float(_batch(A) * n * A.shape[-1] * B.shape[-1])


def _attention(*tensors: Any, **options: Any) -> float:
    q, k, v = tensors[:3]
    return float(sdpa_flop_count(q.shape, k.shape, v.shape))


def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> float:
    return float(sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape))


def _recurrent(factor: float) -> Callable[..., float]:
    """oneDNN's recurrent layer: each of its weights meets each step of each sequence once."""
    return lambda x, *rest, **options: (
        factor * x.shape[0] * x.shape[1] * sum(w.numel() for w in rest[:2] if isinstance(w, Tensor))
    )


FACTORISATIONS: dict[str, tuple[str, Callable[..., float]]] = {
    "linalg_cholesky_ex": ("cholesky", _square(1 / 3)),
    "cholesky_inverse": ("inverse", _square(2 / 3)),
    "linalg_inv_ex": ("inverse", _square(2.0)),
    "linalg_solve_triangular": ("inverse", _solve),
    "triangular_solve": ("inverse", lambda B, A, *rest, **options: _solve(A, B)),
    "cholesky_solve": ("inverse", lambda B, A, *rest, **options: 2 * _solve(A, B)),
    "_linalg_solve_ex": ("inverse", lambda A, B, *rest, **options: _square(2 / 3)(A) + 2 * _solve(A, B)),
    "linalg_qr": ("eigen", _square(10 / 3)),
    "_linalg_eigh": ("eigen", _square(9.0)),
    "_linalg_svd": ("eigen", _square(20.0)),
}
PRODUCTS: dict[str, Callable[..., float]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "mkldnn_rnn_layer": _recurrent(2.0),
    "mkldnn_rnn_layer_backward": _recurrent(4.0),
    "addmv": lambda y, A, x, *rest, **options: 2.0 * A.numel(),
    "mv": lambda A, x, *rest, **options: 2.0 * A.numel(),
}


def _loop(args: Any, moved: float, dtype: torch.dtype) -> Work:
    """A recurrence over (T, B, d): its weight meets each step, a product and some pointwise calls at each."""
    steps, batch = next(t.shape[:2] for t in tensors(args) if t.ndim == 3)
    weight = max((t for t in tensors(args) if t.ndim == 2), key=lambda t: t.numel())
    one = 2.0 * batch * weight.numel()
    return Work("product", one, moved / steps, dtype, (one / 2) ** (1 / 3), steps)


FREE = frozenset({"lift_fresh", "_unsafe_view", "empty", "new_empty", "empty_like", "empty_strided"})
"""Calls that move no data, beside all views."""


class Recorder(TorchDispatchMode):
    """Within this context every ATen call is recorded.

    works: one entry a call that does something. live, peak: bytes of the tensors made here that are, or at most were,
    alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.works: list[Work] = []
        self.live = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
        if getattr(func, "is_view", False) or func.namespace == "prim":
            return result
        operands, results = list(tensors((args, kwargs))), list(tensors(result))
        self._allocate(operands, results)
        if name == "patch_gram" and func.namespace == "fxcurv":
            self._enter(
                *_inside_patch_gram(tuple(args[0].shape), args[0].dtype, _hashable((*args[1:], *kwargs.values())))
            )
            return result
        if name not in FREE and name.removesuffix(".out") not in FREE:
            reads = tensors((args, {key: value for key, value in kwargs.items() if key != "out"}))
            moved = sum(map(extent, reads)) + sum(map(extent, results))
            if moved:  # else it answers a question about a tensor
                self.works.append(self._work(func, name, args, kwargs, result, float(moved)))
        return result

    def _work(self, func: Any, name: str, args: Any, kwargs: Any, result: Any, moved: float) -> Work:
        dtype = next((t.dtype for t in tensors((args, result)) if t.is_floating_point()), torch.float32)
        packet = getattr(func, "overloadpacket", None)
        if name in FACTORISATIONS:
            kind, flops = FACTORISATIONS[name]
            A = next(t for t in tensors(args))
            return Work(kind, flops(*args, **kwargs), moved, dtype, float(A.shape[-1]), 1)
        if name.endswith(("_loop", "_reverse")) and func.namespace == "fxcurv":
            return _loop(args, moved, dtype)
        if name in PRODUCTS:
            flops_ = PRODUCTS[name](*args, **kwargs)
            return Work("product", flops_, moved, dtype, (flops_ / 2) ** (1 / 3))
        if packet in flop_registry:
            flops_ = float(flop_registry[packet](*args, **kwargs, out_val=result))
            kind = "convolution" if "convolution" in name or "conv2d" in name else "product"
            first = next((t for t in tensors(args)), None)
            batch = first.shape[0] if first is not None and name in ("bmm", "baddbmm") else 1
            return Work(kind, flops_, moved, dtype, (flops_ / 2 / max(batch, 1)) ** (1 / 3))
        kind = "pointwise" if func.namespace in ("aten", "prims") else "kernel"
        return Work(kind, float(sum(t.numel() for t in tensors(result))), moved, dtype)

    def _enter(self, works: tuple[Work, ...], peak: int) -> None:
        """Record what an opaque operation does inside."""
        self.works += works
        self.peak = max(self.peak, self.live + peak)

    def _allocate(self, operands: list[Tensor], results: list[Tensor]) -> None:
        known = {storage_key(t) for t in operands}
        for tensor in results:
            key = storage_key(tensor)
            if key is None or key in known or key in self._alive:
                continue
            storage = tensor.untyped_storage()
            self._alive.add(key)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._free, key, storage.nbytes()).atexit = False
        self.peak = max(self.peak, self.live)

    def _free(self, key: int, nbytes: int) -> None:
        self._alive.discard(key)
        self.live -= nbytes


@lru_cache(maxsize=1024)
def _inside_patch_gram(shape: tuple[int, ...], dtype: torch.dtype, geometry: Any) -> tuple[tuple[Work, ...], int]:
    """Works and peak memory of a convolution's patch Gram, whose form is chosen by sizes: run for real, on zeros."""
    from fxcurv.kernels.aten.operation import _run

    with unset_fake_temporarily(), torch.no_grad():
        x = torch.zeros(shape, dtype=dtype)
        _run(x, *geometry)  # the tables that it makes and keeps are not part of the cost
        with Recorder() as inner:
            _run(x, *geometry)
    return tuple(summed(inner.works)), inner.peak


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a nest."""
    return (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def storage_key(tensor: Tensor) -> int | None:
    """Equal for tensors that share memory; ``None`` for what has no storage of its own (sparse)."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None


def extent(tensor: Tensor) -> int:
    """Bytes that reading a tensor once moves: an expanded one is as small as its storage."""
    if tensor.layout is not torch.strided:
        return tensor.values().numel() * tensor.element_size() if tensor.layout is torch.sparse_coo else 0
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def summed(works: list[Work]) -> list[Work]:
    """Equal works together."""
    counts: dict[Work, int] = {}
    for work in works:
        one = replace(work, count=1)
        counts[one] = counts.get(one, 0) + work.count
    return [replace(work, count=count) for work, count in counts.items()]
