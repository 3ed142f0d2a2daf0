"""Rewrite rules: what matches, what does not, and that rewriting ends."""

from __future__ import annotations

import pytest
from torch import fx

import fxcurv.ir.ops  # noqa: F401  (registers the ops)
from fxcurv.errors import FxcurvError
from fxcurv.ir.program import Program
from fxcurv.ir.rules import ROOT, Rule, apply_rules, same_type
from fxcurv.ir.text import parse_program
from fxcurv.ir.verify import verify

HEAD = """update {
  cadence statistics=2
  %a : Vec[3] = grad['a']
  %b : Vec[3] = grad['b']
  %k : Scalar[] = hyper['k']
"""


def program(body: str, *yields: str) -> Program:
    outputs = "\n".join(f"yield {line}" for line in yields)
    parsed = parse_program(f"{HEAD}{body}\n{outputs}\n}}")
    verify(parsed)
    return parsed


def calls(p: Program) -> list[str]:
    """Ops with their operands, as text."""
    return [f"{node.target.name}({', '.join(map(str, node.args))})" for node in p.nodes]


def rewrite(body: str, *rules: Rule, out: str = "update['a'] = %r") -> list[str]:
    p = program(body, out)
    apply_rules(p, rules)
    verify(p)
    p.prune()
    return calls(p)


def test_nested_pattern_and_variables() -> None:
    rule = Rule("add(square(x), mul(x, y))", "mul(x, add(x, y))")
    body = """%s : Vec[3] = square(%a)
    %m : Vec[3] = mul(%a, %b)
    %r : Vec[3] = add(%s, %m)"""
    assert rewrite(body, rule) == ["add(a, b)", "mul(a, add)"]


def test_repeated_variable_is_one_node() -> None:
    rule = Rule("add(square(x), mul(x, y))", "mul(x, add(x, y))")
    body = """%s : Vec[3] = square(%b)
    %m : Vec[3] = mul(%a, %b)
    %r : Vec[3] = add(%s, %m)"""
    assert rewrite(body, rule) == ["square(b)", "mul(a, b)", "add(s, m)"]


def test_not_commutative() -> None:
    body = """%s : Vec[3] = square(%a)
    %r : Vec[3] = add(%b, %s)"""
    assert rewrite(body, Rule("add(square(x), y)", "y")) == ["square(a)", "add(b, s)"]
    assert rewrite(body, Rule("add(y, square(x))", "mul(y, x)")) == ["mul(b, a)"]


@pytest.mark.parametrize(
    "given, wanted, equal",
    [("2.0", "2.0", True), ("2", "2.0", True), ("2.5", "2.0", False), ("-2.0", "2.0", False), ("1", "True", False)],
)
def test_literals(given: str, wanted: str, equal: bool) -> None:
    body = f"""%s : Vec[3] = scale(%a, {given})
    %r : Vec[3] = square(%s)"""
    assert (rewrite(body, Rule(f"scale(x, {wanted})", "x")) == ["square(a)"]) is equal


def test_negative_literals_lists_and_variables_for_literals() -> None:
    body = """%m : Mat[3,1] = matricize(%a, [0], [3, 1])
    %t : Tensor[3] = tensorize(%m, [0], [3])
    %n : Mat[1,3] = matricize(%t, [0], [1, 3])
    %r : Tensor[3] = tensorize(%n, [0], [3])"""
    bound = Rule("matricize(tensorize(x, p, t), p, s)", "matricize(tensorize(x, p, t), p, s)", when=lambda b: False)
    assert len(rewrite(body, bound)) == 4
    rule = Rule("matricize(tensorize(matricize(x, p, s), p, t), p, u)", "matricize(x, p, u)")
    assert rewrite(body, rule) == ["matricize(a, [0], [1, 3])", "tensorize(matricize, [0], [3])"]
    fixed = Rule("matricize(x, [0], [3, 1])", "matricize(x, [0], [3, 1])", when=lambda b: False)
    assert len(rewrite(body, fixed)) == 4
    assert rewrite("%s : Vec[3] = scale(%a, -1.0)\n%r : Vec[3] = square(%s)", Rule("scale(x, -1.0)", "neg(x)")) == [
        "neg(a)",
        "square(neg)",
    ]


