"""The whole pipeline on the programs of every method: meaning is kept, schedules are respected, speed is bounded."""

from __future__ import annotations

import operator
import time
from typing import Any

import pytest
import torch
from torch import fx

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS
from fxcurv.ir.program import STEP, Program, Role
from fxcurv.ir.text import parse_program
from fxcurv.ir.verify import verify
from fxcurv.methods.facts import Facts
from fxcurv.passes import PASSES, Cadence, Pass, Share, Sink, parse_pipeline
from fxcurv.passes.manager import Compilation, run_passes
from fxcurv.passes.validate import interpret, random_inputs, relative_error
from tests.passes.programs import (
    METHODS,
    PIPELINE,
    attention,
    build,
    compiled,
    facts,
    keys,
    linear,
    measured,
    mixed,
    ops,
)

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((method, {}) for method in METHODS),
    ("kfac", {"damping_scheme": "sqrt"}),
    ("kfac", {"damping_scheme": "eigenvalue"}),
    ("kfac", {"kl_clip": None, "max_factor_dim": 4}),
    ("kfac", {"sharing": "reduce"}),
    ("ekfac", {"sharing": "reduce"}),
    ("shampoo", {"average": "ema", "max_factor_dim": 3}),
]
IDS = [method + "".join(f"-{key}={value}" for key, value in hyper.items()) for method, hyper in VARIANTS]
DUE = [(), ("statistics",), ("refresh",), ("statistics", "refresh")]


def facts_for(hyper: dict[str, Any], model: Facts) -> Facts:
    """The facts that a method with these hyper-parameters is given."""
    options = {key: hyper[key] for key in ("max_factor_dim", "sharing") if key in hyper}
    return Facts(model.targets, model.parameters, model.dtype, **options)


@pytest.fixture(params=VARIANTS, ids=IDS)
def program(request: pytest.FixtureRequest) -> Program:
    method, hyper = request.param
    return build(method, facts_for(hyper, mixed()), factor_every=2, solve_every=3, **hyper)


def assert_close(expected: dict[Any, torch.Tensor], actual: dict[Any, torch.Tensor]) -> None:
    assert expected.keys() == actual.keys()
    for key, value in expected.items():
        assert not value.isnan().any(), key
        assert relative_error(value, actual[key]) < 1e-9, key


def by_key(values: dict[Role, torch.Tensor]) -> dict[tuple[str, str], torch.Tensor]:
    return {(role.kind, key): value for role, value in values.items() for key in role.keys}


def run_slice(c: Compilation, inputs: dict[Role, torch.Tensor], due: tuple[str, ...]) -> dict[Role, torch.Tensor]:
    part = c.lowered.slice(due)
    given = by_key(inputs)
    return dict(zip(part.outputs, part.function(*(given[r.kind, r.key] for r in part.inputs)), strict=True))


def test_numeric_check_holds(program: Program) -> None:
    c = compiled(program, check="numeric")
    assert [record.name for record in c.history] == PIPELINE.split(",")


def test_text_round_trip(program: Program) -> None:
    for record in compiled(program).history:
        again = parse_program(record.text)
        verify(again)
        assert again.text(f"after {record.name}") == record.text


def test_sink_measures_the_same(program: Program) -> None:
    inputs = random_inputs(program)
    before = interpret(program, inputs)
    c = compiled(program.copy(), "sink")
    assert c.program is not None
    assert_close(before, interpret(c.program, measured(c.program, inputs)))


@pytest.mark.parametrize("due", DUE, ids=lambda due: "+".join(due) or "nothing")
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_slices_agree_with_the_interpreter(program: Program, due: tuple[str, ...], backend: str) -> None:
    c = compiled(program, options={"backend": backend})
    assert c.program is not None
    inputs = random_inputs(c.program)
    expected = interpret(c.program, inputs, due)
    kept = {role for role in expected if role.kind == "state" and expected[role] is by_key(inputs)["state", role.key]}
    assert_close({role: value for role, value in expected.items() if role not in kept}, run_slice(c, inputs, due))


