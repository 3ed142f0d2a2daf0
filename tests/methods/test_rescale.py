"""Rescalings by name against their formulas on the directions that nothing rescales."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import FxcurvError
from fxcurv.methods import PUBLISHED
from fxcurv.methods.parts.rescale import RESCALES
from tests.methods.nets import convnet, mlp
from tests.methods.oracle import Step, step

pytestmark = pytest.mark.usefixtures("float64")

LR = 0.2
METHODS = ("kfac", "ekfac", "kfac_rnn", "gnn_ng")
NETS = {"conv": convnet, "deep": lambda: mlp(4, 4, 4, 4, 4, 4, 4, 3)}  # equal layers, that are stacked


def taken(method: str, net: str, rescale: str | None = None, **options: Any) -> tuple[Step, list[list[str]]]:
    """A step, and the parameters of each layer."""
    torch.manual_seed(0)
    model = NETS[net]()
    x = torch.randn(6, 2, 5, 5) if net == "conv" else torch.randn(6, 4)
    y = torch.randint(0, 3, (6,))
    if rescale is not None:
        options["rescale"] = rescale
    if "loss" not in options and PUBLISHED[method].defaults.get("fisher") != "empirical":
        options["loss"] = "cross_entropy"
    done = step(model, method, x, lambda f: F.cross_entropy(f, y), lr=LR, **options)
    layers = [[f"{n}.{part}" for part in ("weight", "bias")] for n, m in model.named_children() if list(m.parameters())]
    return done, layers


def square(values: dict[str, Tensor], names: list[str]) -> float:
    return sum(float(values[name].square().sum()) for name in names)


def expected(rescale: str, free: Step, layers: list[list[str]], clip: float) -> list[float]:
    """The factor of every layer, from directions and gradients as they come."""
    names = [name for layer in layers for name in layer]
    if rescale in ("kl", "trust"):
        quadratic = sum(float((free.direction[n] * free.gradient[n]).sum()) for n in names)
        bound = clip if rescale == "kl" else 2 * clip
        return [min(1.0, math.sqrt(bound / (LR**2 * quadratic)))] * len(layers)
    if rescale == "match":
        return [math.sqrt(square(free.gradient, names) / square(free.direction, names))] * len(layers)
    return [math.sqrt(square(free.gradient, n) / square(free.direction, n)) for n in layers]


@pytest.mark.parametrize("clip", [1e-4, 1e6])
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("rescale", ["kl", "trust", "match", "graft"])
@pytest.mark.parametrize("method", METHODS)
def test_factor_of_every_layer(method: str, rescale: str, net: str, clip: float) -> None:
    free, layers = taken(method, net, "none")
    scaled, _ = taken(method, net, rescale, kl_clip=clip)
    factors = expected(rescale, free, layers, clip)
    if rescale in ("kl", "trust"):
        assert (factors[0] < 1) == (clip < 1)
    for names, factor in zip(layers, factors, strict=True):
        for name in names:
            torch.testing.assert_close(scaled.direction[name], factor * free.direction[name])
    common = None if rescale == "graft" else pytest.approx(factors[0], rel=1e-9)
    assert scaled.info.kl_scale == common and free.info.kl_scale is None


@pytest.mark.parametrize("method", METHODS)
def test_step_stays_within_the_bound(method: str) -> None:
    """Sheet, Damping (c): lr^2 <U, V> <= kl_clip after clipping, and half of it within "trust" (ACKTR's check 1)."""
    for rescale, half in (("kl", 1.0), ("trust", 0.5)):
        done, layers = taken(method, "conv", rescale, kl_clip=1e-4)
        # U is nu times what was inverted, so that <U, V> nu is nu^2 u^T F u
        inner = sum(float((done.direction[n] * done.gradient[n]).sum()) for layer in layers for n in layer)
        assert done.info.kl_scale is not None
        assert half * LR**2 * done.info.kl_scale * inner == pytest.approx(1e-4, rel=1e-6)


@pytest.mark.parametrize("rescale", ["kl", "trust"])
def test_no_clip_is_no_rescaling(rescale: str) -> None:
    free, _ = taken("kfac", "conv", "none")
    same, _ = taken("kfac", "conv", rescale, kl_clip=None)
    assert same.info.kl_scale is None
    for name, direction in free.direction.items():
        torch.testing.assert_close(same.direction[name], direction, rtol=0, atol=0)


@pytest.mark.parametrize("off", ["batch", "fuse", "defer", "reference"])
@pytest.mark.parametrize("rescale", ["match", "graft"])
def test_passes_change_nothing(rescale: str, off: str) -> None:
    options: dict[str, Any] = {"backend": "reference"} if off == "reference" else {"disable": (off,)}
    plain, _ = taken("kfac", "deep", rescale)
    switched, _ = taken("kfac", "deep", rescale, **options)
    for name, direction in plain.direction.items():
        torch.testing.assert_close(switched.direction[name], direction)


@pytest.mark.parametrize("rescale", ["match", "graft"])
def test_zero_gradient_gives_a_zero_step(rescale: str) -> None:
    """A layer whose gradient vanishes stays where it is; the others keep their length."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(5, 3)
    with torch.no_grad():
        net[0].bias.fill_(-100.0)  # no unit is on: the first layer gets no gradient
    done = step(net, "kfac", x, lambda f: f.square().mean(), loss="mse", fisher="ggn", rescale=rescale)
    assert not done.info.fallback
    assert not done.direction["0.weight"].any() and not done.direction["0.bias"].any()
    torch.testing.assert_close(done.direction["2.bias"].norm(), done.gradient["2.bias"].norm())


def test_unknown_name_is_refused() -> None:
    with pytest.raises(FxcurvError, match=f"choose one of {', '.join(RESCALES)}"):
        fxcurv.transform(mlp(2, 2), "kfac", loss="mse", rescale="long")
