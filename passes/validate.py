"""Translation validation: run a program before and after a pass on the same random inputs and compare the results.

The interpreter here is the plainest meaning of a program, one reference op after the other; the compiled slices are
tested against it too. Inputs are random but of the right *kind* (a ``Psd`` is positive definite, an ``Orth``
orthogonal, counts and second moments positive) and in float64, so that nothing but a wrong rewrite shows.
"""

from __future__ import annotations

import math
import operator
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS, Op, Trait
from fxcurv.ir.program import Program, Role
from fxcurv.ir.types import LowRank, Orth, Psd, Rows, Scalar, Sym, Tri, Type

UNKNOWN = 5  # stands for every size that is known only when the program runs
SIGNED = ("grad", "param")  # kinds of input whose entries may be negative; the others are counts, moments, strengths

Values = dict[Role, Tensor]


def random_inputs(program: Program, seed: int = 0, double: bool = True) -> Values:
    """A value of the right kind for every input but oracles; the same seed and role give the same value anywhere.

    double: make floating-point values float64 whatever their type says; otherwise they have the declared dtype.
    """
    return {
        role: random_value(role, node.meta["type"], seed, double)
        for role, node in program.inputs().items()
        if role.kind != "oracle"
    }


def random_value(role: Role, type_: Type, seed: int = 0, double: bool = True) -> Tensor:
    """One random value; a state has the sizes of its type, an unknown size is UNKNOWN."""
    draw = torch.Generator().manual_seed(zlib.crc32(f"{seed} {role.kind} {role.key}".encode()))
    shape = [UNKNOWN if size is None else size for size in type_.shape]
    if not type_.dtype.is_floating_point:
        return torch.randint(0, 2, shape, generator=draw).to(type_.dtype)
    dtype = torch.float64 if double else type_.dtype
    normal = torch.randn(shape, dtype=torch.float64, generator=draw)
    if isinstance(type_, Scalar):
        uniform = torch.rand(shape, dtype=torch.float64, generator=draw)
        # hyper-parameters lie between 0 and 1; counters and counts are whole numbers
        value = 0.1 + 0.8 * uniform if role.kind == "hyper" else 1.0 + (8.0 * uniform).floor()
    elif type(type_) in _MATRICES:
        value = _MATRICES[type(type_)](normal)
    else:
        signed = role.kind in SIGNED or isinstance(type_, (Rows, LowRank))
        value = normal if signed else normal.abs() + 0.1
    return value.to(dtype)


def _psd(normal: Tensor) -> Tensor:
    eye = torch.eye(normal.shape[-1], dtype=normal.dtype)
    return normal @ normal.mT / max(1, normal.shape[-1]) + 0.1 * eye


_MATRICES: dict[type[Type], Callable[[Tensor], Tensor]] = {
    Psd: _psd,
    Sym: lambda normal: (normal + normal.mT) / 2,
    Orth: lambda normal: torch.linalg.qr(normal)[0].contiguous(),
    Tri: lambda normal: normal.tril(-1) + torch.diag_embed(normal.diagonal(dim1=-2, dim2=-1).abs() + 0.1),
}


def interpret(program: Program, inputs: Values, due: Iterable[str] | None = None) -> dict[Role, Tensor]:
    """Outputs of a program for the step in which ``due`` cadences are due (all when ``None``), by role.

    An ``on_due`` node is its first operand when its cadence is due, else its second. Flags and infos of a cadence that
    is not due are left out, and so are outputs that need an oracle. Raises :class:`FxcurvError` when a value is read
    that is not due, or an input is missing.
    """
    in_force = set(program.cadences) if due is None else {"step", *due}
    given = {(role.kind, key): value for role, value in inputs.items() for key in role.keys}
    values: dict[fx.Node, Any] = {}
    beyond = _needs_oracle(program)
    results: dict[Role, Tensor] = {}
    for role, root in program.outputs().items():
        if root in beyond or (role.kind in ("flag", "info") and root.meta["every"] not in in_force):
            continue
        for node in _needed(root, in_force, values):
            values[node] = _evaluate(node, values, given, in_force)
        results[role] = values[root]
    return results


