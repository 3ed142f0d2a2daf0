"""What weight decay does to a model under a second-order method: the three mechanisms, as numbers for each layer.

1. A layer whose scale its network ignores (one that a norm layer follows) moves by lr / |theta|^2 in direction: decay
   keeps this effective learning rate from collapsing as |theta| grows.
2. Without norm layers, theta^T C theta is what decay under a Gauss-Newton preconditioner C penalises: for a ReLU
   network of L weight matrices without biases and C = E[J^T J] (fisher="logits") it is L^2 E|f(x)|^2 over all layers
   together, the input-output Jacobian's norm for whitened inputs.
3. The curvature of a scale-free layer is C(direction) / |theta|^2, so that its damping acts as damping |theta|^2.

Source: Zhang, Wang, Xu & Grosse 2018 (sheet diagonal-and-proximal, 70).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from fxcurv.errors import FxcurvError
from fxcurv.runtime.module import CurvatureModule

BLOCK_LIMIT = 4096  # rows of the largest dense block that is built for a norm


@dataclass(frozen=True)
class LayerDecay:
    """One layer. squared_norm: |theta|^2 of its weight and bias. effective_rate: lr / |theta|^2. effective_damping:
    damping |theta|^2; ``None`` where the method has none. scale_free: whether scaling the layer leaves the outputs as
    they are (then the two numbers before mean something); ``None`` where no inputs were given. curvature_norm:
    theta^T C theta with the layer's tracked, undamped curvature; ``None`` where the method keeps none of the layer.
    """

    layer: str
    squared_norm: float
    effective_rate: float
    effective_damping: float | None
    scale_free: bool | None
    curvature_norm: float | None


def decay_table(
    model: CurvatureModule, lr: float | None = None, inputs: Sequence[Any] | None = None
) -> tuple[LayerDecay, ...]:
    """The numbers of every preconditioned layer of a transformed model.

    lr: learning rate, by default the model's ``hyper["lr"]``. inputs: positional arguments of a call, on which is tried
    out which layers are scale-free, in the mode that the model is in.
    """
    if not isinstance(model, CurvatureModule):
        raise FxcurvError("decay_table takes a model made by fxcurv.transform.")
    rate = model.hyper.get("lr", 0.1) if lr is None else lr
    damping = model.hyper.get("damping")
    parameters = dict(model.named_parameters())
    rows = []
    for layer in model.layers:
        square = sum(float(place.of(parameters[place.name]).detach().double().square().sum()) for place in layer.places)
        rows.append(
            LayerDecay(
                layer=layer.name,
                squared_norm=square,
                effective_rate=rate / square if square else float("inf"),
                effective_damping=None if damping is None else damping * square,
                scale_free=None if inputs is None else is_scale_free(model.strip(), layer.params, inputs),
                curvature_norm=curvature_norm(model, layer.name),
            )
        )
    return tuple(rows)


def curvature_norm(model: CurvatureModule, name: str) -> float | None:
    """theta^T C theta of a layer, C its tracked curvature of the mean loss, undamped; ``None`` where there is none.

    With Kronecker factors <G W A, W>, and no large matrix; else by the dense block, up to ``BLOCK_LIMIT`` rows.
    """
    layer = next((layer for layer in model.layers if layer.name == name), None)
    if layer is None:
        raise FxcurvError(f"there is no layer '{name}'; there are {', '.join(layer.name for layer in model.layers)}.")
    parameters = dict(model.named_parameters())
    stored = [place.of(parameters[place.name]).detach() for place in layer.places]
    matrix = layer.form.matrix(stored[0], stored[1] if len(stored) > 1 else None)
    groups, d_out, d_in = matrix.shape
    factors = model.factors(name)
    if {"A", "G"} <= set(factors) and not {"S", "A1"} & set(factors) and _dense(factors, d_out, d_in):
        a, g = (factors[side].reshape(groups, d, d).to(matrix.dtype) for side, d in (("A", d_in), ("G", d_out)))
        return float((g @ matrix @ a * matrix).sum())
    if d_out * d_in > BLOCK_LIMIT:
        return None
    try:
        block = model.block(name)
    except FxcurvError:
        return None
    flat = matrix.reshape(groups, -1, 1)
    return float((flat.mT @ block.reshape(groups, d_out * d_in, -1).to(flat.dtype) @ flat).sum())


def _dense(factors: dict[str, Tensor], d_out: int, d_in: int) -> bool:
    return factors["A"].shape[-2:] == (d_in, d_in) and factors["G"].shape[-2:] == (d_out, d_out)


def jacobian_norm(net: nn.Module, inputs: Sequence[Any]) -> tuple[float, float]:
    """(theta^T G theta, E|f|^2) of a network: |J theta|^2 and |f|^2, each over the rows (dimension 0) of the output.

    G = E[J^T J] is the Gauss-Newton matrix in the Euclidean metric of the outputs, over *all* parameters together, from
    one product with the Jacobian: no approximation, no curvature state.
    """
    model = net.strip() if isinstance(net, CurvatureModule) else net
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}

    def call(given: dict[str, Tensor]) -> Tensor:
        return functional_call(model, {**buffers, **given}, tuple(inputs))  # type: ignore[no-any-return]

    outputs, product = jvp(call, (parameters,), (parameters,))[:2]
    rows = max(int(outputs.shape[0]), 1)
    return float(product.square().sum()) / rows, float(outputs.square().sum()) / rows


@torch.no_grad()
def is_scale_free(net: nn.Module, names: Sequence[str], inputs: Sequence[Any], factor: float = 2.0) -> bool:
    """Whether multiplying these parameters by ``factor`` leaves the network's first output tensor as it is.

    Tried out on one call in the network's mode, with the same random draws and with buffers left alone. Norm layers
    divide by sqrt(variance + epsilon), so equality is up to one part in a thousand.
    """
    parameters, buffers = dict(net.named_parameters()), dict(net.named_buffers())
    device = next(iter(parameters.values())).device

    def call(scale: float) -> Tensor:
        changed = {name: parameters[name].detach() * scale for name in names}
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            found = functional_call(net, {**{n: b.clone() for n, b in buffers.items()}, **changed}, tuple(inputs))
        values = found if isinstance(found, (tuple, list)) else [found]
        return next(value for value in values if isinstance(value, Tensor))

    plain, scaled = call(1.0), call(factor)
    return bool((plain - scaled).norm() <= 1e-3 * plain.norm()) and bool(plain.norm() > 0)
