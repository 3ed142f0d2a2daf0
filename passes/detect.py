"""detect: find the layers of the captured forward graph, and choose the ones to precondition."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from typing import ClassVar

from fxcurv.capture import propagate
from fxcurv.errors import FxcurvError
from fxcurv.layers.detect import detect
from fxcurv.layers.layer import Detection, Layer, Uncovered
from fxcurv.passes.manager import Compilation, Pass


@dataclass(frozen=True)
class Detect(Pass):
    """Anchors at parameters and lists every layer, and every parameter that no layer covers with the reason."""

    name: ClassVar[str] = "detect"
    needs: ClassVar[tuple[str, ...]] = ("captured", "model")

    def run(self, c: Compilation) -> int:
        assert c.captured is not None and c.model is not None
        c.detection = _whole(detect(c.captured, c.model))
        call = c.options.get("call")
        if c.detection.uncovered and call is not None and call.real:
            propagate(c.captured, c.model, call.leaves)  # a product with a weight of three axes needs shapes
            c.detection = _whole(detect(c.captured, c.model))
        c.layers = select(c.detection.layers, c.options.get("layers"), c.options.get("skip"))
        return len(c.layers)


def _whole(detection: Detection) -> Detection:
    """Without layers whose weight is frozen: a bias alone keeps its gradient."""
    bare = [layer for layer in detection.layers if layer.weight is None]
    lost = tuple(
        Uncovered(
            name, f"It is the shift of '{layer.name}', whose scale is missing or frozen.", (layer.uses[0].y.name,)
        )
        for layer in bare
        for name in layer.params
    )
    kept = tuple(layer for layer in detection.layers if layer.weight is not None)
    return Detection(kept, (*detection.uncovered, *lost))


def select(
    layers: tuple[Layer, ...], include: list[str] | str | None, exclude: list[str] | str | None
) -> tuple[Layer, ...]:
    """Layers whose name or kind matches a pattern of ``include`` (all when ``None``) and none of ``exclude``."""
    wanted = [include] if isinstance(include, str) else include
    unwanted = [exclude] if isinstance(exclude, str) else (exclude or [])

    def matches(layer: Layer, patterns: list[str]) -> bool:
        return any(fnmatch(layer.name, p) or fnmatch(layer.kind, p) for p in patterns)

    for pattern in [*(wanted or []), *unwanted]:
        if not any(matches(layer, [pattern]) for layer in layers):
            names = ", ".join(layer.name for layer in layers[:8])
            raise FxcurvError(f"the pattern '{pattern}' matches no layer name or kind; there are {names}, ...")
    return tuple(
        layer for layer in layers if (wanted is None or matches(layer, wanted)) and not matches(layer, unwanted)
    )
