"""detect: find the layers of the captured forward graph, and choose the ones to precondition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import ClassVar

from torch import nn

from fxcurv.capture import Call, Captured, propagate
from fxcurv.errors import FxcurvError
from fxcurv.layers.aggregate import aggregated
from fxcurv.layers.detect import detect
from fxcurv.layers.layer import Detection, Layer
from fxcurv.passes.manager import Compilation, Pass


@dataclass(frozen=True)
class Detect(Pass):
    """Anchors at parameters and lists every layer, and every parameter that no layer covers with the reason."""

    name: ClassVar[str] = "detect"
    needs: ClassVar[tuple[str, ...]] = ("captured", "model")

    def run(self, c: Compilation) -> int:
        assert c.captured is not None and c.model is not None
        call, fused = c.options.get("call"), c.options.get("fused")
        if fused:
            _check_fused(fused, find_layers(c.captured, c.model, call))
        c.detection = find_layers(c.captured, c.model, call, fused)
        c.layers = select(c.detection.layers, c.options.get("layers"), c.options.get("skip"))
        if c.method is not None and c.method.aggregated:
            c.layers = tuple(aggregated(layer, c.model) for layer in c.layers)
        return len(c.layers)


def _check_fused(fused: Mapping[str, int], undivided: Detection) -> None:
    names = [layer.name for layer in undivided.layers]
    for pattern, count in fused.items():
        if not isinstance(count, int) or count < 1:
            raise FxcurvError(f"fused={{'{pattern}': {count!r}}} must be a whole number of blocks, at least 1.")
        if not any(name == pattern or fnmatch(name, pattern) for name in names):
            shown = ", ".join(names[:8]) or "none"
            raise FxcurvError(f"fused: the pattern '{pattern}' fits no layer name; there are {shown}.")


def find_layers(
    captured: Captured, model: nn.Module, call: Call | None = None, fused: Mapping[str, int] | None = None
) -> Detection:
    """Layers of a captured graph, and the parameters without one.

    call: shapes are taken from its tensors where detection needs them: a product with a weight of three axes, say.
    fused: see :func:`fxcurv.layers.detect.detect`.
    """
    found = None if fused else detect(captured, model)
    if (found is None or found.uncovered) and call is not None and call.real:
        propagate(captured, model, call.leaves)
        found = None
    return found or detect(captured, model, fused=fused)


def select(
    layers: tuple[Layer, ...], include: list[str] | str | None, exclude: list[str] | str | None
) -> tuple[Layer, ...]:
    """Layers whose name or kind matches a pattern of ``include`` (all when ``None``) and none of ``exclude``."""
    wanted = [include] if isinstance(include, str) else include
    unwanted = [exclude] if isinstance(exclude, str) else (exclude or [])

    def matches(layer: Layer, patterns: list[str]) -> bool:
        # names of parts of a weight hold brackets, which fnmatch reads as sets of characters
        return any(layer.name == p or fnmatch(layer.name, p) or fnmatch(layer.kind, p) for p in patterns)

    for pattern in [*(wanted or []), *unwanted]:
        if not any(matches(layer, [pattern]) for layer in layers):
            names = ", ".join(layer.name for layer in layers[:8])
            raise FxcurvError(f"the pattern '{pattern}' matches no layer name or kind; there are {names}, ...")
    return tuple(
        layer for layer in layers if (wanted is None or matches(layer, wanted)) and not matches(layer, unwanted)
    )
