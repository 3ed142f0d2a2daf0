"""From what users write for ``loss=`` to a loss object: a name, an ``nn`` loss module, or the object itself."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from torch import nn

from fxcurv.errors import FxcurvError
from fxcurv.losses.base import Loss
from fxcurv.losses.cross_entropy import TORCH_IGNORE_INDEX, CrossEntropy
from fxcurv.losses.elementwise import BCE, MSE, Gaussian

LOSSES: dict[str, type[Loss]] = {"cross_entropy": CrossEntropy, "bce": BCE, "mse": MSE, "gaussian": Gaussian}

# Exact classes: a subclass may override forward, and its curvature would be a guess.
_MODULES: dict[type[nn.Module], Callable[[Any], Loss]] = {
    nn.CrossEntropyLoss: lambda m: CrossEntropy(
        reduction=m.reduction,
        ignore_index=None if m.ignore_index == TORCH_IGNORE_INDEX else m.ignore_index,
        label_smoothing=m.label_smoothing,
        weight=m.weight,
    ),
    nn.BCEWithLogitsLoss: lambda m: BCE(reduction=m.reduction, weight=m.weight, pos_weight=m.pos_weight),
    nn.MSELoss: lambda m: MSE(reduction=m.reduction),
}
_ON_LOGITS: dict[type[nn.Module], str] = {nn.BCELoss: "BCEWithLogitsLoss", nn.NLLLoss: "CrossEntropyLoss"}


def _by_name(name: str) -> Loss:
    if name in LOSSES:
        return LOSSES[name]()
    near = difflib.get_close_matches(name.lower(), LOSSES, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else "."
    raise FxcurvError(f"loss='{name}' is not known, the names are {', '.join(LOSSES)}{hint}")


def _by_module(module: nn.Module) -> Loss:
    name = type(module).__name__
    if type(module) in _ON_LOGITS:
        raise FxcurvError(
            f"loss=nn.{name} reads probabilities, whose curvature is unbounded; return logits and use "
            f"nn.{_ON_LOGITS[type(module)]}."
        )
    if type(module) not in _MODULES:
        known = ", ".join(f"nn.{cls.__name__}" for cls in _MODULES)
        raise FxcurvError(f"loss={name}(...) is a module without known curvature; use one of {known}, or loss=None.")
    if getattr(module, "reduction", None) == "none":
        raise FxcurvError(f"loss=nn.{name}(reduction='none') has no scalar to count; say 'mean' or 'sum'.")
    return _MODULES[type(module)](module)


def resolve_loss(loss: Loss | nn.Module | str | None) -> Loss | None:
    """The loss object that ``loss`` stands for; ``None`` stays ``None`` (the Fisher is empirical then).

    Raises :class:`FxcurvError` on an unknown name, a module without known curvature, or another type.
    """
    if loss is None or isinstance(loss, Loss):
        return loss
    if isinstance(loss, str):
        return _by_name(loss)
    if isinstance(loss, nn.Module):
        return _by_module(loss)
    raise FxcurvError(
        f"loss= is a {type(loss).__name__}; pass a name ({', '.join(LOSSES)}), an nn loss module or an object of "
        "fxcurv.losses."
    )
