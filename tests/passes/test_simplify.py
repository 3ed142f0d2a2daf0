"""Every rule of simplify keeps types and values on operands of the types it can meet."""

from __future__ import annotations

import ast
from itertools import product

import pytest

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS
from fxcurv.ir.program import Builder, Program
from fxcurv.ir.rules import Rule
from fxcurv.ir.types import Diag, Mat, Orth, Psd, Rows, Scalar, Sym, Tensor, Type, Vec
from fxcurv.ir.verify import verify
from fxcurv.passes.manager import Compilation
from fxcurv.passes.simplify import RULES, Simplify
from fxcurv.passes.validate import compare
from tests.passes.programs import ops

TYPES: tuple[Type, ...] = (
    Tensor((6,)),
    Tensor((2, 3)),
    Vec((6,)),
    Diag((3,)),
    Mat((2, 3)),
    Mat((6, 1)),
    Psd((3, 3)),
    Sym((3, 3)),
    Orth((3, 3)),
    Scalar(),
    Rows((4, 3, 1, 2)),
)
LITERALS = {"p": ([0], [0, 1], [1, 0]), "s": ([2, 3], [3, 2], [6, 1]), "t": ([6], [2, 3], [3, 2])}


def instances(rule: Rule) -> list[tuple[Program, tuple[Type, ...]]]:
    """Programs that consist of the pattern, over all combinations of types that its ops accept."""
    tree = ast.parse(rule.pattern, mode="eval").body
    names = sorted({n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id not in OPS})
    found = []
    for choice in product(*(LITERALS.get(name, TYPES) for name in names)):
        bound = dict(zip(names, choice, strict=True))
        b = Builder()

        def build(node: ast.expr, b: Builder = b, bound: dict[str, object] = bound) -> object:
            if isinstance(node, ast.Call):
                assert isinstance(node.func, ast.Name)
                return b.emit(OPS[node.func.id], *(build(arg, b, bound) for arg in node.args))
            if isinstance(node, ast.Name):
                value = bound[node.id]
                # a value that is computed, so that it may become an output
                return b.copy(b.input("grad", node.id, value)) if isinstance(value, Type) else value
            return ast.literal_eval(node)

        try:
            root = build(tree)
            b.give("info", "read", b.norm(root))
            found.append((b.finish(), choice))
        except (FxcurvError, RuntimeError):
            continue
    return found


@pytest.mark.parametrize("rule", [r for r in RULES if "on_due" not in r.pattern], ids=lambda rule: rule.name)
def test_rule_keeps_values(rule: Rule) -> None:
    fired = 0
    cases = instances(rule)
    assert cases
    for program, _ in cases:
        after = program.copy()
        c = Compilation(program=after)
        fired += Simplify().run(c) > 0
        verify(after)
        compare(program, after, rule.name, tolerance=1e-15)
    assert fired


def test_dead_code() -> None:
    b = Builder()
    g = b.input("grad", "w", Vec((3,)))
    b.input("hyper", "unread", Scalar())
    b.norm(b.square(g))
    b.give("update", "w", b.neg(g))
    program = b.finish()
    assert Simplify().run(Compilation(program=program)) == 0
    assert ops(program) == ["neg"] and len(program.placeholders) == 1
