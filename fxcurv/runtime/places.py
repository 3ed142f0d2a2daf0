"""Where a model's parameters are: the tensors it holds now, and a word when one is no longer in its place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fxcurv.errors import FxcurvError

Slot = tuple[dict[str, "nn.Parameter | None"], str]
Link = tuple[dict[str, "nn.Module | None"], str, nn.Module]


@dataclass(frozen=True)
class Places:
    """By full name of every trainable parameter the dictionary that holds it, and by path of every module on the way
    the dictionary that holds that one, its key and the module itself."""

    slots: Mapping[str, Slot]
    links: Mapping[str, Link]

    @staticmethod
    def of(model: nn.Module) -> Places:
        """The places of a model as it is now."""
        slots: dict[str, Slot] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                path, _, key = name.rpartition(".")
                slots[name] = model.get_submodule(path)._parameters, key
        return Places(slots, _links(model, slots))

    @property
    def first(self) -> str:
        """The first parameter's name."""
        return next(iter(self.slots))

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by full name: the tensors that the model holds now."""
        return {name: owner[key] for name, (owner, key) in self.slots.items()}  # type: ignore[misc]

    def device(self, name: str) -> torch.device:
        """The device of a parameter."""
        holder, key = self.slots[name]
        return holder[key].device  # type: ignore[union-attr]

    def check(self) -> None:
        """Raises :class:`FxcurvError` when a parameter is not where the transform found it, or is on meta."""
        moved = next((path for path, (holder, key, held) in self.links.items() if holder.get(key) is not held), None)
        for name, (owner, key) in self.slots.items():
            parameter = owner.get(key)
            if parameter is None or (moved is not None and name.startswith(f"{moved}.")):
                raise FxcurvError(
                    f"the parameter '{name}' is not in its place any more (its layer was replaced, or reparametrised): "
                    "call fxcurv.transform(model.strip(), ...) again."
                )
            if parameter.is_meta:
                raise FxcurvError(
                    f"the parameter '{name}' is on the meta device, where nothing can be computed: move the model to "
                    "another one and load its state."
                )


def _links(model: nn.Module, names: Iterable[str]) -> dict[str, Link]:
    """By path: where each module on the way to a parameter is held, under which key, and the module itself."""
    found: dict[str, Link] = {}
    for name in names:
        holder, parts = model, name.split(".")[:-1]
        for depth, key in enumerate(parts):
            held = holder.get_submodule(key)
            found[".".join(parts[: depth + 1])] = holder._modules, key, held
            holder = held
    return found
