"""A training step without a training step: the model's forward and backward on fake tensors, recorded.

The plain model gives the unit in which overheads are expressed; a backward pass that reaches the taps and nothing else
is what a sampled or exact source adds; and the tapped model shows the memory that a step with statistics needs at once.
Where a model cannot run on fake tensors it runs for real, and everything that it touched is put back.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxcurv.capture import Call
from fxcurv.capture.state import preserved
from fxcurv.capture.structure import flatten_output
from fxcurv.errors import FxcurvError
from fxcurv.layers.tap import disarmed
from fxcurv.runtime.module import CurvatureModule
from fxcurv.runtime.sources import run_columns
from fxcurv.runtime.statistics import notes_behind
from fxcurv.tools.recorder import Recorder, Work, summed

NO_CALL = (
    "the cost of a step depends on the batch: define 'example_inputs' in the model file, pass --input, or give "
    "example_inputs= to fxcurv.transform."
)


@dataclass(frozen=True)
class DryRun:
    """plain: works of the model's forward and backward. tapped: the same of its tapped graph, no statistic measured.
    second: of one backward pass that only reaches the taps. columns: how many of those the source of curvature makes.
    plain_peak, peak: most bytes alive in it, without and with statistics, beyond parameters, buffers and states.
    real: whether the model had to run for real.
    """

    plain: tuple[Work, ...]
    tapped: tuple[Work, ...] = ()
    second: tuple[Work, ...] = ()
    columns: int = 0
    plain_peak: int = 0
    peak: int = 0
    real: bool = False


def dry_run(module: CurvatureModule) -> DryRun:
    """Record a step of a transformed model; raises :class:`FxcurvError` without example inputs."""
    engine = module._engine
    call: Call = engine.compilation.options["call"]
    if not call.real:
        raise FxcurvError(NO_CALL)

    def plain(model: nn.Module, leaves: Sequence[Tensor]) -> DryRun:
        args, kwargs = call.rebuild(leaves)
        with Recorder() as recorder:
            outputs = differentiable(model(*args, **kwargs))
            backward(outputs)
        columns, works = _columns(module, outputs), tuple(summed(recorder.works))
        return DryRun(works, works, (), columns, recorder.peak, recorder.peak)

    found, real = _run(engine.model, call, plain)
    forward = module._forwards.get(call)
    if not engine.method.source.taps or forward is None:
        return replace(found, columns=0, real=real)
    if forward.captured.stitched is not None:  # its graphs follow each other as only a real call tells
        third = tuple(replace(work, flops=work.flops / 3, bytes=work.bytes / 3) for work in found.plain)
        return replace(found, second=third, real=real)

    def silent(model: nn.Module, leaves: Sequence[Tensor]) -> tuple[tuple[Work, ...], tuple[Work, ...]]:
        probe = engine.clone(model)
        with Recorder() as recorder:
            output = differentiable(forward(probe, list(leaves)))
            ahead, recorder.works = recorder.works, []
            noted = [edge for one in output for notes in notes_behind(one) for edge in notes.edges]
            gradients(output, [*probe.statistics.targets(True), *noted])
            second, recorder.works = recorder.works, []
            gradients(output, _trainable(model))
        return tuple(summed([*ahead, *recorder.works])), tuple(summed(second))

    def measuring(model: nn.Module, leaves: Sequence[Tensor]) -> int:
        probe = engine.clone(model)
        with Recorder() as recorder:
            output = differentiable(forward(probe, list(leaves)))
            if found.columns:
                run_columns(probe.statistics, output[0], iter([torch.ones_like(output[0])]))
                with disarmed():
                    backward(output)
            else:
                backward(output)
        return recorder.peak

    (tapped, second), _ = _run(engine.model, call, silent)
    peak, again = _run(engine.model, call, measuring)
    return replace(found, tapped=tapped, second=second, peak=peak, real=real or again)


def _trainable(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def differentiable(output: Any) -> list[Tensor]:
    """The tensors of a model's output that depend on parameters."""
    values, _ = flatten_output(output, lambda value: isinstance(value, Tensor))
    return [value for value in values if value.requires_grad]


def backward(outputs: list[Tensor]) -> None:
    """Back-propagate the sum of all outputs into the ``grad`` of all leaves."""
    if outputs:
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])


def gradients(outputs: list[Tensor], inputs: list[Any]) -> None:
    """Back-propagate the sum of all outputs to some places, where no tap measures anything."""
    if outputs and inputs:
        ones = [torch.ones_like(output) for output in outputs]
        torch.autograd.grad(outputs, inputs, ones, retain_graph=True, allow_unused=True)


def _columns(module: CurvatureModule, outputs: list[Tensor]) -> int:
    """Backward passes of the source before the plain one; 0 where the plain one delivers the statistics."""
    engine = module._engine
    source, loss = engine.method.source, engine.loss
    if source.passes in ("mc", "ggn_signs"):
        return int(source.samples)
    if source.passes == "ggn" and loss is not None and outputs:
        try:
            return int(loss.column_count(outputs[0], None))
        except FxcurvError:
            return int(outputs[0].shape[-1])
    return 0


def _run(model: nn.Module, call: Call, body: Callable[[nn.Module, Sequence[Tensor]], Any]) -> tuple[Any, bool]:
    """``body(model, leaves)`` on fake tensors, or for real where that fails; and whether it was for real."""
    with preserved(model), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _fake(model, call, body), False
        except Exception:  # an operation without fake support, or one that depends on values: any error there is
            return body(model, [leaf.detach() for leaf in call.leaves]), True


class _Host(nn.Module):
    """Lets ``functional_call`` swap the model's parameters while ``body`` runs."""

    def __init__(self, model: nn.Module, body: Callable[[nn.Module, Sequence[Tensor]], Any]) -> None:
        super().__init__()
        self.model, self._body = model, body

    def forward(self, *leaves: Tensor) -> Any:
        return self._body(self.model, leaves)


def _fake(model: nn.Module, call: Call, body: Callable[[nn.Module, Sequence[Tensor]], Any]) -> Any:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Any] = {}

    def fake(tensor: Tensor) -> Any:
        if id(tensor) not in made:
            made[id(tensor)] = mode.from_tensor(tensor.detach()).requires_grad_(tensor.requires_grad)
        return made[id(tensor)]

    state = {f"model.{name}": fake(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    with mode:
        leaves = tuple(mode.from_tensor(leaf.detach()) for leaf in call.leaves)
        return torch.func.functional_call(_Host(model, body), state, leaves, tie_weights=True)
