"""A transformed model as plain data: what ``report.json`` holds, what the command line prints, what loading compares.

Everything here is numbers, strings, lists and dictionaries, so that it survives JSON unchanged.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections import Counter
from itertools import combinations
from math import lcm
from typing import Any

import torch
from torch import Tensor

import fxcurv
from fxcurv.errors import FxcurvError
from fxcurv.ir.cost import budget, state_bytes
from fxcurv.ir.program import STEP, Program
from fxcurv.ir.schedule import base_of, falls_due
from fxcurv.ir.types import DTYPE_NAMES
from fxcurv.losses import LOSSES, Loss
from fxcurv.methods.facts import Target
from fxcurv.runtime.module import CurvatureModule

FORMAT = "fxcurv artifact 1"


def describe(module: CurvatureModule, rows: int = 0) -> dict[str, Any]:
    """All that is known about a transformed model before it trains.

    rows: rows of a statistic that costs are counted for; 0 takes dimension 0 of the first example input, else 1.
    """
    engine, compilation = module._engine, module._engine.compilation
    request = compilation.options["request"]
    rows = rows or _batch(request["example"])
    return {
        "format": FORMAT,
        "versions": {"fxcurv": fxcurv.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "method": {"name": engine.method.name, "hyper": request["hyper"], "numbers": dict(engine.hyper)},
        "request": request,
        "loss": pack_loss(engine.loss),
        "report": plain(module.report().to_dict()),
        "layers": [
            {
                "name": layer.name,
                "kind": layer.kind,
                "params": list(layer.params),
                "shape": list(layer.shape),
                "uses": len(layer.uses),
                "note": layer.note,
            }
            for layer in module.layers
        ],
        "targets": [plain_target(target) for target in engine.facts.targets],
        "passes": [
            {"name": record.name, "seconds": record.seconds, "rewrites": record.rewrites} for record in module.history
        ],
        "forward": _forward(module),
        "program": _program(module.program),
        "kernels": dict(Counter(engine.lowered.kernels.values()).most_common()),
        "memory": _memory(module),
        "cost": cost(module.program, rows),
    }


def plain(value: Any) -> Any:
    """A value as JSON gives it back: tuples become lists."""
    return json.loads(json.dumps(value, default=str))


def plain_target(target: Target) -> dict[str, Any]:
    """A layer's normal form as plain data."""
    found: dict[str, Any] = plain({**dataclasses.asdict(target), "dtype": DTYPE_NAMES[target.dtype]})
    return found


def cost(program: Program, rows: int) -> dict[str, Any]:
    """Operations and bytes of one evaluation of every cadence, and of an average step."""
    found = budget(program, rows)
    cadences = {
        name: {"every": found.periods[name], "flops": value.flops, "bytes": value.bytes}
        for name, value in found.costs.items()
    }
    mean = found.per_step
    return {"rows": rows, "cadences": cadences, "per_step": {"flops": mean.flops, "bytes": mean.bytes}}


MANY = 10_000
"""Steps of a schedule that are looked at; a longer one repeats itself for all that matters."""


def reachable(cadences: dict[str, int]) -> list[frozenset[str]]:
    """The sets of due cadences that the schedule reaches, the smallest first.

    A set is due together first at the least common multiple of its periods; it is due alone at some step exactly if no
    other period divides that. Shifted cadences are looked at step by step.
    """
    names = [name for name in cadences if name != STEP]
    if any(base_of(name) != name for name in names):
        steps = range(min(MANY, 1 + lcm(*(cadences[name] for name in names))))
        sets = {frozenset(n for n in names if falls_due(n, cadences[n], step)): None for step in steps}
        return sorted(sets, key=lambda due: (len(due), sorted(due)))
    found = []
    for size in range(len(names) + 1):
        for chosen in combinations(names, size):
            first = lcm(*(cadences[name] for name in chosen))
            if all(first % cadences[name] for name in names if name not in chosen):
                found.append(frozenset(chosen))
    return found


def pack_loss(loss: Loss | None) -> dict[str, Any] | None:
    """A loss object as plain data; of a class that fxcurv does not know, its name alone."""
    if loss is None:
        return None
    if type(loss) not in LOSSES.values():
        return {"class": type(loss).__qualname__, "options": None}
    options = {field.name: _pack(getattr(loss, field.name)) for field in dataclasses.fields(loss)}
    return {"class": type(loss).__name__, "options": options}


def unpack_loss(packed: dict[str, Any] | None) -> Loss | None:
    """The loss object of :func:`pack_loss`; raises :class:`FxcurvError` when only its name is known."""
    if packed is None:
        return None
    if packed["options"] is None:
        raise FxcurvError(f"the artifact was compiled with a loss of class {packed['class']}: pass it again as loss=.")
    known = {cls.__name__: cls for cls in LOSSES.values()}
    if packed["class"] not in known:
        raise FxcurvError(f"the artifact names a loss '{packed['class']}' that does not exist here: pass loss=.")
    return known[packed["class"]](**{name: _unpack(value) for name, value in packed["options"].items()})


def _pack(value: Any) -> Any:
    return {"dtype": DTYPE_NAMES[value.dtype], "values": value.tolist()} if isinstance(value, Tensor) else value


def _unpack(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    return torch.tensor(value["values"], dtype=dtypes[value["dtype"]])


def _batch(example: dict[str, Any] | None) -> int:
    specs = [*example["args"], *example["kwargs"].values()] if example else []
    sizes = specs[0].partition("[")[2].rstrip("]").split(",") if specs else []
    return int(sizes[0]) if sizes and sizes[0] else 1


def _forward(module: CurvatureModule) -> dict[str, Any]:
    captured, tapped = module._engine.compilation.captured, module._engine.compilation.tapped
    graphs = tapped.graphs if tapped else ()
    if captured is None:
        return {"frontend": "", "nodes": 0, "taps": 0, "slots": 0}
    return {
        "frontend": captured.frontend,
        "nodes": sum(len(part.graph.nodes) for part in captured.graphs),
        "taps": sum(len(graph.taps) for graph in graphs),
        "slots": sum(len(graph.slots) for graph in graphs),
    }


def _program(program: Program) -> dict[str, Any]:
    return {
        "nodes": len(program),
        "inputs": dict(Counter(role.kind for role in program.inputs())),
        "outputs": dict(Counter(role.kind for role in program.outputs())),
        "cadences": dict(program.cadences),
        "slices": [sorted(due) for due in reachable(program.cadences)],
    }


def _memory(module: CurvatureModule) -> dict[str, Any]:
    """Bytes of parameters and of states: a state that several layers share counts once, for the first of them."""
    program = module.program
    owners: Counter[str] = Counter()
    sizes = state_bytes(program)
    for role, node in program.inputs("state").items():
        owners[node.meta["owner"][0] if node.meta["owner"] else "shared"] += sizes[role.key]
    parameters = sum(p.numel() * p.element_size() for p in module._engine.parameters().values())
    return {"parameters": parameters, "states": sum(sizes.values()), "states_by_owner": dict(owners)}
