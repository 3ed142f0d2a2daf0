"""``approx``: how far each method's curvature of a layer is from the exact block, as plain data for JSON and tables.

Everything is in float64, on one batch, with the model in evaluation mode (no dropout, fixed averages of norms), with
curvature of that batch alone (no memory of earlier ones), of all its examples, and without a clip, so that what differs
is the structure.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import FxcurvError
from fxcurv.methods import PUBLISHED, get_method
from fxcurv.methods.facts import Target
from fxcurv.runtime.module import CurvatureModule
from fxcurv.tools.exact import Batch, Stored, exact_block, mean_gradient

KINDS = ("ggn", "empirical")
ALONE = {
    "ema": 0.0, "kl_clip": None, "solve_every": 1, "factor_every": 1, "step": "fixed", "weight_decay": 0.0,
    "share": 1.0, "proofs": False,
}  # fmt: skip
OK, REFUSED, NO_BLOCK = "ok", "refused", "no block"


@dataclass(frozen=True)
class ApproxRow:
    """One method on one layer, against the exact block C of d = d_out d_in parameters.

    source: where its statistics come from. error: |B - C| / |C| in Frobenius norm for the method's block B. cosine,
    solve_error: of (B + damping I)^-1 V against (C + damping I)^-1 V, V the gradient. own_cosine, own_error: the same
    of the direction that the method really takes, with its own way of damping. trace: tr B / tr C. condition: of the
    damped matrix. eigenvalues: of B, ascending.
    status: OK, NO_BLOCK (only the own direction is there) or REFUSED; reason: why.
    """

    method: str
    layer: str
    kind: str
    shape: tuple[int, ...]
    source: str = ""
    status: str = OK
    reason: str = ""
    error: float | None = None
    cosine: float | None = None
    solve_error: float | None = None
    own_cosine: float | None = None
    own_error: float | None = None
    trace: float | None = None
    condition: float | None = None
    eigenvalues: tuple[float, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields under their own names."""
        return asdict(self)


@dataclass(frozen=True)
class Approximations:
    """rows: by layer, then method; the first of a layer is the exact block itself ("exact"). left_out: (layer, reason)
    of those that were not measured. damping: of all the solves. kind: of the exact block. terms: loss terms."""

    rows: tuple[ApproxRow, ...]
    left_out: tuple[tuple[str, str], ...]
    kind: str
    damping: float
    terms: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "rows": [row.to_dict() for row in self.rows]}

    def spectra(self) -> dict[str, dict[str, tuple[float, ...]]]:
        """Eigenvalues by layer and method."""
        found: dict[str, dict[str, tuple[float, ...]]] = {}
        for row in self.rows:
            if row.eigenvalues:
                found.setdefault(row.layer, {})[row.method] = row.eigenvalues
        return found


@dataclass(frozen=True)
class Exact:
    """The exact block of a layer, its gradient and the damped solution."""

    target: Target
    kind: str
    stored: Stored
    block: Tensor
    gradient: Tensor
    solution: Tensor


def approximations(
    model: nn.Module,
    batch: Batch,
    methods: Mapping[str, Mapping[str, Any]],
    *,
    example_inputs: tuple[Any, ...] | None = None,
    kind: str = "ggn",
    damping: float = 1e-3,
    limit: int = 2000,
    patterns: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    report: Callable[[str], None] = lambda what: None,
) -> Approximations:
    """Measure methods (with hyper-parameters) on the layers of a model in float64 and evaluation mode.

    batch: in float64, too. kind: "ggn", or "empirical" for the Fisher of the loss's own gradients; a method that offers
    a choice takes its statistics from the same, exactly. limit: largest d. patterns: fnmatch on layer names or kinds;
    none for all. report: told what is being done. Raises :class:`FxcurvError` when no layer is left.
    """
    if kind not in KINDS:
        raise FxcurvError(f"--fisher {kind}: the exact block is 'ggn' or 'empirical'.")
    more = {**(options or {}), "example_inputs": example_inputs, "loss": batch.loss}
    finder = fxcurv.transform(copy.deepcopy(model), "foof", **more, proofs=False)
    kinds = {layer.name: layer.kind for layer in finder.layers}
    targets, left_out = _chosen(finder, kinds, patterns, limit)
    exact = []
    for target in targets:
        report(f"exact block of {target.name or 'the model'}")
        try:
            exact.append(_exact(model, target, kinds[target.name], batch, kind, damping))
        except FxcurvError as error:
            left_out.append((target.name, str(error)))
    if not exact:
        why = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in left_out[:3])
        raise FxcurvError(f"no layer can be measured ({why or 'the model has none'}); see --limit and --batch.")
    with torch.no_grad():
        terms = batch.terms(batch.call(model))
    measured: dict[str, list[ApproxRow]] = {
        one.target.name: [_measured(_row("exact", one, source=kind), one, one.block, one.solution, damping)]
        for one in exact
    }
    for method, hyper in methods.items():
        report(f"{method}: one batch")
        for row in _method_rows(model, method, hyper, batch, exact, kind, damping, more):
            measured[row.layer].append(row)
    rows = tuple(row for found in measured.values() for row in found)
    return Approximations(rows, tuple(left_out), kind, damping, terms)


