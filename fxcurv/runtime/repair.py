"""The repair ladder for failed factorisations.

First the same computation in float64, then with the damping times 10, at most five times. Whatever the method, only the
nodes behind the failed states run, from the slice's own inputs. On request the failing matrices are written to a file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxcurv.ir.program import Role
from fxcurv.passes.lower import Lowered

ATTEMPTS = 5
STRENGTHS = ("damping", "epsilon")  # the hyper-parameters that regularise a factorisation


def repair(lowered: Lowered, due: Iterable[str], inputs: Mapping[Role, Any], failed: list[Role]) -> dict[Role, Tensor]:
    """Finite values for as many of the ``failed`` states as possible, in the states' own dtype."""
    if not failed:
        return {}
    part = lowered.slice(due, only=frozenset(failed))
    wide = {role: _double(inputs[role]) for role in part.inputs}
    found: dict[Role, Tensor] = {}
    for attempt in range(ATTEMPTS + 1):
        for role in wide:
            if role.kind == "hyper" and role.key in STRENGTHS:
                wide[role] = _double(inputs[role]) * 10.0**attempt
        results = dict(zip(part.outputs, part.function(*wide.values()), strict=True))
        for role in failed:
            if role not in found and bool(torch.isfinite(results[role]).all()):
                found[role] = results[role].to(inputs_dtype(lowered, role))
        if len(found) == len(failed):
            break
    return found


def dump(folder: str | os.PathLike[str], step: int, values: Mapping[Role, Tensor]) -> Path:
    """Write states by name to ``folder/failed-<step>.pt``, for ``torch.load(..., weights_only=True)``."""
    path = Path(folder) / f"failed-{step}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save({key: value.detach().cpu().clone() for role, value in values.items() for key in role.keys}, partial)
    partial.replace(path)
    return path


def inputs_dtype(lowered: Lowered, role: Role) -> torch.dtype:
    """The dtype in which a state is kept."""
    return lowered.program.inputs("state")[role].meta["type"].dtype  # type: ignore[no-any-return]


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
