"""The pass ``batch`` in every slice of a program, and what a bundled slice hands over."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from fxcurv.ir.text import parse_program
from fxcurv.ir.verify import verify
from fxcurv.passes import Compilation, run_passes
from fxcurv.passes.batch import Batch
from fxcurv.passes.cadence import Cadence
from fxcurv.passes.guard import Guard
from fxcurv.passes.lower import Bundle, Lower, Lowered
from fxcurv.passes.validate import random_inputs
from fxcurv.runtime.recover import apart

LAYERS = "abcd"
DUE = [
    frozenset(name for name, on in zip(("statistics", "refresh"), flags, strict=True) if on)
    for flags in product((0, 1), repeat=2)
]


def program(inner: str) -> str:
    """Four layers whose factor is kept over two cadences. inner: for each, whose average it starts from."""
    lines = ["update {", "  cadence statistics=2, refresh=4", "  %w : Scalar[]:f64 = hyper['ema']"]
    for x in LAYERS:
        lines += [
            f"  %g_{x} : Mat[2,3]:f64 = grad['{x}.weight'] @{x}",
            f"  %S_{x} : Psd[3]:f64 = stat['gram({x}.a)'] every=statistics",
            f"  %A_{x} : Psd[3]:f64 = state['{x}.A'] init=zeros @{x}",
            f"  %B_{x} : Psd[3]:f64 = state['{x}.B'] init=zeros @{x}",
        ]
    for x in sorted(set(inner)):
        lines += [
            f"  %E_{x} : Psd[3]:f64 = ema(%A_{x}, %S_{x}, %w) every=statistics @{x}",
            f"  %K_{x} : Psd[3]:f64 = on_due(%E_{x}, %A_{x}) every=statistics @{x}",
        ]
    for x, y in zip(LAYERS, inner, strict=True):
        lines += [
            f"  %I_{x} : Psd[3]:f64 = inverse(%B_{x}, 0.5) every=refresh @{x}",
            f"  %D_{x} : Psd[3]:f64 = on_due(%I_{x}, %K_{y}) every=refresh @{x}",
            f"  %U_{x} : Mat[2,3]:f64 = right_apply(%g_{x}, %D_{x}) @{x}",
        ]
    for x in LAYERS:
        lines += [f"  yield update['{x}.weight'] = %U_{x}", f"  yield state['{x}.B'] = %D_{x}"]
    lines += [f"  yield state['{x}.A'] = %K_{x}" for x in sorted(set(inner))]
    return "\n".join([*lines, "}"])


def lowered(text: str, batched: bool) -> Lowered:
    c = Compilation(program=parse_program(text), check="numeric")
    run_passes(c, [Cadence(), Guard(), *([Batch()] if batched else []), Lower()])
    assert c.program is not None and c.lowered is not None
    verify(c.program)
    return c.lowered


def run(low: Lowered, due: frozenset[str], inputs: dict[tuple[str, str], Tensor], bundled: bool) -> dict[str, Tensor]:
    piece = low.slice(due, bundled=bundled)
    given = [
        torch.stack([inputs[role.kind, role.key] for role in one.roles])
        if isinstance(one, Bundle)
        else inputs[one.kind, one.key]
        for one in piece.inputs
    ]
    results = apart(dict(zip(piece.outputs, piece(*given), strict=True)))
    return {f"{role.kind}:{role.key}": value for role, value in results.items() if role.kind != "flag"}


@pytest.mark.parametrize("inner", ["abcd", "aacc", "badc"])
@pytest.mark.parametrize("due", DUE, ids=lambda due: "-".join(sorted(due)) or "step")
@pytest.mark.parametrize("bundled", [False, True])
def test_every_slice_computes_the_same(inner: str, due: frozenset[str], bundled: bool) -> None:
    plain, batched = (lowered(program(inner), on) for on in (False, True))
    inputs = {(r.kind, key): v for r, v in random_inputs(plain.program, 1).items() for key in r.keys}
    expected, found = run(plain, due, inputs, False), run(batched, due, inputs, bundled)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-13)


def test_bundles_are_handed_over_whole() -> None:
    low = lowered(program("abcd"), True)
    piece = low.slice(("statistics", "refresh"), bundled=True)
    kinds = {one.kind: one.keys for one in piece.inputs if isinstance(one, Bundle)}
    assert kinds["stat"] == tuple(f"gram({x}.a)" for x in LAYERS)
    given = {one.keys for one in piece.outputs if isinstance(one, Bundle)}
    assert given == {tuple(f"{x}.A" for x in LAYERS), tuple(f"{x}.B" for x in LAYERS)}
    assert low.slice(("statistics",), bundled=True).inputs != piece.inputs
    assert {b for b in piece.inputs if isinstance(b, Bundle)} >= {
        b for b in low.slice((), bundled=True).inputs if isinstance(b, Bundle) and b.keys[0] == "a.A"
    }  # one object for equal bundles


@pytest.mark.parametrize("fuel", [0, 1, 3])
def test_fuel_limits_the_stacks(fuel: int) -> None:
    c = Compilation(program=parse_program(program("abcd")), fuel=fuel, check="numeric")
    run_passes(c, [Batch()])
    assert c.history[0].rewrites == fuel