def test_several_results() -> None:
    p = parse_program(
        """update {
          %A : Diag[3] = stat['A']
          %e : (Vec[3], Diag[3]) = eigh(%A)
          %v : Vec[3] = %e[0]
          %q : Diag[3] = %e[1]
          %r : Vec[3] = square(%v)
          yield info['r'] = %r
          yield info['q'] = %q
        }"""
    )
    seen: list[fx.Node] = []
    rule = Rule("square(eigh(x)[0])", "mul(eigh(x)[0], eigh(x)[0])", when=lambda b: seen.append(b["x"]) or True)
    assert apply_rules(p, [rule]) == 1
    verify(p)
    assert seen[0].name == "A"
    assert [getattr(n.target, "name", "item") for n in p.nodes].count("eigh") == 3  # the old one is still read


def test_interior_that_others_read_stays() -> None:
    p = program(
        """%s : Vec[3] = scale(%a, 3.0)
        %r : Vec[3] = square(%s)""",
        "update['a'] = %r",
        "info['s'] = %s",
    )
    assert apply_rules(p, [Rule("square(scale(x, 3.0))", "scale(square(x), 9.0)")]) == 1
    assert calls(p) == ["scale(a, 3.0)", "square(a)", "scale(square, 9.0)"]


def test_new_nodes_take_cadence_and_owner() -> None:
    p = program("%r : Vec[3] = square(%a) every=statistics @fc,conv", "info['r'] = %r")
    apply_rules(p, [Rule("square(x)", "mul(x, x)")])
    (node,) = p.nodes
    assert node.meta["every"] == "statistics" and node.meta["owner"] == ("fc", "conv")


def test_value_that_remains_takes_the_owner() -> None:
    p = program("%s : Vec[3] = square(%a) @a\n%r : Vec[3] = scale(%s, 1.0) @b", "update['a'] = %r")
    apply_rules(p, [Rule("scale(x, 1.0)", "x")])
    (node,) = p.nodes
    assert node.meta["owner"] == ("a", "b")


@pytest.mark.parametrize("inner, outer", [("statistics", "step"), ("step", "statistics")])
def test_no_match_across_cadences(inner: str, outer: str) -> None:
    body = f"""%s : Vec[3] = neg(%a) every={inner}
    %t : Vec[3] = neg(%s) every={outer}
    %r : Vec[3] = square(%t)"""
    assert len(rewrite(body, Rule("neg(neg(x))", "x"))) == 3


def test_value_of_another_cadence_stands_in_only_for_readers_of_this_one() -> None:
    rule = Rule("scale(x, 1.0)", "x")
    kept = "%s : Vec[3] = scale(%a, 1.0) every=statistics\n%r : Vec[3] = square(%s)"
    assert len(rewrite(kept, rule)) == 2
    free = "%s : Vec[3] = scale(%a, 1.0) every=statistics\n%r : Vec[3] = square(%s) every=statistics"
    assert rewrite(free, rule, out="info['r'] = %r") == ["square(a)"]


def test_outputs_stay_tensors_of_their_own() -> None:
    rule = Rule("scale(x, 1.0)", "x")
    assert rewrite("%r : Vec[3] = scale(%a, 1.0)", rule) == ["scale(a, 1.0)"]
    p = program("%s : Vec[3] = square(%a)\n%r : Vec[3] = scale(%s, 1.0)", "update['a'] = %r", "info['s'] = %s")
    assert apply_rules(p, [rule]) == 0


def test_fixed_point_and_count() -> None:
    body = "\n".join(f"%n{i} : Vec[3] = neg(%{'a' if i == 0 else f'n{i - 1}'})" for i in range(6))
    p = program(f"{body}\n%r : Vec[3] = square(%n5)", "update['a'] = %r")
    assert apply_rules(p, [Rule("neg(neg(x))", "x")]) == 3
    assert calls(p) == ["square(a)"]


def test_a_rewrite_enables_a_later_one() -> None:
    """The deep operand of a pattern appears only when another rule has made it."""
    rules = [Rule("square(x)", "mul(x, x)"), Rule("neg(neg(mul(x, x)))", "mul(x, x)")]
    body = """%s : Vec[3] = square(%a)
    %t : Vec[3] = neg(%s)
    %u : Vec[3] = neg(%t)
    %r : Vec[3] = scale(%u, 2.0)"""
    assert rewrite(body, *rules) == ["mul(a, a)", "scale(mul_1, 2.0)"]


