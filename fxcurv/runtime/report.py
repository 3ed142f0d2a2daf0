"""The report: one row for every trainable parameter, so that nothing is treated in silence.

A parameter that several layers share, or that is covered in part, has a row for every part, named by its key.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fxcurv.ir.cost import state_bytes
from fxcurv.layers.region import by_name, parts_of
from fxcurv.methods.facts import Target
from fxcurv.runtime.memory import Memory, largest_transient, memory_by_owner

if TYPE_CHECKING:
    from fxcurv.runtime.engine import Engine


@dataclass(frozen=True)
class Row:
    """How one parameter, or a part of one, is treated.

    parameter: its full name, or the key of a part. tensor: shape of the parameter or part as it is stored. layer, kind,
    uses: of its layer, "" and 0 where it has none. shape: (groups, d_out, d_in) of its layer, or the tensor's own.
    statistic: the curvature's source. status: "exact" (whole unit-wise blocks), "approximated", "diagonal", "gradient
    only". reason: by what, or why not. source, chain: for what is left out, the user's line and the names of the nodes
    from the parameter to the operation that stopped it. state_bytes, shared_bytes, transient_bytes: curvature that its
    layer keeps, the part of it that other layers use too, and the largest value made and dropped in a step (see
    :mod:`fxcurv.runtime.memory`).
    """

    parameter: str
    elements: int
    layer: str
    kind: str
    shape: tuple[int, ...]
    uses: int
    statistic: str
    status: str
    reason: str
    source: str = ""
    chain: tuple[str, ...] = ()
    tensor: tuple[int, ...] = ()
    state_bytes: int = 0
    shared_bytes: int = 0
    transient_bytes: int = 0

    @property
    def treated(self) -> bool:
        """Whether the parameter is preconditioned."""
        return self.status != "gradient only"


@dataclass(frozen=True)
class Report:
    """All rows, with the settings they were made under.

    state_bytes: curvature kept between steps, shared states once; transient_bytes: the largest value within a step.
    """

    method: str
    fisher: str
    frontend: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    state_bytes: int = 0
    transient_bytes: int = 0

    @property
    def covered(self) -> float:
        """Share of the trainable elements that are preconditioned."""
        total = sum(row.elements for row in self.rows)
        return sum(row.elements for row in self.rows if row.treated) / total if total else 0.0

    @property
    def kinds(self) -> dict[str, dict[str, float]]:
        """Layers, elements and share of all trainable elements by layer kind, the largest first.

        "tensor" is what a method treats without layers; "gradient only" what is not covered.
        """
        found: dict[str, dict[str, float]] = {}
        layers: dict[str, set[str]] = {}
        total = sum(row.elements for row in self.rows)
        for row in self.rows:
            kind = (row.kind or "tensor") if row.treated else "gradient only"
            layers.setdefault(kind, set()).update([row.layer] if row.layer and row.treated else [])
            elements = found.get(kind, {}).get("elements", 0) + row.elements
            found[kind] = {"layers": len(layers[kind]), "elements": elements, "share": elements / total}
        return dict(sorted(found.items(), key=lambda item: -item[1]["elements"]))

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields of the report and its rows under their own names, with ``covered`` and ``kinds``.

        The names and meanings are stable; new ones may be added.
        """
        return {**asdict(self), "covered": self.covered, "kinds": self.kinds}

    def __str__(self) -> str:
        lines = [f"{self.method}, fisher {self.fisher}, {100 * self.covered:.1f} % of the elements covered"]
        lines += [f"  note: {note}" for note in self.notes]
        for row in self.rows:
            where = f"{row.layer} ({row.kind})" if row.layer else "-"
            lines.append(f"  {row.parameter:40s} {where:32s} {row.status}{': ' + row.reason if row.reason else ''}")
        return "\n".join(lines)


