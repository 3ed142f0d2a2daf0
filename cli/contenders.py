"""Who takes part in a comparison: methods by name or group, each with a grid of hyper-parameters to choose from.

A grid is made of axes such as ``lr=0.01,0.1`` (values) or ``lr=x0.3,x1,x3`` (factors on the file's setting or, without
one, on the method's default): learning rates of different methods mean different things, so factors are the default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from fxcurv.cli.modelfile import ModelFile
from fxcurv.cli.verb import literal
from fxcurv.errors import FxcurvError
from fxcurv.methods import PUBLISHED, get_method
from fxcurv.methods.papers import papers
from fxcurv.runtime.newton import NEWTON

BASELINES = ("sgd", "adam")
USUAL = ("kfac", "ekfac", "tkfac", "eva", "foof", "shampoo")


@dataclass(frozen=True)
class Axis:
    """Values of one hyper-parameter; ``factors``: they multiply what would be used otherwise."""

    name: str
    values: tuple[Any, ...]
    factors: bool = False


DEFAULT = (Axis("lr", (0.3, 1.0, 3.0), True), Axis("damping", (1.0, 10.0), True))
CLIPPED = (Axis("kl_clip", (1.0, 10.0, 100.0), True), DEFAULT[1])  # the clip decides the length, and lr cancels out


@dataclass(frozen=True)
class Contender:
    """A method and the settings among which a short search chooses; with one there is no search."""

    method: str
    points: tuple[dict[str, Any], ...]


def family() -> tuple[str, ...]:
    """The Kronecker family: methods whose paper stands in a sheet of that name."""
    known = papers()
    sheets = {name: [known[n].sheet for n in m.papers if n in known] for name, m in PUBLISHED.items()}
    return tuple(sorted(name for name, found in sheets.items() if any(s.startswith("kronecker") for s in found)))


def chosen_methods(text: str | None) -> tuple[str, ...]:
    """Names from ``--methods``: a list with commas, "all", or "family"; raises :class:`FxcurvError` on an unknown one.

    Without a list, and in groups, the baselines come first.
    """
    if text is None or text == "usual":
        return (*BASELINES, *(name for name in USUAL if name in PUBLISHED))
    if text == "all":
        return (*BASELINES, *(name for name in sorted(PUBLISHED) if name not in BASELINES))
    names: dict[str, None] = {}
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name == "family":
            names |= dict.fromkeys((*BASELINES, *family()))
            continue
        if name not in PUBLISHED:
            get_method(name)  # raises with the nearest names
        names[name] = None
    if not names:
        raise FxcurvError("--methods is empty; name some, for example --methods kfac,ekfac, or all, or family.")
    return tuple(names)


def parse_grid(texts: Sequence[str] | None) -> tuple[Axis, ...] | None:
    """Axes from ``--grid`` options; ``None`` without any, no axes for "none"."""
    if not texts:
        return None
    if list(texts) == ["none"]:
        return ()
    axes = []
    for text in texts:
        name, equals, rest = text.partition("=")
        parts = [part.strip() for part in rest.split(",") if part.strip()]
        if not equals or not name.strip().isidentifier() or not parts:
            raise FxcurvError(f"--grid {text}: write NAME=VALUE,VALUE, for example --grid lr=x0.3,x1,x3.")
        factors = [part.startswith("x") for part in parts]
        values = [literal(name, part.removeprefix("x")) for part in parts]
        if any(factors) and not (all(factors) and all(isinstance(v, (int, float)) for v in values)):
            raise FxcurvError(f"--grid {text}: give numbers, or factors such as x0.3,x1,x3, not both.")
        axes.append(Axis(name.strip(), tuple(values), all(factors)))
    return tuple(axes)


def contenders(
    file: ModelFile, methods: Sequence[str], given: Mapping[str, Any], grid: tuple[Axis, ...] | None
) -> tuple[Contender, ...]:
    """Every method with its settings: the file's, overridden by ``given`` where the method has such a hyper-parameter.

    grid: for all methods, on those of its axes that they have. Without one, methods that the file has settings for are
    taken as they are; others search the axes of DEFAULT, or of CLIPPED where a KL clip is on. Raises
    :class:`FxcurvError` for a name that no method has.
    """
    known = {method: {**PUBLISHED[method].defaults, **_options(method)} for method in methods}
    for name in (*given, *(axis.name for axis in grid or ())):
        if not any(name in defaults for defaults in known.values()):
            raise FxcurvError(f"none of the methods has a hyper-parameter '{name}'.")
    return tuple(_contender(file, method, known[method], given, grid) for method in methods)


def _contender(
    file: ModelFile, method: str, known: Mapping[str, Any], given: Mapping[str, Any], grid: tuple[Axis, ...] | None
) -> Contender:
    base = file.hyper(method, {name: value for name, value in given.items() if name in known})
    axes = grid
    if axes is None:
        searched = method not in file.settings and get_method(method).rule.kind == "step"
        usual = CLIPPED if base.get("kl_clip", known.get("kl_clip")) is not None else DEFAULT
        axes = tuple(axis for axis in usual if axis.name not in given) if searched else ()
    choices: list[list[tuple[str, Any]]] = []
    for axis in axes:
        middle = base.get(axis.name, known.get(axis.name))
        if axis.name not in known or (axis.factors and not isinstance(middle, (int, float))):
            continue
        values = [float(f"{value * middle:.6g}") for value in axis.values] if axis.factors else axis.values
        choices.append([(axis.name, value) for value in dict.fromkeys(values)])
    return Contender(method, tuple({**base, **dict(point)} for point in product(*choices)))


def _options(method: str) -> dict[str, Any]:
    """Options of the optimizer beside the hyper-parameters."""
    return dict(NEWTON) if get_method(method).rule.kind == "newton" else {}
