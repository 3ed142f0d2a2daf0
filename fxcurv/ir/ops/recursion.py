"""Curvature pushed back from one layer to the one before it (Botev, Ritter & Barber 2017, KFRA).

With s the product before an elementwise f and a = f(s) the next layer's input, f'(s) is a function of a: the rows that
are measured anyway say all that is needed. A function of another value (GELU, say) has no such slope.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fxcurv.ir.op import Op, Trait
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.rules import accumulator, need, need_rows, need_scalar, need_shape
from fxcurv.ir.ops.statistics import wide
from fxcurv.ir.types import Diag, Mat, Psd, Rows, Type

LEAK = 0.01

SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": lambda a: 1 - a.square(),
    "sigmoid": lambda a: a * (1 - a),
    "relu": lambda a: (a > 0).to(a.dtype),
    "leaky_relu": lambda a: torch.where(a > 0, torch.ones_like(a), LEAK),
    "softplus": lambda a: -torch.expm1(-a),
}
"""f' by the name of f, from the values of f. At a kink it is the slope from the left."""


def _slopes(name: str) -> Op:
    """The op ``slopes_<name>``: Rows f(s) -> Rows f'(s), shape and order kept."""

    def reference(rows: Tensor) -> Tensor:
        return SLOPES[name](wide(rows))

    reference.__doc__ = f"f'(s) of f = {name} from rows f(s), Rows -> Rows; a constant coordinate is taken for a value."
    reference.__module__ = __name__

    def infer(rows: Type) -> Type:
        need_rows(f"slopes_{name}", ("rows", rows))
        return Rows(rows.shape, accumulator(rows.dtype))

    def samples() -> Iterator[tuple[Tensor]]:
        draw = Draw(81)
        for shape in ((5, 1, 1, 3), (2, 4, 1, 4), (0, 1, 1, 2)):
            yield (draw.normal(*shape),)

    return Op(
        f"slopes_{name}",
        "(Tensor rows) -> Tensor",
        reference,
        infer,
        samples,
        flops=lambda rows: 2 * rows.numel,
        traits=frozenset({Trait.ROWWISE}),
    )


slopes = {name: _slopes(name) for name in SLOPES}


def _pull_back(G: Tensor, W: Tensor, S: Tensor, size: int) -> Tensor:
    """The first ``size`` rows and columns of (W^T G W) .* S, Psd (size, size): G one layer earlier.

    G: Psd or Diag (o), the curvature in the later layer's products; W: Mat (o, i), its weight, the bias column last; S:
    Psd (i), the mean of f' f'^T over the rows between the layers, or a number. Botev et al. 2017, equation for KFRA.
    """
    G, W = G.to(accumulator(G.dtype)), W.to(accumulator(G.dtype))[:, :size]
    inner = W.mT @ (G @ W if G.ndim == 2 else G.unsqueeze(-1) * W)
    slope = S[:size, :size] if isinstance(S, Tensor) and S.ndim else S
    return (inner * slope).to(G.dtype)


def _infer_pull_back(G: Type, W: Type, S: Any, size: int) -> Type:
    need("pull_back", "W", W, Mat)
    out, inputs = W.shape
    need_shape("pull_back", "G", need("pull_back", "G", G, Psd, Diag), (out,) if isinstance(G, Diag) else (out, out))
    if isinstance(S, Psd):
        need_shape("pull_back", "S", S, (inputs, inputs))
    else:
        need_scalar("pull_back", "S", S)
    return Psd((size, size), accumulator(G.dtype))


def _pull_back_samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(82)
    yield draw.psd(3), draw.normal(3, 5), draw.psd(5), 4
    yield draw.positive(3), draw.normal(3, 4), draw.psd(4), 4
    yield draw.psd(2), draw.normal(2, 3), draw.number(1.0), 2


pull_back = Op(
    "pull_back",
    "(Tensor G, Tensor W, Tensor S, int size) -> Tensor",
    _pull_back,
    _infer_pull_back,
    _pull_back_samples,
    flops=lambda G, W, S, size: 2 * W.numel * ((W.shape[-2] if isinstance(G, Psd) else 1) + size),
)
