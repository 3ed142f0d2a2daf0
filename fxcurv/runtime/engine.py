"""The engine: runs the slices of a program, commits their results, and keeps the schedule.

A step runs one slice. The slice reports by flags which of its results are finite; here is decided what follows (see
:mod:`fxcurv.runtime.recover`). With everything finite, one look at one number, results are simply taken over.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxcurv.errors import FxcurvError, FxcurvWarning
from fxcurv.ir.program import REFRESH, STATISTICS, Role
from fxcurv.ir.schedule import base_of, falls_due
from fxcurv.layers.region import Place, place_of
from fxcurv.losses import Loss
from fxcurv.passes.lower import Bundle, Lowered
from fxcurv.passes.manager import Compilation
from fxcurv.runtime.batch import measured
from fxcurv.runtime.distributed import WORLD, Ranks
from fxcurv.runtime.info import StepInfo
from fxcurv.runtime.inputs import gradient_scale, inputs_of, rows_of
from fxcurv.runtime.numbers import Numbers
from fxcurv.runtime.oracles import GGNOracle, HessianOracle
from fxcurv.runtime.places import Places
from fxcurv.runtime.proposal import Proposal
from fxcurv.runtime.recover import Recovery, apart, flags_of, recover
from fxcurv.runtime.repair import dump
from fxcurv.runtime.retired import Retirement, still_read
from fxcurv.runtime.rows import KeptRows, gradient_of
from fxcurv.runtime.states import States
from fxcurv.runtime.statistics import Statistics, tap_types
from fxcurv.runtime.watched import Watched
from fxcurv.runtime.written import Written


class Engine:
    """One transformed model's program, state and schedule.

    step counts finished steps, micro the backward calls of the running one; with seed they fix all random draws.
    forced holds what ``due`` asked for. overdue: a factorisation could not be renewed when it was due, so the next step
    tries again. terms: loss terms behind the last statistics. oracle: products with curvature for the program; exact:
    those for the quadratic model of a step. info: what the program reported in the last step
    (``kl_scale``, iterates). decays: strengths of an L2 penalty by parameter where an optimizer has its own; penalised:
    whether this step's gradients have it already. process_group: the processes that train this model together; see
    :mod:`fxcurv.runtime.distributed`.
    """

    def __init__(self, model: nn.Module, compilation: Compilation, loss: Loss | None, on_nonfinite: str) -> None:
        assert compilation.method is not None and compilation.lowered is not None and compilation.facts is not None
        self.model = model
        self.compilation = compilation
        self.method = compilation.method
        self.facts = compilation.facts
        self.lowered: Lowered = compilation.lowered
        self.loss = loss
        self.on_nonfinite = on_nonfinite
        self.hyper = dict(self.method.hyper)
        self.dtype = compilation.facts.dtype
        self.numbers = Numbers(self.dtype)
        self.retirement = Retirement(self.lowered.program, (t.name for t in self.facts.targets))
        self.places = Places.of(model)
        self.anchors = {name: name for name in self.places.slots} | {
            t.name: place_of(t.weight, self.places.slots).name for t in self.facts.targets
        }
        self.states = States(self.lowered.program, self.device_of)
        self.commits = self.lowered.commits()
        read = self.lowered.program.inputs("grad") | self.lowered.program.inputs("param")
        self.stored = {r.key: (place_of(r.key, self.places.slots), node.meta["type"].dtype) for r, node in read.items()}
        self.owner_of = {key: t.name for t in self.facts.targets for key in (t.weight, t.bias) if key}
        types = {role.key: node.meta["type"] for role, node in self.lowered.program.inputs("stat").items()}
        self.statistics = Statistics(tap_types(types))
        self.rows = KeptRows()
        self.row_types = {role.key: node.meta["type"] for role, node in self.lowered.program.inputs("rows").items()}
        self.row_layers = {t.name: t for t in self.facts.targets if f"{t.name}.x" in self.row_types}
        self.oracle: HessianOracle | GGNOracle | None = None
        self.exact: GGNOracle | None = None
        self.seed = self.method.seed
        self.step = 0
        self.micro = 0
        self.penalised = False
        self.decays: Mapping[nn.Parameter, float] | None = None
        self.forced: dict[str, bool | None] = {STATISTICS: None, REFRESH: None}
        self.overdue = False
        self.terms = 0.0
        self.info: dict[str, Tensor] = {}
        self.warned: set[str] = set()
        self.written = Written()
        self.watched = Watched.by(self.lowered.program)
        self.process_group: Any = WORLD

    def clone(self, model: nn.Module) -> Engine:
        """The same program with an independent copy of the state, for a copied model."""
        other = Engine(model, self.compilation, self.loss, self.on_nonfinite)
        other.hyper, other.step, other.overdue, other.terms = dict(self.hyper), self.step, self.overdue, self.terms
        other.seed, other.forced, other.process_group = self.seed, dict(self.forced), self.process_group
        other.states = self.states.clone()
        other.look_at_retired()
        return other

    # Schedule -------------------------------------------------------------------------------------------------------

    def is_due(self, cadence: str) -> bool:
        """Whether a cadence is due in the coming step: by ``due`` if it said so, else by its period."""
        base = base_of(cadence)
        forced = self.forced.get(base)
        period = self.lowered.program.cadences[cadence]
        if forced is None:
            if base in self.forced and self.retirement.complete(self.states):
                return False
            if base == STATISTICS and self.method.every.rests(self.step) and not self.overdue:
                return False
            return falls_due(cadence, period, self.step) or (self.overdue and base == REFRESH)
        return forced

    def due(self) -> frozenset[str]:
        """The cadences that are due in the coming step."""
        return frozenset(name for name in self.lowered.program.cadences if self.is_due(name))

    @property
    def wants_statistics(self) -> bool:
        """Whether the coming step uses statistics of layers."""
        return self.method.source.taps and bool(self.statistics.types) and self.is_due(STATISTICS)

    @property
    def retired(self) -> frozenset[str]:
        """Names of the layers whose curvature has settled for good."""
        return self.retirement.names(self.states)

    def look_at_retired(self) -> None:
        """Read anew which layers are over; their statistics are not measured any more."""
        self.retirement.forget()
        if self.retired:
            self.statistics.measure_only(still_read(self.lowered, self.retired))
        else:
            self.statistics.measure_only(None)

    @property
    def keeps_rows(self) -> bool:
        """Whether some weight gradients are never formed."""
        return bool(self.row_types)

    @property
    def keep(self) -> Any:
        """What keeps rows in the place of weight gradients; ``None`` where weight gradients are needed: other processes
        and graphs compiled from the model know nothing else."""
        return None if torch.compiler.is_compiling() or self.ranks.size > 1 else self.rows.keep

    @property
    def arrived(self) -> bool:
        """Whether a backward pass has left something for the coming step."""
        return self.statistics.arrived or self.rows.arrived

    @property
    def ranks(self) -> Ranks:
        """The processes that train this model together."""
        return Ranks.of(self.process_group)

    @property
    def summed(self) -> bool:
        """Whether the user's loss is a sum over its terms."""
        return self.loss is not None and self.loss.reduction == "sum"

    # A step ---------------------------------------------------------------------------------------------------------

    def run(self, scaler: Any = None, rate: float | None = None) -> StepInfo:
        """Turn the parameters' gradients into update directions, in place; see ``CurvatureModule.precondition_``."""
        proposals = self.propose(scaler, rate)
        if not proposals:
            self.discard()
            return StepInfo(self.step, skipped=True)
        return self.take(proposals[0])

    def propose(
        self, scaler: Any = None, rate: float | None = None, trials: Sequence[Mapping[str, float]] = ({},)
    ) -> list[Proposal]:
        """The coming step, once with each of ``trials`` in place of these hyper-parameters; nothing changes yet.

        Nothing comes back when the scaler found an overflow. The first trial is always there, after the repairs that it
        needs; of the others those that need none.
        """
        self.places.check()
        if self.rows.arrived and scaler is not None and scaler.is_enabled():
            raise FxcurvError(
                "weight_gradients=False leaves a GradScaler nothing to look at: transform with weight_gradients=True."
            )
        parameters = self.parameters()
        scale, captured_scale, overflow = gradient_scale(scaler, parameters.values())
        if overflow:
            return []
        due = self.due()
        batch = measured(self, due)
        self.written.check(p.grad for p in parameters.values())
        self._penalise(parameters, batch.terms, scale)
        current = self.lowered.slice(due, bundled=True, retired=self.retired)
        inputs = inputs_of(self, current, batch, (scale, captured_scale), rate)
        found = []
        for index, trial in enumerate(trials):
            own = {role: self._changed(role, value, trial) for role, value in inputs.items()}
            if index + 1 < len(trials):  # a slice may write over statistics
                own |= {role: value.clone() for role, value in own.items() if role.kind == "stat"}
            results = dict(zip(current.outputs, current(*own.values()), strict=True))
            flags = [value.reshape(-1) for role, value in results.items() if role.kind == "flag"]
            sound = not flags or bool(torch.cat(flags).all())
            if sound:
                found.append(Proposal(index, due, Recovery(results), results, batch.terms, scale))
            elif index == 0:
                found.append(self._recovered(due, own, results, batch.terms, scale))
        return found

    def _changed(self, role: Any, value: Any, trial: Mapping[str, float]) -> Any:
        changed = trial.get(role.key) if role.kind == "hyper" else None
        return value if changed is None else self.numbers.tensor(role.key, changed)

    def directions(self, proposal: Proposal) -> dict[str, Tensor]:
        """What a proposal would make of every gradient that is there, by full name, as new tensors."""
        parameters = self.parameters()
        found = {name: p.grad.detach().clone() for name, p in parameters.items() if p.grad is not None}
        for role, value in proposal.found.results.items():
            place = self._place(role, proposal.found, parameters)
            if place is not None and place.name in found:
                place.of(found[place.name]).copy_(value if proposal.scale == 1.0 else value * proposal.scale)
        return found

    def take(self, proposal: Proposal) -> StepInfo:
        """Let a proposal be the step: states and gradients become what it computed, and the schedule goes on."""
        if proposal.troubled:
            self._dump(proposal.found, proposal.results)
            self._warn(proposal.found)
        info = self._commit(proposal)
        if self.retirement.roles and STATISTICS in proposal.due:
            self.look_at_retired()
        self.step += 1
        self.micro = 0
        self.forced = {STATISTICS: None, REFRESH: None}
        self.discard()
        return info

    def _penalise(self, parameters: dict[str, nn.Parameter], terms: float, scale: float) -> None:
        """Add the gradient of an L2 penalty to every gradient that is there, once a step, in the gradients' own scale.

        Whether a parameter is preconditioned makes no difference; one without gradient in this step has none.
        """
        if self.method.rule.decay != "l2" or self.penalised:
            return
        self.penalised = True
        factor = self.factor(terms, scale)
        arrived = {t.weight for name, t in self.row_layers.items() if self.rows.of(name)}
        with torch.no_grad():
            for name, p in parameters.items():
                strength = self.method.rule.weight_decay if self.decays is None else self.decays.get(p, 0.0)
                if not strength or (p.grad is None and name not in arrived):
                    continue
                if p.grad is None:  # its rows are kept in the place of the gradient; what is stored is added to them
                    p.grad = torch.zeros_like(p)
                p.grad.add_(p, alpha=strength / factor)

    def factor(self, terms: float, scale: float) -> float:
        """What brings stored gradients to the scale of the mean loss.

        Between statistics a summed gradient is taken to have as many terms as when they were last counted. Of several
        ranks' sums it is the average.
        """
        return (self.ranks.size / (terms or self.terms or 1.0) if self.summed else 1.0) / scale

    def discard(self) -> None:
        """Forget statistics and oracles of an unfinished step."""
        self.penalised, self.decays = False, None
        self.statistics.discard()
        self.rows.discard()
        self.oracle = self.exact = None
        self.watched.losses.clear()
        self.micro = 0

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by full name: the tensors that the model holds now."""
        return self.places.parameters()

    def device_of(self, owner: str) -> torch.device:
        """The device of a layer or parameter; that of the first parameter for anything else."""
        return self.places.device(self.anchors.get(owner, self.places.first))

    def stat_device(self, key: str) -> torch.device:
        """Where a statistic is measured."""
        slot = self.statistics.latest.get(key)
        return self.device_of("") if slot is None else slot.device

    def _recovered(
        self, due: frozenset[str], inputs: dict[Any, Any], results: dict[Any, Any], terms: float, scale: float
    ) -> Proposal:
        """A proposal from results of which some are not finite."""
        if self.on_nonfinite == "raise":
            bad = {key.rpartition(":")[0] for key, flag in flags_of(results).items() if not bool(flag)}
            where = ", ".join(sorted(bad))
            raise FxcurvError(f"step {self.step}: not finite in {where}; nothing was changed.")
        results = apart(results)
        found = recover(self.lowered, due, apart(inputs), results, self.states.values, self.commits)
        return Proposal(0, due, found, results, terms, scale, troubled=True)

    def _commit(self, proposal: Proposal) -> StepInfo:
        due, found, terms = proposal.due, proposal.found, proposal.terms
        refreshed = any(base_of(cadence) == REFRESH for cadence in due)
        self.overdue = found.retry or (self.overdue and not refreshed)
        self.terms = terms or self.terms
        for role, value in found.results.items():
            if isinstance(role, Bundle):
                self.states.values.put(role, value)
            elif role.kind == "state":
                self.states.values[role] = value
        self._write(found, proposal.scale)
        self.info = {role.key: value for role, value in found.results.items() if role.kind == "info"}
        clip = self.info.get("kl_scale")
        return StepInfo(
            self.step,
            statistics=STATISTICS in due and (self.method.source.taps or self.oracle is not None),
            refresh=refreshed,
            terms=terms,
            kl_scale=None if clip is None else float(clip),
            fallback=tuple(sorted(found.fallback)),
            repaired=tuple(sorted(found.repaired)),
            kept=tuple(sorted(found.kept)),
        )

    def _dump(self, found: Recovery, results: dict[Role, Any]) -> None:
        """Write the states of failed layers, as the failing step computed them, where ``dump_failures`` says."""
        folder, failed = self.compilation.options.get("dump_failures"), found.repaired | found.kept
        if folder is not None and failed:
            latest = {**self.states.values, **{r: value for r, value in results.items() if r.kind == "state"}}
            chosen = {r: v for r, v in latest.items() if failed & {owner for owner, _ in self.commits.get(r, ())}}
            dump(folder, self.step, chosen)

    def _warn(self, found: Recovery) -> None:
        for cause, names, what in (
            ("fallback", found.fallback, "keep their plain gradient in this step because something was not finite"),
            ("kept", found.kept, "keep their previous factorisation because the new one failed at every damping"),
        ):
            if names and cause not in self.warned:
                self.warned.add(cause)
                warnings.warn(
                    f"layers {', '.join(sorted(names))} {what} (step {self.step}).", FxcurvWarning, stacklevel=5
                )

    def _write(self, found: Recovery, scale: float) -> None:
        parameters = self.parameters()
        arrived = {t.weight: name for name, t in self.row_layers.items() if self.rows.of(name)}
        for key, name in arrived.items():
            if name in found.fallback:
                parameters[key].grad = gradient_of(self.row_layers[name], parameters[key], *rows_of(self, name))
        written: dict[str, Tensor] = {}
        parts: list[Tensor] = []
        steps: list[Tensor] = []
        for role, value in found.results.items():
            place = self._place(role, found, parameters)
            if place is None:
                continue
            grad = parameters[place.name].grad
            if role.key in arrived:
                step = value if scale == 1.0 else value * scale
                parameters[role.key].grad = grad = step.to(parameters[role.key].dtype)
                self.written.mark(grad)
            elif grad is not None:
                parts.append(grad if place.region is None else place.of(grad))
                steps.append(value if scale == 1.0 else value * scale)
                written[place.name] = grad
        if parts:
            with torch.no_grad():
                torch._foreach_copy_(parts, steps)
        for grad in written.values():
            self.written.mark(grad)

    def _place(self, role: Any, found: Recovery, names: Collection[str]) -> Place | None:
        """Where a result belongs among the gradients; ``None`` for one that is no update, or is not to be used."""
        if role.kind != "update" or self.owner_of.get(role.key, role.key) in found.fallback:
            return None
        return self.stored[role.key][0] if role.key in self.stored else place_of(role.key, names)
