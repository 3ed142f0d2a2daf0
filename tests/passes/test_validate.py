"""The validator itself: its inputs are of the right kind, and it notices what it is there to notice."""

from __future__ import annotations

import pytest
import torch

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS
from fxcurv.ir.program import Builder, Program, Role
from fxcurv.ir.text import parse_program
from fxcurv.ir.types import Diag, Mat, Orth, Psd, Rows, Scalar, Sym, Tensor, Tri, Type, Vec
from fxcurv.passes.validate import UNKNOWN, compare, interpret, random_inputs, random_value, relative_error
from tests.passes.programs import attention, build, compiled

EYE = torch.eye(3, dtype=torch.float64)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_kinds(batch: tuple[int, ...]) -> None:
    def draw(cls: type[Type], *core: int | None, kind: str = "state") -> torch.Tensor:
        return random_value(Role(kind, "x"), cls((*batch, *core)))

    psd = draw(Psd, 3, 3)
    assert torch.equal(psd, psd.mT) and bool((torch.linalg.eigvalsh(psd) > 0).all())
    sym = draw(Sym, 3, 3)
    assert torch.equal(sym, sym.mT) and bool((torch.linalg.eigvalsh(sym) < 0).any())
    orth = draw(Orth, 3, 3)
    torch.testing.assert_close(orth @ orth.mT, EYE.expand(*batch, 3, 3))
    tri = draw(Tri, 3, 3)
    assert torch.equal(tri, tri.tril()) and bool((tri.diagonal(dim1=-2, dim2=-1) > 0).all())
    assert bool((draw(Diag, 7) > 0).all()) and bool((draw(Mat, 4, 5) > 0).all())
    assert bool((draw(Mat, 4, 5, kind="grad") < 0).any())


def test_sizes_dtypes_and_scalars() -> None:
    rows = random_value(Role("stat", "fc.a"), Rows((None, None, 1, 3)))
    assert rows.shape == (UNKNOWN, UNKNOWN, 1, 3) and bool((rows < 0).any())
    count = random_value(Role("stat", "count(fc.a)"), Scalar())
    assert count == count.round() and count >= 1
    ema = random_value(Role("hyper", "ema"), Scalar())
    assert 0 < ema < 1 and ema.dtype == torch.float64
    declared = random_value(Role("hyper", "ema"), Scalar((), torch.float32), double=False)
    assert declared.dtype == torch.float32
    assert random_value(Role("flag", "x"), Scalar((), torch.bool)).dtype == torch.bool


def test_values_depend_on_role_and_seed_only() -> None:
    def draw(key: str, seed: int) -> torch.Tensor:
        return random_value(Role("grad", key), Vec((3,)), seed)

    assert torch.equal(draw("a", 0), draw("a", 0))
    assert not torch.equal(draw("a", 0), draw("b", 0)) and not torch.equal(draw("a", 0), draw("a", 1))


def on_due() -> Program:
    return parse_program(
        """update {
          cadence statistics=2, refresh=4
          %x : Vec[3] = state['x'] init=zeros
          %g : Vec[3] = grad['w']
          %s : Vec[3] = square(%g) every=statistics
          %d : Vec[3] = on_due(%s, %x) every=statistics
          %r : Vec[3] = neg(%d) every=refresh
          %f : Scalar[]:bool = finite([%s]) every=statistics
          yield state['x'] = %d
          yield info['r'] = %r
          yield flag['w:statistics'] = %f
        }"""
    )


def test_interpret_due() -> None:
    program = on_due()
    x, g = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, -5.0, 6.0])
    inputs = {Role("state", "x", "zeros"): x, Role("grad", "w"): g}

    def run(*due: str) -> dict[str, list[float] | bool]:
        return {str(role): value.tolist() for role, value in interpret(program, inputs, due).items()}

    assert run() == {"state['x']": [1, 2, 3]}
    assert run("statistics") == {"state['x']": [16, 25, 36], "flag['w:statistics']": True}
    assert run("refresh") == {"state['x']": [1, 2, 3], "info['r']": [-1, -2, -3]}
    everything = {"state['x']": [16, 25, 36], "info['r']": [-16, -25, -36], "flag['w:statistics']": True}
    assert run("statistics", "refresh") == everything
    assert {str(role): value.tolist() for role, value in interpret(program, inputs).items()} == everything


def test_interpret_refuses_what_is_not_due() -> None:
    program = on_due()
    update = next(node for node in program.nodes if node.name == "s")
    program.set_outputs({Role("update", "w"): update})
    with pytest.raises(FxcurvError, match="%s is evaluated every statistics but read in a step without it"):
        interpret(program, random_inputs(program), ())


def test_interpret_needs_its_inputs() -> None:
    with pytest.raises(FxcurvError, match="there is no value for the input grad\\['w'\\]"):
        interpret(on_due(), {Role("state", "x"): torch.ones(3)})


def test_oracles_are_left_out() -> None:
    program = build("adahessian", attention())
    outputs = interpret(program, random_inputs(program))
    assert {role.kind for role in outputs} == {"state"}  # counters, and averages of the plain gradient
    assert all(role.key.endswith((".updates", ".m")) for role in outputs)
    compare(program, program.copy(), "nothing")


def changed(program: Program, name: str, target: str) -> Program:
    other = program.copy()
    next(node for node in other.nodes if node.name == name).target = OPS[target]
    return other


def test_compare_notices() -> None:
    b = Builder()
    g = b.input("grad", "w", Tensor((3,)))
    b.give("update", "w", b.square(g))
    b.give("info", "n", b.norm(g))
    program = b.finish()
    compare(program, program.copy(), "same")
    with pytest.raises(FxcurvError, match=r"pass 'p' changed the output update\['w'\]: the relative error is \d"):
        compare(program, changed(program, "square", "neg"), "p")
    small = program.copy()
    small.set_outputs({role: node for role, node in small.outputs().items() if role.kind == "update"})
    with pytest.raises(FxcurvError, match=r"pass 'p' lost the output info\['n'\]"):
        compare(program, small, "p")
    compare(small, program, "more outputs are no error")


def test_compare_sees_nan_and_shapes() -> None:
    one = torch.tensor([1.0, float("nan")])
    assert relative_error(one, one) == 0
    assert relative_error(one, torch.tensor([1.0, 2.0])) == float("inf")
    assert relative_error(torch.ones(2), torch.ones(2, 1)) == float("inf")
    assert relative_error(torch.tensor(True), torch.tensor(False)) == 1


def test_compare_wrong_merge() -> None:
    """A pass that merges states which do not follow each other is found, because their next values differ."""
    before = parse_program(
        """update {
          %g : Vec[3] = grad['w']
          %a : Vec[3] = state['a'] init=zeros
          %b : Vec[3] = state['b'] init=zeros
          %na : Vec[3] = add(%a, %g)
          %nb : Vec[3] = sub(%b, %g)
          yield state['a'] = %na
          yield state['b'] = %nb
        }"""
    )
    after = parse_program(
        """update {
          %g : Vec[3] = grad['w']
          %a : Vec[3] = state['a', 'b'] init=zeros
          %na : Vec[3] = add(%a, %g)
          yield state['a', 'b'] = %na
        }"""
    )
    with pytest.raises(FxcurvError, match=r"changed the output state\['b'\]"):
        compare(before, after, "share")


def test_merged_states_get_one_value() -> None:
    before = build("kfac", attention())
    sunk = compiled(before.copy(), "sink").program
    assert sunk is not None
    compare(sunk, compiled(sunk.copy(), "share").program, "share")  # type: ignore[arg-type]
