"""Probes and oracles: random signs, products with curvature, and linear solves by such products.

An oracle operand is a Python object with ``product(vectors) -> vectors``, supplied by the run time for one step. Ops on
it are not known to the dispatcher, and equal operands do not make equal values, so no pass merges them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fxcurv import sampling
from fxcurv.ir.op import Op, Trait
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.types import Mat, Type, Vec

_ORACLE = frozenset({Trait.ORACLE})


def _signs(like: Tensor, seed: Tensor, step: Tensor, stream: int) -> Tensor:
    """Independent random signs in the shape of ``like``: a pure function of (seed, step, stream) and position."""
    key = [number if _stays_on_device(number) else int(number) for number in (seed, step)]
    drawn = sampling.signs((*key, stream), 1, like.numel(), device=like.device, dtype=like.dtype)
    return drawn.reshape(like.shape)


def _stays_on_device(number: Tensor) -> bool:
    """Whether reading a number would wait for a device, or end a graph; on the CPU an integer's hash is cheaper."""
    return number.device.type != "cpu" or torch.compiler.is_compiling()


def _signs_fake(like: Tensor, seed: Tensor, step: Tensor, stream: int) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _signs_samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(6)
    for shape in ((3, 4), (7,), (2, 1, 5)):
        yield draw.normal(*shape), torch.tensor(3.0, dtype=torch.float64), torch.tensor(11.0, dtype=torch.float64), 2


def _hvp(oracle: Any, vectors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Products of a curvature matrix with vectors shaped like the parameters (Pearlmutter 1994)."""
    return tuple(oracle.product(list(vectors)))


def _cg(
    oracle: Any, target: Tensor, start: Tensor, damping: Tensor, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Conjugate gradients on (C + damping I) x = target, C the oracle's matrix over the packed parameters.

    Stops at iteration i > k when phi < 0 and (phi_i - phi_{i-k}) / phi_i < k tolerance, k = max(10, i / 10), or after
    ``iterations`` (Martens 2010, section 4.4; phi(x) = x^T (C + damping I) x / 2 - target^T x, without extra products).
    Results: the last iterate; the iterates at ceil(1.3^j) and the last, one a row; the *undamped* model value
    x^T C x / 2 - target^T x of each of these rows.
    """
    x = start.clone()
    residual = target - _damped(oracle, x, damping)
    direction, rho = residual.clone(), residual.dot(residual)
    history: list[float] = []
    kept, values = [], []
    following = 1.0

    def value() -> float:
        return float(-0.5 * x.dot(residual + target))

    history.append(value())
    for i in range(1, iterations + 1):
        image = _damped(oracle, direction, damping)
        curvature = direction.dot(image)
        if not bool(curvature > 0):
            break
        alpha = rho / curvature
        x = x + alpha * direction
        residual = residual - alpha * image
        fresh = residual.dot(residual)
        history.append(value())
        if i >= following:
            kept.append(x)
            values.append(history[-1])
            while following <= i:
                following *= 1.3
        back = max(10, i // 10)
        if i > back and history[-1] < 0 and (history[-1] - history[-1 - back]) / history[-1] < back * tolerance:
            break
        if not bool(fresh > torch.finfo(x.dtype).tiny):
            break
        direction, rho = residual + (fresh / rho) * direction, fresh
    if not kept or kept[-1] is not x:
        kept.append(x)
        values.append(history[-1])
    rows = torch.stack(kept)
    undamped = torch.tensor(values, dtype=x.dtype, device=x.device) - 0.5 * damping * rows.square().sum(1)
    return x.clone(), rows, undamped.to(x.dtype)


def _damped(oracle: Any, flat: Tensor, damping: Tensor) -> Tensor:
    parts, offset = [], 0
    for parameter in oracle.parameters:
        parts.append(flat[offset : offset + parameter.numel()].view(parameter.shape))
        offset += parameter.numel()
    return torch.cat([part.reshape(-1) for part in oracle.product(parts)]) + damping * flat


def _infer_hvp(oracle: Type, vectors: Sequence[Type]) -> tuple[Type, ...]:
    return tuple(vectors)


def _infer_cg(oracle: Type, target: Vec, *rest: Any) -> tuple[Type, ...]:
    (size,) = target.shape
    return Vec((size,), target.dtype), Mat((None, size), target.dtype), Vec((None,), target.dtype)


def _no_samples() -> Iterator[tuple[Any, ...]]:
    return iter(())


signs = Op(
    "signs",
    "(Tensor like, Tensor seed, Tensor step, int stream) -> Tensor",
    _signs,
    lambda like, seed, step, stream: like,
    _signs_samples,
    fake=_signs_fake,
)
hvp = Op("hvp", "(oracle, Tensor[] vectors) -> Tensor[]", _hvp, _infer_hvp, _no_samples, traits=_ORACLE)
cg = Op(
    "cg",
    "(oracle, Tensor target, Tensor start, Tensor damping, int iterations, float tolerance)"
    " -> (Tensor, Tensor, Tensor)",
    _cg,
    _infer_cg,
    _no_samples,
    traits=_ORACLE,
)
