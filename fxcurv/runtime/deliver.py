"""What a call of ``model.backward`` does for each source of curvature.

Curvature first, then the user's own ``loss.backward``: every other parameter and input keeps its gradient, and the
passes share one forward. A sampled or exact source runs columns into the slots with the weight gradients left out, and
the plain pass that follows measures nothing; a source of products only keeps the graph alive for the step. A step that
an exact quadratic model decides keeps the graph too, whatever the source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.layers.tap import disarmed
from fxcurv.runtime.distributed import refuse_static_graph
from fxcurv.runtime.engine import Engine
from fxcurv.runtime.oracles import GGNOracle, HessianOracle
from fxcurv.runtime.sources import NOT_RECORDED, columns, run_columns


@dataclass(frozen=True)
class BackwardCall:
    """The arguments of one ``model.backward``; ``options`` go to ``loss.backward``.

    batches: batch sizes of the forward passes that may have made the outputs.
    """

    loss: Tensor
    outputs: Tensor | None
    targets: Tensor | None
    mask: Tensor | None
    options: dict[str, Any]
    batches: Iterable[int] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.loss, Tensor):
            raise FxcurvError(f"model.backward takes the loss, a tensor, first; got a {type(self.loss).__name__}.")
        if self.outputs is not None and not isinstance(self.outputs, Tensor):
            raise FxcurvError(
                f"the outputs given to model.backward are a {type(self.outputs).__name__}; give the one tensor that "
                "went into the loss function."
            )

    def plain(self, **options: Any) -> None:
        """The user's own backward pass."""
        self.loss.backward(**{**self.options, **options})


def deliver(engine: Engine, call: BackwardCall, measured: bool = True) -> None:
    """Gradients and what the method's source and its step need; raises :class:`FxcurvError` when something is missing.

    measured: whether the source's curvature is wanted from this call.
    """
    if engine.method.rule.kind == "quadratic":
        engine.exact = _added(engine, call, engine.exact)
        call = replace(call, options={**call.options, "retain_graph": True})
    SOURCES[engine.method.source.kind if measured else "gradient"](engine, call)


def _added(engine: Engine, call: BackwardCall, known: object) -> GGNOracle:
    """Products with the Gauss-Newton matrix of this call's batch too."""
    outputs = _outputs(engine, call)
    assert engine.loss is not None
    found = known if isinstance(known, GGNOracle) else GGNOracle(list(engine.parameters().values()), engine.loss)
    found.add(outputs, call.targets, call.mask)
    return found


def _gradient(engine: Engine, call: BackwardCall) -> None:
    call.plain()


def _hessian(engine: Engine, call: BackwardCall) -> None:
    if not isinstance(engine.oracle, HessianOracle):
        engine.oracle = HessianOracle(list(engine.parameters().values()))
    engine.oracle.add(call.loss)
    call.plain(retain_graph=True)


def _ggn_product(engine: Engine, call: BackwardCall) -> None:
    engine.oracle = _added(engine, call, engine.oracle)
    call.plain(retain_graph=True)


def _empirical(engine: Engine, call: BackwardCall) -> None:
    call.plain()
    statistics = engine.statistics
    if not statistics.plain:
        raise FxcurvError(NOT_RECORDED)
    if engine.loss is not None and call.outputs is not None:
        statistics.collect()
        statistics.terms += float(engine.loss.count(call.outputs.detach(), call.targets, call.mask))


def _columns(engine: Engine, call: BackwardCall) -> None:
    outputs, statistics, loss = _outputs(engine, call), engine.statistics, engine.loss
    assert loss is not None
    if statistics.plain:
        raise FxcurvError(
            "loss.backward() has already filled statistics of this step; use model.backward(loss, outputs) for each "
            "micro-batch of a step, or none."
        )
    rows = int(outputs.shape[0]) if outputs.ndim else 1
    # Among several forwards that may have made these outputs the smallest batch is right for all: it only asks for more
    # columns.
    examples = min((batch for batch in call.batches if batch and rows % batch == 0), default=None)
    key, values, source = (engine.seed, engine.step, engine.micro), outputs.detach(), engine.method.source
    refuse_static_graph(outputs)
    first_row = 0 if source.passes == "ggn" else engine.ranks.first_row(rows, outputs.device)
    found = columns(source, loss, values, key, call.targets, call.mask, examples, first_row)
    run_columns(statistics, outputs, found)
    statistics.terms += float(loss.count(values, call.targets, call.mask))
    engine.micro += 1
    with disarmed():
        call.plain()
    statistics.forget_slots()


SOURCES: dict[str, Callable[[Engine, BackwardCall], None]] = {
    "gradient": _gradient,
    "hessian": _hessian,
    "ggn_product": _ggn_product,
    "empirical": _empirical,
    "mc": _columns,
    "ggn": _columns,
    "ggn_signs": _columns,
    "logits": _columns,
    "logits_mc": _columns,
}


def _outputs(engine: Engine, call: BackwardCall) -> Tensor:
    """The outputs, checked to be there, to depend on parameters, and to belong to a known loss."""
    kind, name = engine.method.source.kind, engine.method.name
    if call.outputs is None:
        raise FxcurvError(
            f"'{name}' with fisher='{kind}' needs the tensor that was given to the loss function: call "
            "model.backward(loss, outputs)."
        )
    if not call.outputs.requires_grad:
        raise FxcurvError("the outputs given to model.backward do not depend on the model's parameters.")
    if engine.loss is None:
        raise FxcurvError(
            f"'{name}' with fisher='{kind}' needs to know the loss: pass loss= to fxcurv.transform, for example "
            "loss='cross_entropy'."
        )
    return call.outputs