def test_new_nodes_are_rewritten_in_turn() -> None:
    """Of a replacement the operands first, then the whole, then its readers."""
    rules = [
        Rule("square(x)", "neg(neg(mul(x, x)))"),
        Rule("neg(neg(x))", "x"),
        Rule("scale(mul(x, x), 2.0)", "add(mul(x, x), mul(x, x))"),
    ]
    result = rewrite("%s : Vec[3] = square(%a)\n%r : Vec[3] = scale(%s, 2.0)", *rules)
    assert [call.split("(")[0] for call in result] == ["mul", "mul", "add"]
    grow = Rule("norm(x)", "norm(neg(neg(x)))", when=lambda b: b["x"].op == "placeholder")
    p = program("%n : Scalar[] = norm(%a)\n%r : Vec[3] = scale(%b, %n)", "update['a'] = %r")
    fuel = iter([True, True, False])
    assert apply_rules(p, [grow, rules[1]], lambda: next(fuel)) == 2
    assert calls(p) == ["norm(a)", "scale(b, norm)"]


def test_spend_stops() -> None:
    p = program("%s : Vec[3] = square(%a)\n%t : Vec[3] = square(%b)\n%r : Vec[3] = add(%s, %t)", "update['a'] = %r")
    fuel = iter([True, False])
    assert apply_rules(p, [Rule("square(x)", "mul(x, x)")], lambda: next(fuel)) == 1
    verify(p)
    assert calls(p) == ["mul(a, a)", "square(b)", "add(mul, t)"]


def test_condition_sees_bindings_and_root() -> None:
    seen: dict[str, object] = {}

    def condition(bindings: dict[str, object]) -> bool:
        seen.update(bindings)
        return False

    rewrite("%r : Vec[3] = scale(%a, 0.5)", Rule("scale(x, c)", "x", when=condition))
    assert str(seen["x"]) == "a" and seen["c"] == 0.5 and str(seen[ROOT]) == "r"


def test_changed_type_is_an_error() -> None:
    p = program("%s : Scalar[] = norm(%a)\n%r : Vec[3] = scale(%b, %s)", "update['a'] = %r")
    with pytest.raises(
        FxcurvError, match=r"rule 'norm\(x\) -> square\(x\)' would turn %s from Scalar\[\] into Vec\[3\]"
    ):
        apply_rules(p, [Rule("norm(x)", "square(x)")])
    verify(p)
    with pytest.raises(FxcurvError, match="rule 'bad' would turn"):
        apply_rules(p, [Rule("norm(x)", "x", name="bad")])


def test_same_type() -> None:
    p = parse_program(
        """update {
          %Q : Orth[3] = state['Q'] init=eye
          %m : Mat[3,3] = mul(%Q, 1.0)
          %r : Mat[3,3] = square(%m)
          yield info['r'] = %r
        }"""
    )
    assert apply_rules(p, [Rule("mul(x, 1.0)", "x", when=same_type("x"))]) == 0


def test_endless_rules_are_an_error() -> None:
    p = program("%r : Vec[3] = add(%a, %b)", "update['a'] = %r")
    with pytest.raises(FxcurvError, match="undo one another"):
        apply_rules(p, [Rule("add(x, y)", "add(y, x)")])


@pytest.mark.parametrize(
    "pattern, replacement, message",
    [
        ("frobnicate(x)", "x", "unknown op 'frobnicate'"),
        ("scale(x", "x", "is not a pattern"),
        ("x + y", "x", "is not a pattern"),
        ("scale(x, c=1.0)", "x", "is not a pattern"),
        ("x", "neg(x)", "must match an op"),
        ("neg(x)", "y", "'y', which its pattern does not bind"),
        ("neg(x)", "1.0", "must replace by an op or a variable"),
    ],
)
def test_bad_rules(pattern: str, replacement: str, message: str) -> None:
    with pytest.raises(FxcurvError, match=message):
        Rule(pattern, replacement)
