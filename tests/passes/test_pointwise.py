"""The pass pointwise: what it joins, in which order, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxcurv
from fxcurv.ir.op import OPS
from fxcurv.ir.program import Builder, Program
from fxcurv.ir.text import parse_program
from fxcurv.ir.types import Mat, Scalar
from fxcurv.passes import Compilation, run_passes
from fxcurv.passes.pointwise import FUSIBLE, Pointwise, _sort
from fxcurv.passes.validate import interpret, random_inputs
from tests.kernels.programs import everything


def joined(program: Program, **options: object) -> tuple[Program, int]:
    c = Compilation(program=program.copy(), check="numeric", **options)
    run_passes(c, [Pointwise(always=True)])
    assert c.program is not None
    return c.program, c.history[-1].rewrites


def chains(program: Program) -> list[list[str]]:
    return [list(node.args[1]) for node in program.nodes if node.target is OPS["pointwise"]]  # type: ignore[call-overload]


@pytest.mark.parametrize("method", ["adam", "adahessian", "ekfac", "kfac"])
def test_programs_stay_what_they_are(method: str) -> None:
    """Checked numerically by the manager; the text reads back; no chain is empty; fuel stops it."""
    before = everything(method)._engine.lowered.program
    after, rewrites = joined(before)
    assert rewrites >= len(chains(after)) > 0 and all(len(steps) > 1 for steps in chains(after))
    assert parse_program(after.text()).text() == after.text()
    assert set(after.outputs()) == set(before.outputs())
    assert {r: n.meta["owner"] for r, n in after.outputs().items()} == {
        r: n.meta["owner"] for r, n in before.outputs().items()
    }
    assert joined(before, fuel=0)[1] == 0


def test_without_generated_kernels_nothing_is_joined() -> None:
    program = everything("adam", "aten")._engine.lowered.program
    c = Compilation(program=program.copy(), options={"backend": "aten"})
    run_passes(c, [Pointwise()])
    assert c.program is not None and c.program.text() == program.text()


def test_with_generated_kernels_they_claim_what_is_joined() -> None:
    pytest.importorskip("triton")
    lowered = everything("adam", "triton")._engine.lowered
    names = [lowered.kernels[node.name] for node in lowered.program.nodes if node.target is OPS["pointwise"]]
    assert names and all(name.startswith("pointwise_") for name in names)
    off = everything("adam", "triton", disable=("pointwise",))._engine.lowered
    assert not chains(off.program) and len(off.program) > len(lowered.program)


def test_every_line_of_the_generator_is_an_op_that_is_joined() -> None:
    from fxcurv.kernels.triton.pointwise import LINES, NAIVE

    assert set(LINES) == FUSIBLE == set(NAIVE) and set(OPS) >= FUSIBLE


def crossed() -> Program:
    """Two shapes, each of whose ends waits for the other's beginning: joining both would be a knot."""
    b = Builder()
    a, c = b.input("grad", "a", Mat((2, 2))), b.input("grad", "c", Mat((2, 3)))
    a1, c1 = b.square(a), b.square(c)
    a2 = b.scale(a, b.dot(c1, c))
    c2 = b.scale(c, b.dot(a1, a))
    b.give("update", "a", b.add(a1, a2))
    b.give("update", "c", b.add(c1, c2))
    return b.finish()


def test_chains_that_wait_for_one_another_are_not_joined() -> None:
    program = crossed()
    after, rewrites = joined(program)
    assert rewrites == 0
    inputs = random_inputs(program)
    for role, value in interpret(after, inputs).items():
        torch.testing.assert_close(value, interpret(program, inputs)[role])


def test_sorting_puts_operands_first_and_changes_nothing_else() -> None:
    b = Builder()
    g = b.input("grad", "w", Mat((2, 2)))
    first, second = b.neg(g), b.square(g)
    b.give("update", "w", b.add(first, second))
    program = b.finish()
    nodes = [node.name for node in program.graph.nodes]
    second.append(first)
    list(program.nodes)[-1].append(second)
    _sort(program.graph)
    program.graph.lint()
    assert sorted(node.name for node in program.graph.nodes) == sorted(nodes)


def test_numbers_of_rows_and_scalars_may_take_part() -> None:
    b = Builder()
    stack, rows = b.input("grad", "w", Mat((3, 2, 2))), b.input("hyper", "rows", Scalar((3,)))
    b.give("update", "w", b.neg(b.scale(stack, rows)))
    after, rewrites = joined(b.finish())
    assert rewrites == 1 and chains(after) == [["scale(x0, x1)", "neg(x2)"]]


def test_a_step_with_the_pass_is_the_step_without() -> None:
    """Through the runtime, on the CPU, where the joined op runs its parts."""
    results = []
    for disable in ((), ("pointwise",)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        x, y = torch.randn(5, 4), torch.randint(0, 2, (5,))
        model = fxcurv.transform(net, "adam", example_inputs=(x,), loss="cross_entropy", disable=disable)
        if not disable:
            _rejoin(model)
        for _ in range(3):
            model.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            model.precondition_()
        results.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def _rejoin(model: object) -> None:
    """Lower a model's program again with its chains joined."""
    from fxcurv.passes.lower import Lower

    engine = model._engine  # type: ignore[attr-defined]
    program, rewrites = joined(engine.lowered.program)
    assert rewrites
    c = Compilation(program=program, options={"backend": "aten"})
    Lower().run(c)
    engine.lowered.functions, engine.lowered.kernels = c.lowered.functions, c.lowered.kernels
    engine.lowered.program = program
    engine.lowered.slices.clear()
