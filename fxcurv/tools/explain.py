"""``explain``: where the time and memory of a transformed model go, as plain data for JSON and tables."""

from __future__ import annotations

from typing import Any

from fxcurv.capture import Call
from fxcurv.ir.cost import state_bytes
from fxcurv.ir.types import DTYPE_NAMES
from fxcurv.runtime.describe import reachable
from fxcurv.runtime.module import CurvatureModule
from fxcurv.tools.advice import advice
from fxcurv.tools.devices import Device
from fxcurv.tools.estimate import Estimate, Part, estimate
from fxcurv.tools.items import Item
from fxcurv.tools.path import critical_path
from fxcurv.tools.peak import slice_peak

TENSOR = "tensor"  # the kind of what a method treats without layers


def explain(module: CurvatureModule, device: Device) -> dict[str, Any]:
    """Costs by cadence, layer and kind, memory, critical path and advice; seconds, bytes and ratios to a plain step.

    The keys and their meanings are stable; new ones may be added. Raises :class:`FxcurvError` where the model was
    transformed without example inputs.
    """
    e = estimate(module, device)
    engine = module._engine
    call: Call = engine.compilation.options["call"]
    sets = [due for due in reachable(e.periods) if due]
    return {
        "method": engine.method.name,
        "fisher": engine.method.source.kind,
        "inputs": [f"{DTYPE_NAMES.get(x.dtype, x.dtype)}{list(x.shape)}" for x in call.leaves],
        "device": {
            "name": device.name, "source": device.source, "notes": list(device.notes), "launch_seconds": device.launch,
        },
        "plain": _part(e.plain, e),
        "cadences": {name: _part(e.part(name), e) for name in e.periods},
        "source": {
            "backward_passes": e.columns,
            "each": _part(e.second, e),
            "rewritten_forward": _part(e.rewritten, e),
        },
        "steps": [
            {"due": [], "ratio": e.step_ratio(())},
            *({"due": sorted(due), "ratio": e.step_ratio(due)} for due in sets),
        ],
        "average_ratio": e.ratio(),
        "layers": layers(e),
        "kinds": kinds(e),
        "memory": memory(e),
        "critical_path": path(e),
        "advice": advice(e),
        "ran_for_real": e.dry.real,
    }  # fmt: skip


def _part(part: Part, e: Estimate) -> dict[str, Any]:
    return {
        "every": part.every,
        "flops": part.flops,
        "bytes": part.bytes,
        "launches": part.launches,
        "seconds": part.seconds,
        "ratio": part.seconds / e.plain.seconds,
    }


def layers(e: Estimate) -> list[dict[str, Any]]:
    """Seconds of every cadence by layer (or parameter); what several share is divided among them."""
    kind_of = {layer.name: layer.kind for layer in e.module.layers}
    found: dict[str, dict[str, float]] = {}
    for item in (*e.taps, *e.nodes.values()):
        owners = item.owners or ("",)
        seconds = e.device.seconds(item.works) / len(owners)
        for owner in owners:
            spent = found.setdefault(owner, dict.fromkeys(e.periods, 0.0))
            spent[item.cadence] = spent.get(item.cadence, 0.0) + seconds
    return [
        {"layer": owner, "kind": kind_of.get(owner, TENSOR if owner else ""), "seconds": spent}
        for owner, spent in found.items()
    ]


def kinds(e: Estimate) -> dict[str, dict[str, Any]]:
    """The same by layer kind, with the number of layers."""
    found: dict[str, dict[str, Any]] = {}
    for row in layers(e):
        name = row["kind"] or "(all)"
        entry = found.setdefault(name, {"layers": 0, "seconds": dict.fromkeys(e.periods, 0.0)})
        entry["layers"] += 1 if row["kind"] else 0
        for cadence, seconds in row["seconds"].items():
            entry["seconds"][cadence] += seconds
    return found


def memory(e: Estimate) -> dict[str, int]:
    """Bytes: parameters, states, statistics between a backward pass and the step; peaks beyond parameters and states.

    plain_peak: of forward and backward alone. peak: of a step in which everything is due: of its forward and backward,
    or of the update program with the gradients and statistics that it reads.
    """
    engine = e.module._engine
    parameters = sum(p.numel() * p.element_size() for p in engine.parameters().values())
    statistics = sum(t.nbytes for t in (n.meta["type"] for n in e.module.program.inputs("stat").values()))
    due = frozenset(e.periods)
    inner = slice_peak(engine.lowered, e.nodes, due)
    return {
        "parameters": parameters,
        "states": sum(state_bytes(e.module.program).values()),
        "statistics": statistics if e.taps else 0,
        "plain_peak": e.dry.plain_peak,
        "backward_peak": e.dry.peak,
        "update_peak": parameters + statistics + inner,
        "peak": max(e.dry.peak, parameters + statistics + inner),
    }


def path(e: Estimate) -> dict[str, Any]:
    """The critical path of the update program with everything due."""
    weights = {node: e.device.seconds(item.works) for node, item in e.nodes.items()}
    found = critical_path(e.module._engine.lowered, frozenset(e.periods), weights)
    return {
        "seconds": found.seconds,
        "total_seconds": found.total,
        "parallelism": found.total / found.seconds if found.seconds else 1.0,
        "nodes": [_named(e.nodes[node], weights[node]) for node in found.nodes if node in e.nodes],
    }


def _named(item: Item, seconds: float) -> dict[str, Any]:
    return {"name": item.name, "op": item.op, "owners": list(item.owners), "every": item.cadence, "seconds": seconds}
