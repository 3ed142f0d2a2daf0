"""Costs against numbers worked out by hand."""

from __future__ import annotations

import pytest

from fxcurv.errors import FxcurvError
from fxcurv.ir.cost import budget, node_costs, program_cost, state_bytes, statistic_cost
from fxcurv.ir.op import Cost
from fxcurv.ir.text import parse_program
from fxcurv.ir.types import Diag, Mat, Orth, Psd, Rows, Scalar
from tests.passes.programs import attention, build, compiled, mixed

TEXT = """update {
  cadence statistics=2, refresh=10
  %a : Rows[?,?,1,3] = stat['fc.a'] every=statistics
  %A : Psd[3] = state['fc.A', 'k.A'] init=zeros
  %i : Psd[3]:f64 = state['fc.i'] init=zeros
  %k : Scalar[] = hyper['k']
  %g : Mat[2,3] = grad['w']
  %gram : Psd[3] = gram(%a) every=statistics
  %ema : Psd[3] = ema(%A, %gram, %k) every=statistics
  %kept : Psd[3] = on_due(%ema, %A) every=statistics
  %u : Mat[2,3] = right_apply(%g, %A)
  yield state['fc.A', 'k.A'] = %kept
  yield update['w'] = %u
}"""


def test_program_cost() -> None:
    program = parse_program(TEXT)
    costs = program_cost(program, rows=10)
    gram = Cost(2 * 10 * 3 * 3, 4 * (10 * 3 + 9))
    ema = Cost(3 * 9, 4 * (9 + 9 + 9 + 1))
    apply = Cost(2 * 6 * 3, 4 * (6 + 6 + 9))
    assert costs == {"step": apply, "statistics": gram + ema, "refresh": Cost()}
    table = {node.name: cost for node, cost in node_costs(program, rows=10).items()}
    assert table == {"gram": gram, "ema": ema, "u": apply}
    b = budget(program, rows=10)
    assert b.per_step.flops == apply.flops + (gram + ema).flops / 2
    assert b.per_step.bytes == apply.bytes + (gram + ema).bytes / 2
    assert state_bytes(program) == {"fc.A": 36, "fc.i": 72} and b.state_bytes == 108


@pytest.mark.parametrize("method", ["kfac", "ekfac", "foof", "diag"])
@pytest.mark.parametrize("rows", [1, 7])
def test_sinking_does_not_change_the_cost(method: str, rows: int) -> None:
    """The reductions are the same work inside a tap; without share q, k and v each pay for their own."""
    program = build(method, mixed())
    before = program_cost(compiled(program.copy(), "share").program, rows)  # type: ignore[arg-type]
    after = program_cost(compiled(program.copy(), "sink,share").program, rows)  # type: ignore[arg-type]
    assert before["statistics"].flops > 0
    assert {name: cost.flops for name, cost in after.items()} == {name: cost.flops for name, cost in before.items()}


def test_sharing_saves() -> None:
    program = build("kfac", attention())
    apart = budget(compiled(program.copy(), "sink").program, 100)  # type: ignore[arg-type]
    shared = budget(compiled(program.copy(), "sink,share").program, 100)  # type: ignore[arg-type]
    assert shared.costs["statistics"].flops < apart.costs["statistics"].flops
    assert apart.state_bytes - shared.state_bytes == 2 * 4 * (16 + 1)  # two input factors, two counters


@pytest.mark.parametrize(
    "key, type_, flops, moved",
    [
        ("gram(fc.a)", Psd((3, 3)), 2 * 10 * 9, 30 + 9),
        ("gram(conv.g)", Psd((4, 3, 3)), 2 * 10 * 4 * 9, 120 + 36),
        ("diag_gram(emb.a)", Diag((5,)), 2 * 10 * 5, 50 + 5),
        ("grad_square(fc.a, fc.g)", Mat((2, 3)), 2 * 10 * 6, 50 + 6),
        ("grad_gram(ln.a, ln.g)", Psd((4, 2, 2)), 2 * 10 * 4 * 2 + 2 * 10 * 4 * 4, None),
        ("second_moment(fc.a, fc.g, $QA, $QG)", Mat((2, 3)), 2 * 10 * 6 + 2 * 10 * 9 + 10 * 2, 50 + 6 + 9 + 2),
        ("count(fc.a)", Scalar(), 0, 1),
        ("fc.a", Rows((None, None, 1, 3)), 0, 0),
        ("weight", Scalar(), 0, 0),
    ],
)
def test_statistic_cost(key: str, type_: Psd, flops: float, moved: int | None) -> None:
    cost = statistic_cost(key, type_, {"QA": Orth((3, 3)), "QG": Diag((2,))}, rows=10)
    assert cost.flops == flops
    assert moved is None or cost.bytes == 4 * moved


@pytest.mark.parametrize(
    "key, message",
    [
        ("inverse(fc.a)", "'inverse' is no reduction of rows"),
        ("second_moment(fc.a, fc.g, $R, $QG)", "reads the state 'R', which does not exist"),
        ("gram(eigh(fc.a))", "is not computed row by row"),
    ],
)
def test_unknown_statistics(key: str, message: str) -> None:
    with pytest.raises(FxcurvError, match=message):
        statistic_cost(key, Mat((2, 3)), {})
