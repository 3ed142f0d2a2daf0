"""What is kept of a step in which something was not finite.

In this order: failed factorisations go through the repair ladder; a state is kept only if the flags of all its owners
hold; updates are computed again from the states that are kept; and a layer whose statistics or update are still bad, or
that has never had a factorisation, gets its plain gradient back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fxcurv.ir.program import REFRESH, STATISTICS, STEP, Role
from fxcurv.ir.schedule import base_of
from fxcurv.passes.lower import Bundle, Lowered
from fxcurv.runtime.repair import repair


@dataclass(frozen=True)
class Recovery:
    """results: outputs to commit. fallback: owners that keep their gradient. repaired, kept: owners whose factorisation
    was redone, or failed for good. retry: whether the refresh has to be tried again in the next step."""

    results: dict[Role, Any]
    fallback: frozenset[str] = frozenset()
    repaired: frozenset[str] = frozenset()
    kept: frozenset[str] = frozenset()
    retry: bool = False


def apart(values: Mapping[Any, Any]) -> dict[Role, Any]:
    """Values by role, the stacks of bundles taken apart."""
    found: dict[Role, Any] = {}
    for role, value in values.items():
        found.update(zip(role.roles, value.unbind(), strict=True) if isinstance(role, Bundle) else [(role, value)])
    return found


def flags_of(results: Mapping[Role, Any]) -> dict[str, Tensor]:
    """All flags by key; one of a stack holds a row for each of its role's keys."""
    return {
        key: flag
        for role, value in results.items()
        if role.kind == "flag"
        for key, flag in zip(role.keys, value.unbind() if value.ndim else [value], strict=True)
    }


def recover(
    lowered: Lowered,
    due: frozenset[str],
    inputs: Mapping[Role, Any],
    results: dict[Role, Any],
    states: Mapping[Role, Tensor],
    commits: Mapping[Role, tuple[tuple[str, str], ...]],
) -> Recovery:
    """Sort out a slice's ``results`` by its flags; ``states`` are the values before the step. No bundles here."""
    flags = {key: bool(flag) for key, flag in flags_of(results).items()}
    new = {role: value for role, value in results.items() if role.kind == "state"}

    def bad(cadence: str, of: Mapping[str, bool]) -> frozenset[str]:
        """Owners whose flag of a cadence is down."""
        return frozenset(key.rpartition(":")[0] for key, good in of.items() if key.endswith(f":{cadence}") and not good)

    def owners(roles: Iterable[Role]) -> frozenset[str]:
        return frozenset(owner for role in roles for owner, _ in commits[role])

    def holds(role: Role, cadences: Iterable[str]) -> bool:
        return all(flags.get(f"{owner}:{every}", True) for owner, every in commits[role] if every in cadences)

    bad_statistics = bad(STATISTICS, flags)
    refreshes = [cadence for cadence in due if base_of(cadence) == REFRESH]
    failed = [role for role in new if not holds(role, refreshes) and not owners([role]) & bad_statistics]
    found = {Role("result", role.key, also=role.also): value for role, value in new.items()}
    fixed = repair(lowered, due, {**inputs, **found}, failed)
    given_up = [role for role in failed if role not in fixed]
    kept_states = {role: value for role, value in new.items() if holds(role, due)} | fixed
    outputs = {role: value for role, value in results.items() if role.kind in ("update", "info")}
    if failed or bad_statistics:
        again = lowered.slice(())
        held = {r: value for r, value in kept_states.items() if any(every != STEP for _, every in commits[r])}
        values = {**inputs, **states, **held}
        if all(role in values for role in again.inputs):
            second = dict(zip(again.outputs, again(*(values[r] for r in again.inputs)), strict=True))
            outputs |= {role: value for role, value in second.items() if role.kind in ("update", "info")}
            flags |= {key: bool(flag) for key, flag in flags_of(second).items()}
    never = owners(role for role in given_up if not bool(states[role].any()))
    stepping = frozenset(key.rpartition(":")[0] for key in flags if key.endswith(f":{STEP}"))
    return Recovery(
        results=kept_states | outputs,
        fallback=bad(STEP, flags) | ((bad_statistics | never) & stepping),
        repaired=owners(failed) - owners(given_up),
        kept=owners(given_up),
        retry=bool(given_up or bad_statistics) and bool(refreshes),
    )