def test_no_read_across_cadences(program: Program) -> None:
    c = compiled(program, "sink,share,cadence")
    assert c.program is not None
    for node in [*c.program.nodes, *c.program.placeholders]:
        switch = node.target is OPS["on_due"]
        if node.meta["every"] == STEP or switch or (node.op == "placeholder" and node.meta["role"].kind != "stat"):
            continue
        for user in node.users:
            if user.op == "output":
                roles = [role for role, value in c.program.outputs().items() if value is node]
                assert {role.kind for role in roles} <= {"flag", "info"}, node.name
            else:
                assert user.meta["every"] == node.meta["every"], f"%{user.name} reads %{node.name}"


# --- an independent meaning of cadence: a value that is not due is the one of the last time it was ----------------


def held_step(
    program: Program, given: dict[tuple[str, str], torch.Tensor], due: set[str], held: dict[fx.Node, Any]
) -> dict[tuple[str, str], torch.Tensor]:
    values: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = given[node.meta["role"].kind, node.meta["role"].key]
        elif node.op == "call_function":
            operands = fx.node.map_arg(node.args, values.__getitem__)
            if node.target is OPS["on_due"]:
                values[node] = operands[0] if node.meta["every"] in due else operands[1]
            elif node.meta["every"] not in due:
                values[node] = held[node]
            elif node.target is operator.getitem:
                values[node] = operands[0][operands[1]]
            else:
                values[node] = node.target(*operands)
            held[node] = values[node]
    return {(role.kind, key): values[node] for role, node in program.outputs().items() for key in role.keys}


def test_slices_follow_the_schedule(program: Program) -> None:
    """Seven steps, statistics every 2 and factorisations every 3: updates are those of values held until due."""
    plain = compiled(program.copy(), "sink").program
    c = compiled(program)
    assert plain is not None and c.program is not None
    first = by_key(random_inputs(c.program) | random_inputs(plain))
    for role in [*plain.inputs("state"), *c.program.inputs("state")]:
        zeros = torch.zeros_like(first["state", role.key])
        start = torch.eye(zeros.shape[-1], dtype=zeros.dtype).expand_as(zeros) if role.init == "eye" else zeros
        first |= {("state", key): start + float(role.init == "ones") for key in role.keys}
    old, new, held = dict(first), dict(first), {}
    for step in range(7):
        fresh = by_key({r: v for r, v in random_inputs(plain, seed=step).items() if r.kind in ("grad", "stat")})
        old.update(fresh)
        new.update(fresh)
        due = {STEP} | ({"statistics"} if step % 2 == 0 else set()) | ({"refresh"} if step % 3 == 0 else set())
        expected = held_step(plain, old, due, held)
        actual = by_key(run_slice(c, {Role(*key): value for key, value in new.items()}, tuple(due)))
        updates = {key: value for key, value in expected.items() if key[0] == "update"}
        assert_close(updates, {key: value for key, value in actual.items() if key[0] == "update"})
        old.update({key: value for key, value in expected.items() if key[0] == "state"})
        new.update({key: value for key, value in actual.items() if key[0] == "state"})


# --- sharing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme, solve, count", [("sqrt", "inverse", 4), ("eigenvalue", "eigh", 4), ("pi", "inverse", 6)]
)
def test_share_attention(scheme: str, solve: str, count: int) -> None:
    """q, k, v: one slot, one average and, where the damping allows it, one factorisation of the input side."""
    c = compiled(build("kfac", attention(), damping_scheme=scheme), "sink,share,cadence", check="numeric")
    assert c.program is not None
    stats = [role.key for role in c.program.inputs("stat")]
    assert stats.count("gram(q.a)") == 1 and not any(key in stats for key in ("gram(k.a)", "gram(v.a)"))
    assert ("q.A", "k.A", "v.A") in keys(c.program.inputs(), "state")
    assert ops(c.program).count(solve) == count
    assert ops(c.program).count("ema") == 4
    inverses = [role for role in keys(c.program.inputs(), "state") if role[0].endswith("A.inverse")]
    if scheme == "pi":
        assert sorted(inverses) == [("k.A.inverse",), ("q.A.inverse",), ("v.A.inverse",)]
    if scheme == "sqrt":
        assert inverses == [("q.A.inverse", "k.A.inverse", "v.A.inverse")]


def test_share_keeps_other_inputs_apart() -> None:
    c = compiled(build("kfac", facts(linear("q", 3, 4), linear("k", 3, 4))), "sink,share")
    assert c.program is not None
    assert {("q.A",), ("k.A",), ("q.G",), ("k.G",)} <= keys(c.program.inputs(), "state")