def _chosen(
    finder: CurvatureModule, kinds: Mapping[str, str], patterns: Sequence[str], limit: int
) -> tuple[list[Target], list[tuple[str, str]]]:
    targets, left_out = [], []
    for target in finder._engine.facts.targets:
        names = target.name, kinds[target.name]
        if patterns and not any(name == p or fnmatch(name, p) for p in patterns for name in names):
            continue
        size = target.groups * target.d_out * target.d_in
        if size > limit:
            left_out.append((target.name, f"its block is {size} x {size}, beyond --limit {limit}"))
        else:
            targets.append(target)
    if patterns and not targets and not left_out:
        asked = " ".join(patterns)
        raise FxcurvError(f"--layers {asked}: no layer's name or kind matches; there are {', '.join(kinds)}.")
    return targets, left_out


def _exact(model: nn.Module, target: Target, layer_kind: str, batch: Batch, kind: str, damping: float) -> Exact:
    stored = Stored(model, target)
    block = exact_block(model, stored, batch, kind)
    gradient = mean_gradient(model, stored, batch)
    return Exact(target, layer_kind, stored, block, gradient, _solved(block, gradient, damping))


def _method_rows(
    model: nn.Module,
    method: str,
    hyper: Mapping[str, Any],
    batch: Batch,
    exact: Sequence[Exact],
    kind: str,
    damping: float,
    options: Mapping[str, Any],
) -> Iterator[ApproxRow]:
    """The rows of one method; whatever goes wrong in it is their reason."""
    try:
        taken = _stepped(model, method, hyper, batch, kind, damping, options)
    except (FxcurvError, RuntimeError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        prefix = "" if isinstance(error, FxcurvError) else f"{type(error).__name__}: "
        reason = prefix + " ".join(str(error).split())
        yield from (_row(method, one, status=REFUSED, reason=reason) for one in exact)
        return
    known = {target.name for target in taken._engine.facts.targets}
    for one in exact:
        stored = Stored(taken.strip(), one.target)
        direction = stored.ordered([p.grad for p in stored.parameters])
        source = taken._engine.method.source.kind
        try:
            if taken._engine.facts.targets and one.target.name not in known:
                raise FxcurvError("the method leaves this layer's gradient as it is.")
            block = taken.block(one.target.name) if known else None
            if block is None:
                raise FxcurvError("it works on tensors, not on layers.")
        except FxcurvError as error:
            yield _measured(
                _row(method, one, source=source, status=NO_BLOCK, reason=str(error)), one, None, direction, damping
            )
        else:
            yield _measured(_row(method, one, source=source), one, _dense(block), direction, damping)


def _stepped(
    model: nn.Module,
    method: str,
    hyper: Mapping[str, Any],
    batch: Batch,
    kind: str,
    damping: float,
    options: Mapping[str, Any],
) -> CurvatureModule:
    """A copy of the model after two steps of a method on the same batch: all is due in the first, and in the second all
    but the factorisations, for methods that measure in the basis that the first has made."""
    if get_method(method).rule.kind != "step":
        raise FxcurvError("it is a whole optimizer: its curvature is a product, which no layer keeps.")
    defaults = PUBLISHED[method].defaults
    wanted = {**ALONE, "fisher": kind, "damping": damping, **hyper}
    chosen = {name: value for name, value in wanted.items() if name in defaults or name == "proofs" or name in hyper}
    try:
        module = fxcurv.transform(copy.deepcopy(model), method, **options, **chosen)
    except FxcurvError:
        if "ema" not in chosen or "ema" in hyper:
            raise
        del chosen["ema"]  # a method that cannot do without a memory keeps its own: the first batch starts it
        module = fxcurv.transform(copy.deepcopy(model), method, **options, **chosen)
    module.eval()
    for refresh in (True, False):
        module.zero_grad()
        module.due(statistics=True, refresh=refresh)
        outputs = batch.call(module)
        module.backward(batch.loss.value(outputs, batch.targets), outputs, targets=batch.targets)
        module.precondition_()
    return module


def _row(method: str, one: Exact, **more: Any) -> ApproxRow:
    target = one.target
    return ApproxRow(method, target.name, one.kind, (target.groups, target.d_out, target.d_in), **more)


def _measured(row: ApproxRow, one: Exact, block: Tensor | None, own: Tensor, damping: float) -> ApproxRow:
    found: dict[str, Any] = {"own_cosine": _cosine(own, one.solution), "own_error": _relative(own, one.solution)}
    if block is not None:
        values = torch.linalg.eigvalsh((block + block.T) / 2)
        solution = _solved(block, one.gradient, damping)
        smallest = float(values[0]) + damping
        found |= {
            "error": _relative(block, one.block),
            "cosine": _cosine(solution, one.solution),
            "solve_error": _relative(solution, one.solution),
            "trace": float(block.trace() / one.block.trace()),
            "condition": (float(values[-1]) + damping) / smallest if smallest > 0 else float("inf"),
            "eigenvalues": tuple(values.tolist()),
        }
    return ApproxRow(**{**{name: getattr(row, name) for name in row.__dataclass_fields__}, **found})


def _dense(block: Tensor) -> Tensor:
    """(groups, d, d) as the block-diagonal matrix that it stands for."""
    return block if block.ndim == 2 else torch.block_diag(*block)


def _solved(matrix: Tensor, vector: Tensor, damping: float) -> Tensor:
    return torch.linalg.solve(matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype), vector)


def _cosine(x: Tensor, y: Tensor) -> float:
    norms = float(x.norm() * y.norm())
    return float(x.flatten() @ y.flatten()) / norms if norms else 0.0


def _relative(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm()) if float(y.norm()) else float("inf")
