"""Local problems: fit one layer to targets of its own, its input rows frozen (Amid, Anil & Warmuth 2022, LocoProp).

The target of row i is f(W_t a_i) - gamma g_i, g_i the gradient of the loss at the product. Summed over rows, the
gradient of the local loss at W = W_t - D is

    gamma V + sum_i (f(W a_i) - f(W_t a_i)) a_i^T - proximal D

with V = sum_i g_i a_i^T the layer's own gradient: the g_i are not needed row by row. For the squared loss f is the
identity and the middle term is -D H with H = sum_i a_i a_i^T, so that not even the a_i are. The result of an op is D,
what the layer's weight loses by ``steps`` steps of a first-order method at the rates rate * max(1 - t/steps, 1/4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import Op
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.ops.rules import accumulator, count_of, need, need_rows, need_scalar, need_shape, number
from fxcurv.ir.ops.statistics import ungroup, wide
from fxcurv.ir.types import Diag, Mat, Psd, Scalar, Type

SLOWEST = 0.25  # part of the rate that is left in the last of many steps

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda s: s,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "softplus": F.softplus,
    "softmax": lambda s: s.softmax(-1),
}
"""Gradients f of convex functions, by name; rows in the last dimension."""


@dataclass(frozen=True)
class Numbers:
    """Numbers of one inner step; k counts the steps of all batches, from 1."""

    rate: Tensor
    beta1: Tensor
    beta2: Tensor
    epsilon: Tensor
    k: Tensor


@dataclass(frozen=True)
class Inner:
    """A first-order method: ``step(gradient, first, second, numbers)`` -> (step to subtract, first, second).

    first, second: how these slots start, "" where there is none. counts: whether it needs the number of the step.
    """

    step: Callable[[Tensor, Tensor, Tensor, Numbers], tuple[Tensor, Tensor, Tensor]]
    first: str = ""
    second: str = ""
    counts: bool = False


def _sgd(g: Tensor, m: Tensor, v: Tensor, n: Numbers) -> tuple[Tensor, Tensor, Tensor]:
    return n.rate * g, m, v


def _momentum(g: Tensor, m: Tensor, v: Tensor, n: Numbers) -> tuple[Tensor, Tensor, Tensor]:
    m = n.beta1 * m + g
    return n.rate * m, m, v


def _nesterov(g: Tensor, m: Tensor, v: Tensor, n: Numbers) -> tuple[Tensor, Tensor, Tensor]:
    m = n.beta1 * m + g
    return n.rate * (g + n.beta1 * m), m, v


def _rmsprop(g: Tensor, m: Tensor, v: Tensor, n: Numbers) -> tuple[Tensor, Tensor, Tensor]:
    v = n.beta2 * v + (1 - n.beta2) * g.square()
    m = n.beta1 * m + n.rate * g / (v + n.epsilon).sqrt()
    return m, m, v


def _adam(g: Tensor, m: Tensor, v: Tensor, n: Numbers) -> tuple[Tensor, Tensor, Tensor]:
    m = n.beta1 * m + (1 - n.beta1) * g
    v = n.beta2 * v + (1 - n.beta2) * g.square()
    scale = (v / (1 - n.beta2**n.k)).sqrt() + n.epsilon
    return n.rate * (m / (1 - n.beta1**n.k)) / scale, m, v


def _adagrad(g: Tensor, m: Tensor, v: Tensor, n: Numbers) -> tuple[Tensor, Tensor, Tensor]:
    v = v + g.square()
    return n.rate * g / (v + n.epsilon).sqrt(), m, v


INNER: dict[str, Inner] = {
    "rmsprop": Inner(_rmsprop, first="zeros", second="ones"),
    "sgd": Inner(_sgd),
    "momentum": Inner(_momentum, first="zeros"),
    "nesterov": Inner(_nesterov, first="zeros"),
    "adam": Inner(_adam, first="zeros", second="zeros", counts=True),
    "adagrad": Inner(_adagrad, second="zeros"),
}
"""Inner optimizers. RMSProp has its rate inside its momentum and its second moment starts at 1, as the authors' has."""

Results = tuple[Tensor, Tensor, Tensor]