def test_names_of_nested_layers() -> None:
    """The name of one layer may begin the name of another that shares its input."""
    model = facts(linear("attn", 3, 4), linear("attn.out", 3, 4, "attn"))
    c = compiled(build("kfac", model), "sink,share,cadence")
    assert c.program is not None
    states = keys(c.program.inputs(), "state")
    assert {("attn.A", "attn.out.A"), ("attn.A.inverse",), ("attn.out.A.inverse",)} <= states


# --- fuel, disabling, pipeline text ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_fuel(method: str) -> None:
    model = attention()
    full = sum(record.rewrites for record in compiled(build(method, model), "sink,share,simplify").history)
    assert full > 10
    for fuel in range(0, full + 3, 3):
        c = compiled(build(method, model), PIPELINE, fuel=fuel, check="numeric")
        spent = sum(record.rewrites for record in c.history if record.name in ("sink", "share", "simplify"))
        assert spent == min(fuel, full)
        assert c.lowered.slice(("statistics", "refresh")).outputs


def test_disabled() -> None:
    c = compiled(build("kfac", attention()), "sink,share,simplify", disabled=("share",))
    assert [record.name for record in c.history] == ["sink", "simplify"]
    assert c.program is not None and ("k.A",) in keys(c.program.inputs(), "state")


def test_parse_pipeline() -> None:
    assert parse_pipeline("sink, share{states=false},cadence", PASSES) == (Sink(), Share(states=False), Cadence())
    assert parse_pipeline("", PASSES) == ()


@pytest.mark.parametrize(
    "text, message",
    [
        ("sink,shere", "there is no pass 'shere'; did you mean 'share'?"),
        ("zzz", "there is no pass 'zzz'; there are detect"),
        ("share{stats=1}", "pass 'share' has no option 'stats'; it has states."),
        ("sink{x=1}", "pass 'sink' has no option 'x'; it has none."),
        ("sink share", "is not a pass"),
        ("share{states", "is not a pass"),
    ],
)
def test_parse_pipeline_errors(text: str, message: str) -> None:
    with pytest.raises(FxcurvError, match="^[^\n]*$") as error:
        parse_pipeline(text, PASSES)
    assert message in str(error.value)


def test_missing_input() -> None:
    with pytest.raises(FxcurvError, match="pass 'build' needs a model, which this compilation does not have"):
        compiled(build("sgd", attention()), "build")


def test_broken_pass_is_caught() -> None:
    class Negate(Pass):
        name = "negate"

        def run(self, c: Compilation) -> int:
            assert c.program is not None
            node = next(node for node in c.program.nodes if node.target is OPS["kron_apply"])
            node.args = (node.args[0], node.args[2], node.args[1])
            return 1

    square = facts(linear("fc", 3, 4))  # both sides 4 wide: the types cannot tell
    with pytest.raises(FxcurvError, match=r"pass 'negate' changed the output update\['fc.bias'\]"):
        run_passes(Compilation(program=build("kfac", square), check="numeric"), (Negate(),))
    uneven = facts(linear("fc", 3, 5))
    with pytest.raises(FxcurvError, match="after pass 'negate': %kron_apply: operand 'GI'"):
        run_passes(Compilation(program=build("kfac", uneven)), (Negate(),))


# --- speed ----------------------------------------------------------------------------------------------------------


def test_speed_of_200_layers() -> None:
    """Build and pipeline of a 200-layer program take under a second of processor time; twice that on a busy machine."""
    model = facts(*(linear(f"layer{i}", 4 + i % 7, 3 + i % 5) for i in range(200)))

    def once() -> float:
        start = time.process_time()
        c = compiled(build("kfac", model))
        assert c.program is not None and len(c.program) > 3000
        return time.process_time() - start

    assert any(once() < 2.0 for _ in range(3))


def test_speed_of_verify() -> None:
    program = compiled(build("kfac", facts(*(linear(f"layer{i}", 4, 3) for i in range(100))))).program
    assert program is not None and len(list(program.graph.nodes)) > 3000

    def once() -> float:
        start = time.process_time()
        verify(program)
        return time.process_time() - start

    assert any(once() < 0.2 for _ in range(3))