def _needs_oracle(program: Program) -> set[fx.Node]:
    """Values that cannot be computed without the model."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        oracle = isinstance(node.target, Op) and Trait.ORACLE in node.target.traits
        if oracle or any(operand in found for operand in node.all_input_nodes):
            found.add(node)
    return found


def _needed(root: fx.Node, due: set[str], values: dict[fx.Node, Any]) -> Iterator[fx.Node]:
    """What has to be evaluated for ``root``, operands first."""
    stack = [(root, False)]
    while stack:
        node, ready = stack.pop()
        if node in values:
            continue
        if ready:
            yield node
        else:
            stack.append((node, True))
            stack += [(operand, False) for operand in _read(node, due)]


def _read(node: fx.Node, due: set[str]) -> list[fx.Node]:
    if node.target is OPS["on_due"]:
        chosen = node.args[0] if node.meta["every"] in due else node.args[1]
        assert isinstance(chosen, fx.Node)
        return [chosen]
    return node.all_input_nodes


def _evaluate(node: fx.Node, values: dict[fx.Node, Any], given: dict[tuple[str, str], Tensor], due: set[str]) -> Any:
    if node.op == "placeholder":
        role = node.meta["role"]
        if (role.kind, role.key) not in given:
            raise FxcurvError(f"there is no value for the input {role}.")
        return given[role.kind, role.key]
    if node.target is OPS["on_due"]:
        return values[_read(node, due)[0]]
    if node.meta["every"] not in due:
        raise FxcurvError(f"%{node.name} is evaluated every {node.meta['every']} but read in a step without it.")
    operands: Any = fx.node.map_arg(node.args, values.__getitem__)
    target: Any = node.target
    if target is operator.getitem:
        return operands[0][operands[1]]
    try:
        return target(*operands)
    except (RuntimeError, TypeError, IndexError) as error:
        raise FxcurvError(f"%{node.name} failed in the interpreter: {error}") from error


def compare(before: Program, after: Program, name: str, tolerance: float = 1e-8, seed: int = 0) -> None:
    """Raise :class:`FxcurvError` unless both programs give equal results for equal inputs, all cadences due.

    A state that was merged in ``after`` gives all the states of ``before`` that it stands for the one value it has.
    An output is compared under each of its names. name: the pass, for the message. tolerance: largest difference
    relative to the larger of the output's norm and 1e-30.
    """
    inputs = random_inputs(after, seed)
    merged = {(role.kind, key): value for role, value in inputs.items() for key in role.keys}
    old_inputs = {role: merged.get((role.kind, role.key), value) for role, value in random_inputs(before, seed).items()}
    old = _by_key(interpret(before, old_inputs))
    new = _by_key(interpret(after, inputs))
    for key in old:
        if key not in new:
            if _had(after, key):
                continue
            raise FxcurvError(f"pass '{name}' lost the output {key[0]}['{key[1]}'].")
        error = relative_error(old[key], new[key])
        if not error <= tolerance:
            raise FxcurvError(
                f"pass '{name}' changed the output {key[0]}['{key[1]}']: the relative error is {error:.1e}, "
                f"more than {tolerance:.0e}."
            )


def _by_key(outputs: dict[Role, Tensor]) -> dict[tuple[str, str], Tensor]:
    found = {}
    for role, value in outputs.items():
        apart = role.kind == "flag" and value.ndim  # a stack has a row for each key, all else one value under all
        rows = value.unbind() if apart else [value] * len(role.keys)
        found.update({(role.kind, key): row for key, row in zip(role.keys, rows, strict=True)})
    return found


def _had(program: Program, key: tuple[str, str]) -> bool:
    """Whether a program yields something under ``key``, even if the interpreter left it out."""
    return any((role.kind, one) == key for role in program.outputs() for one in role.keys)


def relative_error(one: Tensor, other: Tensor) -> float:
    """Norm of the difference over that of ``one``; infinite for different shapes or NaN on one side only."""
    if one.shape != other.shape:
        return math.inf
    one, other = one.to(torch.float64), other.to(torch.float64)
    if not torch.equal(torch.isnan(one), torch.isnan(other)):
        return math.inf
    difference = torch.nan_to_num(one - other, nan=0.0).norm()
    return float(difference / torch.nan_to_num(one, nan=0.0).norm().clamp(min=1e-30))