def _descend(
    force: Callable[[Tensor], Tensor],
    V: Tensor,
    slots: tuple[Any, Any],
    scalars: tuple[Any, ...],
    optimizer: str,
    steps: int,
) -> Results:
    """D and the new slots; ``force(D)`` is the local gradient beside gamma V - proximal D."""
    dtype = accumulator(V.dtype)
    missing = torch.zeros((), device=V.device, dtype=torch.float32)
    updates, count, gamma, proximal, rate, beta1, beta2, epsilon = (number(x, missing.to(dtype)) for x in scalars)
    old = [x if isinstance(x, Tensor) and x.ndim else missing for x in slots]
    (first, second), given = (x.to(dtype) for x in old), gamma * V.to(dtype)
    D = torch.zeros_like(given)
    for t in range(steps):
        numbers = Numbers(rate * max(1 - t / steps, SLOWEST), beta1, beta2, epsilon, updates * steps + t + 1)
        gradient = given + force(D) - proximal * D
        step, first, second = INNER[optimizer].step(gradient, first, second, numbers)
        D = D + step
    measured = (count > 0) & V.ne(0).any()  # a layer that was not reached, beside one with the same inputs that was
    new = (torch.where(measured, x.to(y.dtype), y) for x, y in zip((first, second), old, strict=True))
    return torch.where(measured, D, torch.zeros_like(D)).to(V.dtype), *new  # type: ignore[return-value]


def _fit_squared(
    V: Tensor, H: Tensor, first: Tensor, second: Tensor, updates: Tensor, count: Tensor, gamma: Tensor,
    proximal: Tensor, rate: Tensor, beta1: Tensor, beta2: Tensor, epsilon: Tensor, optimizer: str, steps: int,
) -> Results:  # fmt: skip
    """Fit a layer to its targets by the squared loss: (D, first, second), D what the weight loses (LocoProp-S).

    V: Mat, the gradient; H: sum over rows of a a^T, Psd or Diag; first, second: slots of V's type, or a number where
    the optimizer has none; updates: earlier calls; count: rows measured. Without rows, or with V = 0, nothing changes.
    The local gradient is gamma V - D (H + proximal I).
    """

    def force(D: Tensor) -> Tensor:
        return -(D @ H.to(D.dtype) if H.ndim == D.ndim else D * H.to(D.dtype).unsqueeze(-2))

    scalars = (updates, count, gamma, proximal, rate, beta1, beta2, epsilon)
    return _descend(force, V, (first, second), scalars, optimizer, steps)


def _fit_matching(
    V: Tensor, rows: Tensor, W: Tensor, first: Tensor, second: Tensor, updates: Tensor, count: Tensor, gamma: Tensor,
    proximal: Tensor, rate: Tensor, beta1: Tensor, beta2: Tensor, epsilon: Tensor, activation: str, optimizer: str,
    steps: int,
) -> Results:  # fmt: skip
    """Fit a layer to its targets by the matching loss of its activation: (D, first, second) (LocoProp-M).

    The loss of a row is F(W a) - y . (W a) with grad F = f and y = f(W_t a) - gamma g: convex in W. W: Mat, the weight
    W_t; rows: Rows a; activation: a key of FUNCTIONS; the rest as for ``fit_squared``, which it is for the identity.
    The local gradient is gamma V + sum (f((W_t - D) a) - f(W_t a)) a^T - proximal D.
    """
    f, dtype = FUNCTIONS[activation], accumulator(V.dtype)
    x = wide(rows).to(dtype).permute(2, 0, 1, 3).flatten(1, 2)  # (G, b s, i)
    x = ungroup(x)
    weight = W.to(dtype)
    before = f(x @ weight.mT)

    def force(D: Tensor) -> Tensor:
        return (f(x @ (weight - D).mT) - before).mT @ x

    scalars = (updates, count, gamma, proximal, rate, beta1, beta2, epsilon)
    return _descend(force, V, (first, second), scalars, optimizer, steps)


def _infer_slots(op: str, V: Type, slots: tuple[Any, Any], scalars: tuple[Any, ...], known: Any, optimizer: str) -> Any:
    need(op, "V", V, Mat)
    for name, slot in zip(("first", "second"), slots, strict=True):
        if isinstance(slot, Mat):
            need_shape(op, name, slot, V.shape)
        else:
            need_scalar(op, name, slot)
    for name, scalar in zip(("updates", "count", "gamma", "proximal", "rate"), scalars, strict=False):
        need_scalar(op, name, scalar)
    for name, value, table in known:
        if value not in table:
            raise FxcurvError(f"{name}='{value}' of op '{op}' is unknown; choose one of {', '.join(table)}.")
    return (V, *(slot if isinstance(slot, Mat) else Scalar((), torch.float32) for slot in slots))


