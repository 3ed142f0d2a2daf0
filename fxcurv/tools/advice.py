"""Advice with numbers: what a change of a setting would do to an average step, by the same estimate.

Each rule looks at the estimate and speaks only when the gain is worth reading: two hundredths of a plain step or more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from fxcurv.ir.program import REFRESH, STATISTICS
from fxcurv.ir.types import Psd
from fxcurv.tools.estimate import Estimate
from fxcurv.tools.recorder import summed

WORTH = 0.02  # of a plain step
LARGE = 0.3  # of the states' memory


def advice(e: Estimate) -> list[str]:
    """One sentence for each change that pays, in the order of RULES."""
    return [sentence for rule in RULES for sentence in rule(e)]


def _change(e: Estimate, what: str, new: float) -> Iterator[str]:
    old = e.ratio()
    if old - new >= WORTH:
        yield f"{what}: {old:.2f}x to {new:.2f}x of a plain step."


def _refresh_less(e: Estimate) -> Iterator[str]:
    period = e.periods.get(REFRESH)
    if period:
        new = 2 * period
        yield from _change(e, f"refresh every {new} instead of {period} (solve_every={new})", e.ratio({REFRESH: new}))


def _measure_less(e: Estimate) -> Iterator[str]:
    period = e.periods.get(STATISTICS)
    if period and e.taps:
        new = 5 * period
        periods = {STATISTICS: new, REFRESH: max(new, e.periods.get(REFRESH, new))}
        yield from _change(e, f"statistics every {new} instead of {period} (factor_every={new})", e.ratio(periods))


def _source(e: Estimate) -> Iterator[str]:
    if not e.columns:
        return
    if e.columns > 1:
        yield from _change(e, f"one sampled backward pass in place of {e.columns} (fisher='mc')", e.ratio(columns=1))
    yield from _change(e, "gradients of the loss in place of sampled ones (fisher='empirical')", e.ratio(columns=0))
    share = e.columns * (e.plain.seconds * 2 / 3 - e.second.seconds) / e.plain.seconds / e.periods.get(STATISTICS, 1)
    yield (
        "under torch.compile a backward pass of the source is a full one, weight gradients included: about "
        f"{share:+.2f} of a plain step."
    )


def _batch(e: Estimate) -> Iterator[str]:
    """Nodes of one kernel, cadence and types that stand apart are launches that the pass 'batch' could merge."""
    lowered = e.module._engine.lowered
    groups: Counter[tuple[object, ...]] = Counter()
    launches: dict[tuple[object, ...], int] = {}
    for node, item in e.nodes.items():
        key = (lowered.kernels[node.name], item.cadence, tuple(summed(list(item.executed.works))))
        groups[key] += 1
        launches[key] = item.executed.launches
    merged = sum((count - 1) * launches[key] for key, count in groups.items())
    total = sum(item.executed.launches for item in e.nodes.values())
    gain = sum(
        (count - 1) * launches[key] * e.device.launch / e.periods.get(str(key[1]), 1) for key, count in groups.items()
    )
    if merged and gain >= WORTH * e.plain.seconds:
        yield (
            f"nodes of equal shape, one call for each group, would merge {merged:,} of {total:,} launches of the "
            f"update program and save up to {gain / e.plain.seconds:.2f} of a plain step (pass 'batch')."
        )


def _wide(e: Estimate) -> Iterator[str]:
    """The widest factor, where it holds much of the memory."""
    sizes = {role: node.meta["type"] for role, node in e.module.program.inputs("state").items()}
    total = sum(type_.nbytes for type_ in sizes.values())
    wide = [(type_.shape[-1] or 0, role) for role, type_ in sizes.items() if isinstance(type_, Psd)]
    if not wide:
        return
    d, role = max(wide, key=lambda pair: pair[0])
    held = sum(type_.nbytes for r, type_ in sizes.items() if type_.shape[-2:] == (d, d))
    if d > 64 and held >= LARGE * total:
        yield (
            f"factors of size {d} (such as '{role.key}') hold {held / 1e6:.1f} of {total / 1e6:.1f} MB of states; "
            f"max_factor_dim={d - 1} makes them diagonal."
        )


def _small(e: Estimate) -> Iterator[str]:
    """Whether launches, not work, are what the step waits for."""
    parts = [e.part(cadence) for cadence in e.periods]
    launches = sum(p.launches / p.every for p in parts)
    seconds = sum(p.seconds / p.every for p in parts)
    waits = launches * e.device.launch
    if seconds and waits > 0.5 * seconds and waits > WORTH * e.plain.seconds:
        yield (
            f"{launches:,.0f} launches an average step cost {100 * waits / seconds:.0f} % of what the method adds: the "
            "layers are too small for the device, or too many."
        )


RULES: tuple[Callable[[Estimate], Iterator[str]], ...] = (
    _refresh_less, _measure_less, _source, _batch, _wide, _small,
)  # fmt: skip
