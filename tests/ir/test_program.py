"""Programs: text that reads back, and a verifier that names what is wrong."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import fx

import fxcurv.ir.ops  # noqa: F401  (registers the ops)
from fxcurv.errors import FxcurvError
from fxcurv.ir.program import Builder, Program, Role
from fxcurv.ir.statistic import Call, RowsOf, StateOf, leaves, parse_statistic, state_keys
from fxcurv.ir.text import parse_program, print_program
from fxcurv.ir.types import Mat, Psd, Scalar, Tensor, Vec
from fxcurv.ir.verify import verify

TEXT = """update {
  cadence statistics=2, refresh=10
  %a : Rows[?,?,1,3] = stat['fc.a'] every=statistics
  %w : Scalar[]:f64 = stat['weight'] every=statistics
  %A : Psd[3] = state['fc.A', 'other.A'] init=zeros @fc,other
  %Q : Orth[3] = state['fc.Q'] init=eye @fc
  %k : Scalar[]:f64 = hyper['ema']
  %g : Tensor[2,3] = grad['fc.weight'] @fc
  %o : Scalar[] = oracle['hessian']
  %gram : Psd[3] = gram(%a) every=statistics @fc
  %scaled : Psd[3] = scale(%gram, -0.125) every=statistics @fc
  %ema : Psd[3] = ema(%A, %scaled, %k) every=statistics @fc,other
  %eigh : (Vec[3], Orth[3]) = eigh(%ema, False) every=refresh @fc
  %values : Vec[3] = %eigh[0] every=refresh @fc
  %basis : Orth[3] = %eigh[1] every=refresh @fc
  %kept : Orth[3] = on_due(%basis, %Q) every=refresh @fc
  %matrix : Mat[2,3] = matricize(%g, [0, 1], [2, 3]) @fc
  %turned : Mat[2,3] = right_apply(%matrix, %kept) @fc
  %u : Tensor[2,3] = tensorize(%turned, [0, 1], [2, 3]) @fc
  %ok : Scalar[]:bool = finite([%u, %matrix]) @fc
  yield update['fc.weight'] = %u
  yield state['fc.A', 'other.A'] = %ema
  yield state['fc.Q'] = %kept
  yield flag['fc:step'] = %ok
  yield info['values'] = %values
}"""


def test_round_trip() -> None:
    program = parse_program(TEXT)
    verify(program)
    assert print_program(program) == TEXT
    assert program.cadences == {"step": 1, "statistics": 2, "refresh": 10}
    assert Role("state", "fc.Q", "eye") in program.outputs()
    assert program.inputs("state").keys() == program.outputs("state").keys()
    assert print_program(program.copy()) == TEXT


def test_note_and_comments_are_ignored() -> None:
    noted = print_program(parse_program(TEXT), "after share, 'quoted' # twice")
    assert noted.splitlines()[0].startswith("update {  # after share")
    assert print_program(parse_program(noted + "\nwhatever follows")) == TEXT
    commented = TEXT.replace(" every=refresh @fc\n", " every=refresh @fc  # %A : 'x'\n").replace("fc.A", "fc#A")
    assert print_program(parse_program(commented)) == TEXT.replace("fc.A", "fc#A")


@pytest.mark.parametrize(
    "old, new, line, message",
    [
        ("gram(%a)", "gram(%b)", 10, "b is not defined above"),
        ("gram(%a)", "frob(%a)", 10, "there is no op named 'frob'"),
        ("gram(%a)", "gram(%a", 10, "is not a role"),
        ("Psd[3] = gram", "Pds[3] = gram", 10, "'Pds[3]' is not a type"),
        ("%gram : Psd", "%a : Psd", 10, "%a is defined twice"),
        ("%gram : Psd[3] = gram(%a)", "gram(%a)", 10, "a node reads"),
        ("[0, 1], [2, 3]) @fc\n  %turned", "[0, 1], [2, 3 @fc\n  %turned", 17, ""),
        ("hyper['ema']", "hypr['ema']", 7, "'hypr['ema']' is not a role"),
        ("yield update['fc.weight'] = %u", "yield update['fc.weight']", 21, "a yield reads"),
        ("yield update['fc.weight'] = %u", "yield grad['fc.weight'] = %u", 21, "is not a role"),
        ("yield flag['fc:step'] = %ok", "yield info['values'] = %ok", 25, "info['values'] is yielded twice"),
        ("refresh=10", "refresh", 2, ""),
    ],
)
def test_parse_errors_name_the_line(old: str, new: str, line: int, message: str) -> None:
    assert old in TEXT
    with pytest.raises(FxcurvError) as error:
        parse_program(TEXT.replace(old, new))
    assert str(error.value).startswith(f"line {line}: ") and message in str(error.value)


def test_unclosed_text() -> None:
    with pytest.raises(FxcurvError, match="no closing brace"):
        parse_program(TEXT[:-1])


# --- the verifier ---------------------------------------------------------------------------------------------------

Damage = Callable[[Program, dict[str, fx.Node]], None]


def meta(name: str, **changes: object) -> Damage:
    return lambda p, n: n[name].meta.update(changes)


def role(name: str, *args: object) -> Damage:
    return meta(name, role=Role(*args))  # type: ignore[arg-type]


def outputs(change: Callable[[dict[Role, fx.Node], dict[str, fx.Node]], dict[Role, fx.Node]]) -> Damage:
    return lambda p, n: p.set_outputs(change(p.outputs(), n))


def retarget(name: str, target: object) -> Damage:
    def damage(p: Program, n: dict[str, fx.Node]) -> None:
        n[name].target = target  # type: ignore[assignment]

    return damage


def operands(name: str, *args: object) -> Damage:
    def damage(p: Program, n: dict[str, fx.Node]) -> None:
        n[name].args = tuple(n[a] if isinstance(a, str) else a for a in args)  # type: ignore[assignment]

    return damage


def keyword(p: Program, n: dict[str, fx.Node]) -> None:
    n["gram"].kwargs = {"x": n["a"]}


def late(p: Program, n: dict[str, fx.Node]) -> None:
    n["turned"].append(n["matrix"])


def after_output(p: Program, n: dict[str, fx.Node]) -> None:
    p.output.append(n["ok"])


def foreign(p: Program, n: dict[str, fx.Node]) -> None:
    with p.graph.inserting_before(n["gram"]):
        p.graph.get_attr("weight")


def lost_role(p: Program, n: dict[str, fx.Node]) -> None:
    p.output.meta["roles"] = p.output.meta["roles"][1:]


def no_output(p: Program, n: dict[str, fx.Node]) -> None:
    p.graph.erase_node(p.output)


STATE_A = Role("state", "fc.A", "zeros", ("other.A",))
BROKEN: list[tuple[str, Damage, str]] = [
    ("type missing", lambda p, n: n["gram"].meta.pop("type"), "%gram has no type"),
    ("every missing", lambda p, n: n["a"].meta.pop("every"), "%a has no every"),
    ("owner missing", lambda p, n: n["u"].meta.pop("owner"), "%u has no owner"),
    ("no type", meta("gram", type="Psd[3]"), "%gram has 'Psd[3]' for a type"),
    ("wrong type", meta("scaled", type=Mat((3, 3))), "%scaled says it is Mat[3,3] but its op gives Psd[3]"),
    ("wrong dtype", meta("scaled", type=Psd((3, 3), torch.float64)), "%scaled says it is Psd[3]:f64"),
    ("wrong item type", meta("values", type=Vec((4,))), "%values says it is Vec[4]"),
    ("cadence", meta("gram", every="monthly"), "%gram has cadence 'monthly'; the program knows step, statistics"),
    ("owner text", meta("gram", owner="fc"), "%gram has 'fc' for owners"),
    ("operands", operands("ema", "A", "g", "k"), "%ema: operand 'new' of op 'ema' must be a Psd"),
    ("arity", operands("ema", "A"), "%ema: ema(Psd[3]) does not fit its schema"),
    ("item", operands("values", "eigh", 2), "%values takes a result that %eigh does not have"),
    ("item of one", operands("values", "ema", 0), "%values takes a result that %ema does not have"),
    ("foreign function", retarget("gram", torch.relu), "%gram calls"),
    ("foreign op", retarget("values", operator.add), "which is not a registered op"),
    ("keyword", keyword, "%gram has keyword operands"),
    ("order", late, "%turned reads %matrix before it is defined"),
    ("end", after_output, "%output reads %ok before it is defined"),
    ("attribute", foreign, "is a 'get_attr' node"),
    ("input kind", role("k", "hypr", "ema"), "input %k has role hypr['ema']"),
    ("no role", meta("k", role=None), "input %k has role None"),
    ("empty key", role("k", "hyper", ""), "with an empty key"),
    ("same input twice", role("k", "stat", "weight"), "%k and %w are both stat['weight']"),
    ("same name twice", role("Q", "state", "other.A", "eye"), "%Q and %A are both state['other.A']"),
    ("init", role("Q", "state", "fc.Q", "random"), "init='random'"),
    ("eye", meta("k", role=Role("state", "k", "eye")), "%k is Scalar[]:f64, which cannot start as init=eye"),
    ("statistic", role("a", "stat", "gram(fc.a"), "%a: 'gram(fc.a' is not a statistic"),
    ("tap without state", role("a", "stat", "gram(fc.a, $fc.R)"), "%a is measured with the state 'fc.R'"),
    ("output kind", outputs(lambda o, n: {**o, Role("grad", "x"): n["u"]}), "an output has role grad['x']"),
    (
        "yielded twice",
        outputs(lambda o, n: {**o, Role("state", "other.A"): n["ema"]}),
        "state['other.A'] is yielded twice",
    ),
    (
        "no placeholder",
        outputs(lambda o, n: {**o, Role("state", "fc.B"): n["ema"]}),
        "state['fc.B'] has no placeholder",
    ),
    ("state type", outputs(lambda o, n: {**o, STATE_A: n["kept"]}), "is Psd[3] but its next value %kept is Orth[3]"),
    (
        "state names",
        outputs(lambda o, n: {(Role("state", "fc.A", "zeros") if r == STATE_A else r): v for r, v in o.items()}),
        "differ in their further names or init",
    ),
    (
        "several results",
        outputs(lambda o, n: {**o, Role("info", "e"): n["eigh"]}),
        "is %eigh, which has several results",
    ),
    ("no node", outputs(lambda o, n: {**o, Role("info", "e"): 1.0}), "info['e'] is 1.0"),  # type: ignore[dict-item]
    (
        "update shape",
        outputs(lambda o, n: {**o, Role("update", "fc.weight"): n["values"]}),
        "but its gradient is Tensor[2,3]",
    ),
    ("roles", lost_role, "does not list one role for every value"),
    ("no output", no_output, "it has no output node"),
]


@pytest.mark.parametrize("damage, message", [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_verify_names_node_and_rule(damage: Damage, message: str) -> None:
    program = parse_program(TEXT)
    damage(program, {node.name: node for node in program.graph.nodes})
    with pytest.raises(FxcurvError) as error:
        verify(program, "after pass 'x'")
    text = str(error.value)
    assert text.startswith("after pass 'x': ") and message in text and "\n" not in text


# --- building, pruning -----------------------------------------------------------------------------------------------


def test_builder_puts_inputs_first() -> None:
    b = Builder({"statistics": 3})
    g = b.input("grad", "w", Tensor((2, 3)))
    squared = b.square(g)
    with b.within(at="statistics", owner=("fc",)):
        s = b.input("state", "fc.s", Tensor((2, 3)), init="zeros")
        new = b.add(s, squared)
    late_input = b.input("hyper", "lr", Scalar())
    b.give("update", "w", b.scale(g, late_input))
    b.give("state", "fc.s", new)
    program = b.finish()
    verify(program)
    assert [node.op for node in program.graph.nodes] == ["placeholder"] * 3 + ["call_function"] * 3 + ["output"]
    assert new.meta["every"] == "statistics" and new.meta["owner"] == ("fc",)
    assert print_program(parse_program(program.text())) == program.text()
    with pytest.raises(FxcurvError, match="grad\\['w'\\] is read as Tensor\\[2,3\\] and as Tensor\\[3,2\\]"):
        b.input("grad", "w", Tensor((3, 2)))


def test_prune_keeps_states_that_are_yielded_or_tapped() -> None:
    program = parse_program(
        """update {
          %S : Mat[2,3] = stat['second_moment(fc.a, fc.g, $fc.QA, $fc.QG)']
          %T : Mat[2,3] = stat['second_moment(fc.a, fc.g, $fc.RA, $fc.RG)']
          %QA : Orth[3] = state['fc.QA'] init=eye
          %QG : Orth[2] = state['x', 'fc.QG'] init=eye
          %RA : Orth[3] = state['fc.RA'] init=eye
          %RG : Orth[2] = state['fc.RG'] init=eye
          %last : Mat[2,3] = state['last'] init=zeros
          %unread : Scalar[] = hyper['unread']
          %dead : Mat[2,3] = scale(%T, %unread)
          %deader : Mat[2,3] = neg(%dead)
          %u : Mat[2,3] = neg(%S)
          yield state['last'] = %u
        }"""
    )
    verify(program)
    assert program.prune() == 6
    verify(program)
    assert [node.name for node in program.placeholders] == ["S", "QA", "QG", "last"]
    assert [node.name for node in program.nodes] == ["u"]


# --- statistics ------------------------------------------------------------------------------------------------------


def test_statistic_expressions() -> None:
    text = "second_moment(net.fc.a, net.fc.g, $net.fc.QA, $QG)"
    expression = parse_statistic(text)
    assert expression == Call(
        "second_moment", (RowsOf("net.fc", "a"), RowsOf("net.fc", "g"), StateOf("net.fc.QA"), StateOf("QG"))
    )
    assert str(expression) == text
    assert [str(leaf) for leaf in leaves(expression)] == ["net.fc.a", "net.fc.g", "$net.fc.QA", "$QG"]
    assert state_keys(text) == ("net.fc.QA", "QG")
    assert str(parse_statistic("gram(mean_positions(fc.a))")) == "gram(mean_positions(fc.a))"
    assert parse_statistic("fc.g2") == RowsOf("fc", "g2")
    assert parse_statistic("weight") is None and state_keys("weight") == ()


@pytest.mark.parametrize("text", ["gram(fc.a", "gram(fc.a))", "gram(fc.a) x", "gram(fc.a b(", "gram(", "gram(weight)"])
def test_bad_statistics(text: str) -> None:
    with pytest.raises(FxcurvError, match="is not a statistic"):
        parse_statistic(text)