def _infer_squared(V: Type, H: Type, first: Any, second: Any, *rest: Any) -> Any:
    *scalars, optimizer, _ = rest
    need("fit_squared", "H", H, Psd, Diag)
    shape = (*V.shape[:-2], *(V.shape[-1:] * (1 if isinstance(H, Diag) else 2)))
    need_shape("fit_squared", "H", H, shape)
    known = (("optimizer", optimizer, INNER),)
    return _infer_slots("fit_squared", V, (first, second), tuple(scalars), known, optimizer)


def _infer_matching(V: Type, rows: Type, W: Type, first: Any, second: Any, *rest: Any) -> Any:
    *scalars, activation, optimizer, _ = rest
    need_rows("fit_matching", ("rows", rows))
    need_shape("fit_matching", "W", need("fit_matching", "W", W, Mat), V.shape)
    known = (("optimizer", optimizer, INNER), ("activation", activation, FUNCTIONS))
    return _infer_slots("fit_matching", V, (first, second), tuple(scalars), known, optimizer)


def _slots(draw: Draw, inner: Inner, V: Tensor) -> tuple[Any, Any]:
    none = draw.number(0.0)
    return (draw.normal(*V.shape) if inner.first else none), (draw.positive(*V.shape) if inner.second else none)


def _numbers(draw: Draw, proximal: float, count: float) -> tuple[Tensor, ...]:
    values = (2.0, count, 0.7, proximal, 0.05, 0.6, 0.8, 1e-3)
    return tuple(draw.number(value) for value in values)


def _squared_samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(71)
    for i, (name, inner) in enumerate(INNER.items()):
        groups = (2,) if i % 2 else ()
        V, H = draw.normal(*groups, 3, 4), draw.psd(4, *groups)
        H = H if i % 3 else draw.positive(*groups, 4)
        yield V, H, *_slots(draw, inner, V), *_numbers(draw, 0.3 * (i % 2), 5.0), name, 4
    V = draw.normal(2, 3)
    yield V, draw.psd(3), *_slots(draw, INNER["adam"], V), *_numbers(draw, 0.1, 0.0), "adam", 2


def _matching_samples() -> Iterator[tuple[Any, ...]]:
    draw = Draw(72)
    names = list(INNER)
    for i, activation in enumerate(FUNCTIONS):
        b, s, groups = ((5, 1, 1), (2, 3, 1), (3, 2, 2))[i % 3]
        rows, shape = draw.normal(b, s, groups, 4), (3, 4) if groups == 1 else (groups, 3, 4)
        V, W, name = draw.normal(*shape), draw.normal(*shape), names[i % len(names)]
        slots = _slots(draw, INNER[name], V)
        yield V, rows, W, *slots, *_numbers(draw, 0.2 * (i % 2), float(b * s)), activation, name, 3


fit_squared = Op(
    "fit_squared",
    "(Tensor V, Tensor H, Tensor first, Tensor second, Tensor updates, Tensor count, Tensor gamma, Tensor proximal, "
    "Tensor rate, Tensor beta1, Tensor beta2, Tensor epsilon, str optimizer, int steps) -> (Tensor, Tensor, Tensor)",
    _fit_squared,
    _infer_squared,
    _squared_samples,
    flops=lambda V, H, *rest: rest[-1] * V.numel * (2 * V.shape[-1] if isinstance(H, Psd) else 2),
)
fit_matching = Op(
    "fit_matching",
    "(Tensor V, Tensor rows, Tensor W, Tensor first, Tensor second, Tensor updates, Tensor count, Tensor gamma, "
    "Tensor proximal, Tensor rate, Tensor beta1, Tensor beta2, Tensor epsilon, str activation, str optimizer, "
    "int steps) -> (Tensor, Tensor, Tensor)",
    _fit_matching,
    _infer_matching,
    _matching_samples,
    flops=lambda V, rows, *rest: (4 * rest[-1] + 2) * V.numel * count_of(rows.shape[0]) * count_of(rows.shape[1]),
)