def _diagonal_side(target: Target, limit: int, states: Collection[str]) -> str:
    """The side of a layer whose factor is kept as its diagonal, "" for none; one that is kept as rows may be wide."""
    wide = {"input": target.diagonal_input or target.d_in > limit, "output": target.d_out > limit}
    rows = {"input": f"{target.name}.XA", "output": f"{target.name}.XG"}
    return next((side for side in wide if wide[side] and rows[side] not in states), "")


def make_report(engine: Engine) -> Report:
    """The report of a transformed model."""
    compilation, facts, method = engine.compilation, engine.facts, engine.method
    parameters = engine.parameters()
    rows: dict[str, Row] = {}
    tensorwise = not method.source.taps
    detection = compilation.detection
    uncovered = {item.parameter: item for item in (detection.uncovered if detection else ())}
    layers = {place: layer for layer in compilation.layers for place in layer.places}
    found = {place: layer for layer in (detection.layers if detection else ()) for place in layer.places}
    targets = {target.name: target for target in facts.targets}
    owners = memory_by_owner(engine.lowered.program)
    known = by_name(found)
    parts = [place for name, p in parameters.items() for place in parts_of(name, p.shape, known.get(name, ()))]
    for place in parts:
        name, parameter, layer = place.key, place.of(parameters[place.name]), layers.get(place)
        status, reason, source = "approximated", f"by {method.name}", ""
        chain: tuple[str, ...] = ()
        if tensorwise:
            status = "gradient only" if method.source.kind == "gradient" and method.name == "sgd" else "approximated"
            reason = "the gradient itself" if status == "gradient only" else f"by {method.name}, tensor by tensor"
        elif layer is not None:
            target = targets[layer.name]
            if target.unitwise and getattr(method.scope, "exact_norms", False):
                status, reason = "exact", "whole block of every unit"
            elif side := _diagonal_side(target, facts.max_factor_dim, engine.states.by_key):
                reason = f"by {method.name}, {side} factor diagonal"
            if f"{layer.name}.D" in engine.states.by_key:
                status, reason = "diagonal", ""
            reason = "; ".join(part for part in (reason, layer.note) if part)
        elif name in uncovered:
            item = uncovered[name]
            status, reason, chain, source = "gradient only", item.reason, item.chain, item.source
        else:
            status, reason = "gradient only", "its layer was skipped" if place in found else "no layer was found for it"
        memory = owners.get(layer.name if layer else name, Memory())
        rows[name] = Row(
            parameter=name,
            elements=parameter.numel(),
            layer=layer.name if layer else "",
            kind=layer.kind if layer else "",
            shape=layer.shape if layer else tuple(parameter.shape),
            uses=len(layer.uses) if layer else 0,
            statistic=method.source.kind,
            status=status,
            reason=reason,
            source=source,
            chain=tuple(chain),
            tensor=tuple(parameter.shape),
            state_bytes=memory.states,
            shared_bytes=memory.shared,
            transient_bytes=memory.transient,
        )
    for name, parameter in engine.model.named_parameters():
        if parameter.requires_grad and name not in parameters:
            reason = "It was frozen or not there when the model was transformed; transform the model again to cover it."
            shape, kind = tuple(parameter.shape), method.source.kind
            rows[name] = Row(name, parameter.numel(), "", "", shape, 0, kind, "gradient only", reason, tensor=shape)
    notes = list(compilation.captured.notes) if compilation.captured is not None else []
    if compilation.options.get("empirical_by_default"):
        notes.append("no loss= was given, so the Fisher is empirical: the training loss's own gradients")
    if compilation.options.get("batch_statistics"):
        notes.append(
            "BatchNorm in training mode or message passing couples examples: fisher='ggn' is biased, 'mc' and "
            "'ggn_signs' are not"
        )
    frontend = compilation.captured.frontend if compilation.captured is not None else ""
    return Report(
        method.name,
        method.source.kind,
        frontend,
        tuple(rows.values()),
        tuple(notes),
        sum(state_bytes(engine.lowered.program).values()),
        largest_transient(engine.lowered.program),
    )
