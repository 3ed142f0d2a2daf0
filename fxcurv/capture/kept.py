"""Module classes that the ``symbolic`` front-end keeps as one node, beside those of torch.nn.

Registering a spelling for a class of one's own makes it a layer kind: its calls then stay visible as such.
"""

from __future__ import annotations

from torch import nn

_KEPT: set[type[nn.Module]] = set()


def keep_whole(cls: type[nn.Module]) -> None:
    """Keep calls of modules of this class as one node of a captured graph."""
    _KEPT.add(cls)


def is_kept(module: nn.Module) -> bool:
    """Whether a module is of a kept class and runs that class's own forward."""
    kind: type[nn.Module] = type(module)
    return any(cls in _KEPT and kind.forward is cls.forward for cls in kind.__mro__)
