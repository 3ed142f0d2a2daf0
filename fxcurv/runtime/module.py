"""CurvatureModule: the user's model with a curvature engine beside it.

It shares the user's parameters, buffers and sub-modules (the very dictionaries), so names, tensors and optimizers stay
what they were. Steps without statistics, and evaluation, run the user's own module; a step with statistics runs the
tapped graph instead. Its own attributes are class properties and entries of ``__dict__``: they win over a sub-module of
the user's that happens to be called ``layers`` or ``graph``, which stays reachable through ``strip()``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fxcurv.capture import capture
from fxcurv.errors import FxcurvError
from fxcurv.ir.program import REFRESH, STATISTICS, Program
from fxcurv.ir.schedule import base_of
from fxcurv.layers.layer import Layer
from fxcurv.methods import Method
from fxcurv.passes.manager import Record
from fxcurv.passes.tap import Tapped, insert_taps
from fxcurv.runtime.deliver import BackwardCall, deliver
from fxcurv.runtime.engine import Engine
from fxcurv.runtime.forward import Forwards
from fxcurv.runtime.info import StepInfo
from fxcurv.runtime.report import Report, make_report

PREFIX = "curvature."


class CurvatureModule(nn.Module):
    """A model under a second-order method; make one with :func:`fxcurv.transform`."""

    def __init__(self, model: nn.Module, engine: Engine, forwards: Forwards) -> None:
        super().__init__()
        own = self.__dict__
        own["_parameters"], own["_buffers"], own["_modules"] = model._parameters, model._buffers, model._modules
        own["_non_persistent_buffers_set"] = model._non_persistent_buffers_set
        own["_model"], own["_engine"], own["_forwards"] = model, engine, forwards
        own["_batches"] = []
        own["training"] = model.training
        own["_tapped"] = own["_measured"] = False
        self._arm()

    # The model ------------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_model"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output. In training steps on which statistics are due, backward passes deliver them."""
        if not self._tapped or not torch.is_grad_enabled():
            return self._model(*args, **kwargs)
        return self._run_tapped(args, kwargs)

    def _run_tapped(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        engine = self._engine
        if not torch.compiler.is_compiling():
            if torch._C._functorch.peek_interpreter_stack() is not None:  # torch.func transforms take no leaves
                return self._model(*args, **kwargs)
            engine.places.check()
            self._drop_abandoned()
        differentiable = _double_differentiable(engine.method)
        if not engine.method.source.taps or not (self._measured or engine.keeps_rows):
            with differentiable:
                return self._model(*args, **kwargs)
        if torch.compiler.is_compiling():
            _keep_buffers()
        forward, leaves = self._forwards.find(engine, args, kwargs)
        with differentiable:
            output = forward(engine, leaves)
        self._note_batch(leaves)
        return output

    @torch.compiler.disable
    def _note_batch(self, leaves: list[Tensor]) -> None:
        if self.__dict__.pop("_consumed", False):  # a backward call has come since the last forward
            self._batches.clear()
        self._batches.extend([int(x.shape[0]) for x in leaves if x.ndim][:1])

    def _drop_abandoned(self) -> None:
        """Forget statistics whose gradients somebody has zeroed: their step was abandoned.

        Not within a backward pass: that is a checkpoint recomputing the forward, before gradients have arrived.
        """
        if self._engine.arrived and torch._C._current_graph_task_id() == -1:
            grads = [p.grad for p in self._engine.parameters().values() if p.grad is not None]
            if not any(bool(grad.any()) for grad in grads):
                self._engine.discard()

    def train(self, mode: bool = True) -> CurvatureModule:
        """Set training mode on the model."""
        super().train(mode)
        self._model.train(mode)
        self._arm()
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients, and forget the statistics that belong to them."""
        super().zero_grad(set_to_none)
        self._engine.discard()

    def strip(self) -> nn.Module:
        """The user's model."""
        return self._model  # type: ignore[no-any-return]

    def _apply(self, fn: Any, recurse: bool = True) -> CurvatureModule:
        super()._apply(fn, recurse)
        self._engine.states.move(fn)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> CurvatureModule:
        model = copy.deepcopy(self._model, memo)
        other = CurvatureModule(model, self._engine.clone(model), self._forwards.clone())
        memo[id(self)] = other
        return other

    def _replicate_for_data_parallel(self) -> Any:
        raise FxcurvError(
            "nn.DataParallel runs copies whose statistics would be lost; train "
            "nn.parallel.DistributedDataParallel(model), one process for each device."
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise FxcurvError(
            "a transformed model cannot be pickled whole; save model.state_dict(), or the plain model.strip(), and "
            "call fxcurv.transform again where it is loaded."
        )

    def _arm(self) -> None:
        """Decide what the coming forward passes run: the one bool that ``forward`` branches on says whether a graph
        runs in the module's place, ``_measured`` whether its taps deliver statistics."""
        engine = self._engine
        forced = engine.forced[STATISTICS] is True
        wanted = engine.wants_statistics or (engine.method.source.kind == "hessian" and engine.is_due(STATISTICS))
        wanted = wanted or engine.method.source.kind == "ggn_product"
        self.__dict__["_measured"] = bool(wanted and (self.training or forced))
        graph = engine.keeps_rows or engine.method.exact_products
        self.__dict__["_tapped"] = self._measured or (self.training and graph)

    # A training step ------------------------------------------------------------------------------------------------

    def backward(
        self,
        loss: Tensor,
        outputs: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        **backward_kwargs: Any,
    ) -> None:
        """Deliver statistics and gradients from one forward pass.

        loss: the scalar to differentiate. outputs: the tensor that was given to the loss function. targets, or a
        boolean mask over loss terms: needed when the loss weights or ignores terms. Further arguments go to
        ``loss.backward``. Under ``no_grad`` (a line search evaluating the closure) nothing happens.

        Raises :class:`FxcurvError` when the method's source needs something that is missing.
        """
        if not torch.is_grad_enabled():
            return
        call = BackwardCall(loss, outputs, targets, mask, backward_kwargs, self._batches)
        self._engine.watched.note(loss)
        if not self._tapped or not (self._measured or self._engine.method.exact_products):
            call.plain()
            return
        deliver(self._engine, call, self._measured)
        self.__dict__["_consumed"] = True

    def precondition_(self, scaler: Any = None) -> StepInfo:
        """Turn every covered ``p.grad`` into the update direction, in place, and advance the schedule.

        scaler: a ``torch.amp.GradScaler``; when it found an overflow, nothing changes.

        Raises :class:`FxcurvError` when no statistics arrived, when they came from the wrong call, or for a method
        that is a whole optimizer.
        """
        rule, name = self._engine.method.rule, self._engine.method.name
        if rule.kind != "step":
            what = "is a whole optimizer" if rule.kind == "newton" else f"with step='{rule.kind}' is a whole optimizer"
            raise FxcurvError(f"'{name}' {what}: use fxcurv.optimizer(model) and opt.step(closure).")
        return self._precondition(scaler, None)

    def _precondition(self, scaler: Any, rate: float | None) -> StepInfo:
        info = self._engine.run(scaler, rate)
        self._arm()
        return info

    def due(self, *, statistics: bool | None = None, refresh: bool | None = None) -> dict[str, bool]:
        """Say what the coming step does (``None``: by schedule), and return what is due.

        With ``statistics=True`` statistics are captured in eval mode too.
        """
        engine = self._engine
        if refresh is False and engine.step == 0:
            raise FxcurvError("refresh=False in the first step would leave every factorisation empty.")
        engine.forced = {STATISTICS: statistics, REFRESH: refresh}
        self._arm()
        return {name: any(base_of(cadence) == name for cadence in engine.due()) for name in (STATISTICS, REFRESH)}

    @property
    def process_group(self) -> Any:
        """The ranks whose batches together are the batch of a step: torch's default group once it is initialised with
        more than one process, another group that is assigned, or ``None`` for this process alone (assign ``None`` to
        train every rank by itself)."""
        return self._engine.ranks.group

    @process_group.setter
    def process_group(self, group: Any) -> None:
        self._engine.process_group = group

    def discard(self) -> None:
        """Forget the statistics of an abandoned step."""
        self._engine.discard()

    # Looking inside -------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers that are preconditioned."""
        return self._engine.compilation.layers  # type: ignore[no-any-return]

    @property
    def uncovered(self) -> tuple[tuple[str, str], ...]:
        """(parameter, reason) for every trainable parameter that keeps its plain gradient."""
        return tuple((row.parameter, row.reason) for row in self.report().rows if row.status == "gradient only")

    @property
    def graph(self) -> Tapped:
        """The tapped forward graph of the transform's example call; of a method that reads only gradients, no tap."""
        compilation = self._engine.compilation
        if compilation.tapped is None:
            compilation.captured = capture(self._model, compilation.options["call"], self._forwards.frontend)
            compilation.tapped = insert_taps(compilation.captured.graph, (), self.program)
        return compilation.tapped  # type: ignore[no-any-return]

    @property
    def program(self) -> Program:
        """The update program."""
        return self._engine.lowered.program  # type: ignore[no-any-return]

    @property
    def history(self) -> tuple[Record, ...]:
        """What each pass did, with the program's text after it."""
        return tuple(self._engine.compilation.history)

    @property
    def hyper(self) -> dict[str, float]:
        """Run-time hyper-parameters; assign to an entry to change it from the next step on."""
        return self._engine.hyper  # type: ignore[no-any-return]

    def factors(self, name: str) -> dict[str, Tensor]:
        """The tracked curvature of a layer: dense, undamped, of the mean loss.

        "A" (d_in x d_in, a bias's constant coordinate last) and "G" (d_out x d_out) such that kron(G, A) approximates
        the block in the row-major order of ``[W b].flatten()`` (of TKFAC over the trace, which both have); EKFAC adds
        "QA", "QG", "S" (d_out x d_in), recurrent K-FAC "A1", "G1" between a step and the next, block-tridiagonal K-FAC
        "CA", "CG" between a layer and the next, a sum of two products "A2", "G2" of the second; norm layers have "F",
        the exact blocks (units, 2, 2). A factor kept diagonal is dense up to ``max_factor_dim``, else the vector of its
        diagonal. Groups lead.
        """
        targets = {target.name: target for target in self._engine.facts.targets}
        if name not in targets:
            raise FxcurvError(f"there is no layer '{name}'; there are {', '.join(targets) or 'none'}.")
        limit = self._engine.facts.max_factor_dim
        states = self._engine.states
        found = {}
        for part in ("A", "G", "A1", "G1", "A2", "G2", "CA", "CG", "QA", "QG", "S", "D", "F"):
            role = states.by_key.get(f"{name}.{part}")
            if role is not None:
                value = states.values[role].clone()
                if value.dtype.itemsize == 2:  # kept as bfloat16 on request
                    value = value.to(self._engine.dtype)
                diagonal = type(states.types[role]).__name__ == "Diag" and value.shape[-1] <= limit
                found[part] = torch.diag_embed(value) if diagonal else value
        return found

    def block(self, name: str) -> Tensor:
        """The dense curvature that the method keeps for a layer: undamped, of the mean loss, (d, d) or (groups, d, d)
        with d = d_out * d_in, in the row-major order of ``[W b].flatten()``.

        Raises :class:`FxcurvError` for an unknown layer, or where the method's curvature is no matrix of a layer.
        """
        engine, prefix = self._engine, f"{name}."
        self.factors(name)
        states = {key: role for key, role in engine.states.by_key.items() if key.startswith(prefix)}
        parts = {key[len(prefix) :]: engine.states.values[role] for key, role in states.items()}
        target = next(target for target in engine.facts.targets if target.name == name)
        parts["shape"] = torch.tensor([target.groups, target.d_out, target.d_in, int(target.homogeneous)])
        found = parts["F"] if set(parts) >= {"F"} else engine.method.block(parts)
        if found is None:
            raise FxcurvError(f"'{engine.method.name}' keeps no curvature of '{name}' that is a matrix of the layer.")
        return found

    def report(self) -> Report:
        """What was found and how it is treated: a row for every trainable parameter."""
        return make_report(self._engine)

    # State ----------------------------------------------------------------------------------------------------------

    def _curvature_entries(self) -> dict[str, Tensor]:
        engine = self._engine
        schedule = {
            "step": torch.tensor(engine.step),
            "seed": torch.tensor(engine.seed),
            "overdue": torch.tensor(engine.overdue),
            "terms": torch.tensor(engine.terms, dtype=torch.float64),
        }
        return {**engine.states.named(), **schedule}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._model._save_to_state_dict(destination, prefix, keep_vars)
        for key, value in self._curvature_entries().items():
            destination[f"{prefix}{PREFIX}{key}"] = value.detach()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the model and its curvature; training then goes on bit for bit.

        With ``strict``, missing or foreign curvature entries raise :class:`FxcurvError` before anything changes.
        """
        if strict:
            found = {key[len(PREFIX) :] for key in state_dict if key.startswith(PREFIX)}
            _check_keys(found, set(self._curvature_entries()), self._engine.method.name)
        return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        engine, start = self._engine, f"{prefix}{PREFIX}"
        entries = {key[len(start) :]: value for key, value in state_dict.items() if key.startswith(start)}
        known = set(self._curvature_entries())
        missing_keys += [f"{start}{key}" for key in sorted(known - set(entries))]
        unexpected_keys += [f"{start}{key}" for key in sorted(set(entries) - known)]
        schedule = {key: entries.pop(key) for key in ("step", "seed", "overdue", "terms") if key in entries}
        values = engine.states.check({key: value for key, value in entries.items() if key in known})
        plain = {key: value for key, value in state_dict.items() if not key.startswith(start)}
        self._model._load_from_state_dict(
            plain, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        engine.states.load(values)
        engine.look_at_retired()
        engine.step = int(schedule.get("step", engine.step))
        engine.seed = int(schedule.get("seed", engine.seed))
        engine.overdue = bool(schedule.get("overdue", engine.overdue))
        engine.terms = float(schedule.get("terms", engine.terms))
        engine.discard()
        self._arm()


def _check_keys(found: set[str], known: set[str], method: str) -> None:
    if not found:
        raise FxcurvError(
            "the state dict holds no curvature state; load it into model.strip(), or pass strict=False to start the "
            "curvature afresh."
        )
    missing, foreign = sorted(known - found), sorted(found - known)
    if missing or foreign:
        what = f"has no 'curvature.{missing[0]}'" if missing else f"has a foreign 'curvature.{foreign[0]}'"
        more = len(missing) + len(foreign) - 1
        raise FxcurvError(
            f"the state dict {what}{f' ({more} more keys differ)' if more else ''}: it was saved by another method or "
            f"model than this '{method}'; transform with the same settings, or pass strict=False."
        )


@torch.compiler.disable
def _keep_buffers() -> None:
    """Graphs compiled from now on can be run backwards more than once, which those that donate their buffers refuse.

    ``torch.compile`` reads the setting when it compiles what follows this call, and again in each backward pass, so it
    stays: the peak of memory in compiled backward passes is a little higher for it.
    """
    torch._functorch.config.donated_buffer = False


def _double_differentiable(method: Method) -> Any:
    """Fused attention has no second derivative: products with curvature need the plain one."""
    if method.source.kind == "hessian" or method.exact_products:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()
