"""The report: one row for every trainable parameter, so that nothing is treated in silence."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxcurv.runtime.engine import Engine


@dataclass(frozen=True)
class Row:
    """How one parameter is treated.

    status: "exact" (whole unit-wise blocks), "approximated", "diagonal", "gradient only". reason: by what, or why not.
    statistic: the curvature's source. shape: (groups, d_out, d_in) of its layer, or the tensor's own shape.
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


@dataclass(frozen=True)
class Report:
    """All rows, with the settings they were made under."""

    method: str
    fisher: str
    frontend: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def covered(self) -> float:
        """Share of the trainable elements that are preconditioned."""
        total = sum(row.elements for row in self.rows)
        return sum(row.elements for row in self.rows if row.status != "gradient only") / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "covered": self.covered}

    def __str__(self) -> str:
        lines = [f"{self.method}, fisher {self.fisher}, {100 * self.covered:.1f} % of the elements covered"]
        lines += [f"  note: {note}" for note in self.notes]
        for row in self.rows:
            where = f"{row.layer} ({row.kind})" if row.layer else "-"
            lines.append(f"  {row.parameter:40s} {where:32s} {row.status}{': ' + row.reason if row.reason else ''}")
        return "\n".join(lines)


def make_report(engine: Engine) -> Report:
    """The report of a transformed model."""
    compilation, facts, method = engine.compilation, engine.facts, engine.method
    parameters = engine.parameters()
    rows: dict[str, Row] = {}
    tensorwise = not method.source.taps
    detection = compilation.detection
    uncovered = {item.parameter: item for item in (detection.uncovered if detection else ())}
    layers = {name: layer for layer in compilation.layers for name in layer.params}
    found = {name: layer for layer in (detection.layers if detection else ()) for name in layer.params}
    targets = {target.name: target for target in facts.targets}
    for name, parameter in parameters.items():
        layer = layers.get(name)
        status, reason, source = "approximated", f"by {method.name}", ""
        chain: tuple[str, ...] = ()
        if tensorwise:
            status = "gradient only" if method.source.kind == "gradient" and method.name == "sgd" else "approximated"
            reason = "the gradient itself" if status == "gradient only" else f"by {method.name}, tensor by tensor"
        elif layer is not None:
            target = targets[layer.name]
            if target.unitwise and getattr(method.scope, "exact_norms", False):
                status, reason = "exact", "whole block of every unit"
            elif max(target.d_in, target.d_out) > facts.max_factor_dim or target.diagonal_input:
                side = "input" if target.diagonal_input or target.d_in > facts.max_factor_dim else "output"
                reason = f"by {method.name}, {side} factor diagonal"
            if method.name == "diag":
                status, reason = "diagonal", ""
            reason = "; ".join(part for part in (reason, layer.note) if part)
        elif name in uncovered:
            item = uncovered[name]
            status, reason, chain, source = "gradient only", item.reason, item.chain, item.source
        else:
            status, reason = "gradient only", "its layer was skipped" if name in found else "no layer was found for it"
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
        )
    for name, parameter in engine.model.named_parameters():
        if parameter.requires_grad and name not in rows:
            reason = "It was frozen when the model was transformed; transform the model again to cover it."
            shape, kind = tuple(parameter.shape), method.source.kind
            rows[name] = Row(name, parameter.numel(), "", "", shape, 0, kind, "gradient only", reason)
    notes = list(compilation.captured.notes) if compilation.captured is not None else []
    if compilation.options.get("empirical_by_default"):
        notes.append("no loss= was given, so the Fisher is empirical: the training loss's own gradients")
    if compilation.options.get("batch_statistics"):
        notes.append(
            "BatchNorm in training mode couples examples: fisher='ggn' is biased, 'mc' and 'ggn_signs' are not"
        )
    frontend = compilation.captured.frontend if compilation.captured is not None else ""
    return Report(method.name, method.source.kind, frontend, tuple(rows.values()), tuple(notes))
