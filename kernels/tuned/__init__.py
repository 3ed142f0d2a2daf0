"""Tuning tables as data: one TOML file a kernel family, block sizes and warps by architecture and bucket of sizes.

    [[config]]
    arch = ["sm_80", "sm_90"]                 # left out: any
    when = { d = [1, 64], dtype = "fp32" }    # closed ranges and equal values of the geometry; left out: any
    use = { block = 64, num_warps = 4 }       # what the template gets

The first entry that fits wins, so the last one has neither ``arch`` nor ``when``: the defaults. ``interpret`` is the
architecture of Triton's interpreter, with blocks so small that the small operands of tests need several.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fxcurv.errors import FxcurvError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent
ARCHITECTURES = ("sm_80", "sm_90", "gfx942", "interpret")


@cache
def table(family: str) -> tuple[dict[str, Any], ...]:
    """The entries of a family's file; none for a family without one."""
    path = FOLDER / f"{family}.toml"
    if not path.is_file():
        return ()
    return tuple(tomllib.loads(path.read_text(encoding="utf-8")).get("config", ()))


def lookup(family: str, arch: str, geometry: Mapping[str, Any]) -> dict[str, Any]:
    """Block sizes, ``num_warps`` and ``num_stages`` of a family on an architecture; empty without a table.

    An architecture that no entry names gets the entries that name none. Raises :class:`FxcurvError` when a table has
    no entry that fits.
    """
    entries = table(family)
    for entry in entries:
        if arch in entry.get("arch", (arch,)) and all(
            _within(geometry.get(key), wanted) for key, wanted in entry.get("when", {}).items()
        ):
            return dict(entry["use"])
    if entries:
        raise FxcurvError(f"kernels/tuned/{family}.toml has no entry for {arch} and {dict(geometry)}; add a default.")
    return {}


def _within(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, list):
        return isinstance(value, int) and wanted[0] <= value <= wanted[1]
    return bool(value == wanted)
