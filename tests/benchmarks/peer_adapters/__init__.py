"""One training step of every library that ``peers.py`` compares, behind the same few methods.

``LIBRARIES`` maps a name to the module that has its ``build``; modules import their library when they are asked for,
so that a missing one is a line in the table.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from torch import nn
from workloads import Workload

from peer_adapters.side import Cadence, Side

LIBRARIES: dict[str, str] = {
    "fxcurv": "fxcurv_side",
    "asdl": "asdl_side",
    "curvlinops": "curvlinops_side",
    "singd": "singd_side",
    "nngeometry": "nngeometry_side",
    "backpack": "backpack_side",
}


def import_library(library: str) -> ModuleType:
    """The module of a library's side; raises :class:`ImportError` where the library is not installed."""
    return import_module(f"peer_adapters.{LIBRARIES[library]}")


def build(library: str, work: Workload, net: nn.Module, cadence: Cadence, **options: object) -> Side:
    """A library's training step of a fresh model; raises what the library raises."""
    return import_library(library).build(work, net, cadence, **options)  # type: ignore[no-any-return]
