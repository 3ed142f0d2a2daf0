"""The inputs of a slice: gradients, rows, states, statistics and numbers in the scale of the mean loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxcurv.methods.parts.hybrid import LOSS
from fxcurv.passes.lower import Bundle, Slice
from fxcurv.runtime.batch import Batch
from fxcurv.runtime.rows import joined
from fxcurv.runtime.sources import weight

if TYPE_CHECKING:
    from fxcurv.runtime.engine import Engine


def inputs_of(
    engine: Engine, current: Slice, batch: Batch, scales: tuple[float, float], rate: float | None
) -> dict[Any, Any]:
    """What every input of a slice is in the coming step, by role, in order.

    scales: that which gradients still carry, and that at which statistics were captured. rate: the learning rate, if an
    optimizer has its own.
    """
    parameters, (scale, captured_scale) = engine.parameters(), scales
    terms = batch.terms
    factor = engine.factor(terms, scale)
    numbers = {**engine.hyper, "seed": float(engine.seed), "step": float(engine.step)}
    if rate is not None:
        numbers["lr"] = rate
    inputs: dict[Any, Any] = {}
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    for role in current.inputs:
        if isinstance(role, Bundle):
            if role.kind == "state":
                inputs[role] = engine.states.values.together(role)
            else:
                inputs[role] = batch.statistics.together(role.keys, engine.stat_device(role.keys[0]))
        elif role.kind == "grad":
            place, dtype = engine.stored[role.key]
            parameter = parameters[place.name]
            grad = parameter.grad
            grad = torch.zeros_like(parameter) if grad is None else grad.detach() if grad.requires_grad else grad
            grad = grad if place.region is None else place.of(grad)
            grad = grad if grad.dtype == dtype else grad.to(dtype)
            inputs[role] = grad if factor == 1.0 else grad * factor
        elif role.kind == "param":
            place, dtype = engine.stored[role.key]
            value = parameters[place.name].detach()
            inputs[role] = (value if place.region is None else place.of(value)).to(dtype)
        elif role.kind == "rows":
            name, _, side = role.key.rpartition(".")
            if name not in kept:
                kept[name] = rows_of(engine, name)
            inputs[role] = kept[name][0] if side == "x" else kept[name][1] * factor
        elif role.kind == "state":
            inputs[role] = engine.states.values[role]
        elif role.kind == "hyper" and role.key == LOSS:
            like = engine.numbers.tensor("step", numbers["step"])
            inputs[role] = engine.watched.value(engine.ranks, like, captured_scale, engine.method.name)
        elif role.kind == "hyper":
            inputs[role] = engine.numbers.tensor(role.key, numbers[role.key])
        elif role.kind == "oracle":
            inputs[role] = batch.oracle
        elif role.key == "terms":
            inputs[role] = engine.numbers.tensor("terms", terms)
        elif role.key == "weight":
            found = weight(engine.method.source, engine.loss, terms, captured_scale)
            inputs[role] = engine.numbers.tensor("weight", found)
        else:
            inputs[role] = batch.statistics.value(role.key, engine.stat_device(role.key))
    return inputs


def rows_of(engine: Engine, name: str) -> tuple[Tensor, Tensor]:
    """A layer's whole gradient as rows (x, dy): kept ones, and what has arrived in its weight's ``grad``."""
    target = engine.row_layers[name]
    weight = engine.parameters()[target.weight]
    shape = target.d_out, target.d_in - target.homogeneous
    stored = None if weight.grad is None else weight.grad.permute(target.permutation).reshape(shape)
    like = weight.new_empty(0, dtype=engine.row_types[f"{name}.x"].dtype)
    return joined(engine.rows.of(name), stored, shape, like)


def gradient_scale(scaler: Any, parameters: Iterable[Tensor]) -> tuple[float, float, bool]:
    """(scale the gradients still carry, scale at which statistics were captured, whether gradients overflowed).

    After ``scaler.unscale_`` the gradients are plain and the scaler knows of an overflow; before it they carry the
    scale and are looked at here.
    """
    if scaler is None or not scaler.is_enabled():
        return 1.0, 1.0, False
    scale = float(scaler.get_scale())
    unscaled = [s for s in scaler._per_optimizer_states.values() if s["found_inf_per_device"]]
    if unscaled:
        return 1.0, scale, any(float(v) > 0 for s in unscaled for v in s["found_inf_per_device"].values())
    return scale, scale, any(p.grad is not None and not bool(torch.isfinite(p.grad).all()) for p in parameters)
