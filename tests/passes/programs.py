"""Programs to run passes on, built without a model: layers described by hand, statistics evaluated by hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fxcurv.ir.op import OPS
from fxcurv.ir.program import Program, Role
from fxcurv.ir.statistic import RowsOf, evaluate, parse_statistic
from fxcurv.methods import get_method
from fxcurv.methods.facts import Facts, Target
from fxcurv.passes import PASSES, Compilation, parse_pipeline, run_passes

PIPELINE = "sink,share,simplify,cadence,guard,lower"
METHODS = ("adam", "diag", "ekfac", "foof", "kfac", "sgd", "shampoo")


def linear(name: str, d_in: int, d_out: int, input: str | None = None, bias: bool = True) -> Target:
    """A linear layer; layers of equal ``input`` read the same rows."""
    return Target(
        name=name,
        input=input or name,
        weight=f"{name}.weight",
        bias=f"{name}.bias" if bias else None,
        groups=1,
        d_out=d_out,
        d_in=d_in + bias,
        homogeneous=bias,
        diagonal_input=False,
        unitwise=False,
        permutation=(0, 1),
        weight_shape=(d_out, d_in),
        sequential=True,
    )


def conv(name: str, groups: int, d_in: int, d_out: int, kernel: int) -> Target:
    """A grouped convolution without bias."""
    return Target(
        name=name,
        input=name,
        weight=f"{name}.weight",
        bias=None,
        groups=groups,
        d_out=d_out,
        d_in=d_in * kernel,
        homogeneous=False,
        diagonal_input=False,
        unitwise=False,
        permutation=(0, 1, 2),
        weight_shape=(groups * d_out, d_in, kernel),
    )


def embedding(name: str, words: int, width: int) -> Target:
    """An embedding: its input factor is diagonal by construction."""
    return Target(
        name=name,
        input=name,
        weight=f"{name}.weight",
        bias=None,
        groups=1,
        d_out=width,
        d_in=words,
        homogeneous=False,
        diagonal_input=True,
        unitwise=False,
        permutation=(1, 0),
        weight_shape=(words, width),
    )


def norm(name: str, width: int) -> Target:
    """A norm layer with scale and shift."""
    return Target(
        name=name,
        input=name,
        weight=f"{name}.weight",
        bias=f"{name}.bias",
        groups=width,
        d_out=1,
        d_in=2,
        homogeneous=True,
        diagonal_input=False,
        unitwise=True,
        permutation=(0,),
        weight_shape=(width,),
    )


def facts(*targets: Target, **options: Any) -> Facts:
    """The facts of a model of these layers."""
    shapes: dict[str, torch.Size] = {}
    for target in targets:
        assert target.weight is not None
        shapes[target.weight] = torch.Size(target.weight_shape)
        if target.bias is not None:
            shapes[target.bias] = torch.Size((target.groups * target.d_out,))
    return Facts(targets, shapes, **options)


def attention() -> Facts:
    """q, k and v that read one input."""
    return facts(linear("q", 3, 4), linear("k", 3, 4, "q"), linear("v", 3, 4, "q"))


def mixed() -> Facts:
    """One layer of each sort, two of which read the same input."""
    return facts(
        embedding("emb", 6, 3),
        linear("q", 3, 4),
        linear("k", 3, 5, "q"),
        norm("ln", 4),
        conv("conv", 3, 2, 2, 3),
        linear("head", 4, 2, bias=False),
    )


def build(method: str, model: Facts, **hyper: Any) -> Program:
    """The program of a method as ``build`` leaves it."""
    program = get_method(method, **hyper).build(model)
    program.prune()
    return program


def compiled(program: Program, pipeline: str = PIPELINE, **options: Any) -> Compilation:
    """Run a pipeline given as text."""
    disabled = options.pop("disabled", ())
    return run_passes(Compilation(program=program, **options), parse_pipeline(pipeline, PASSES), disabled)


def measured(program: Program, rows: dict[Role, torch.Tensor]) -> dict[Role, torch.Tensor]:
    """Values of a sunk program's statistic inputs, from inputs of the program that still had rows."""
    by_key = {(role.kind, key): value for role, value in rows.items() for key in role.keys}

    def read(leaf: Any) -> torch.Tensor:
        return by_key["stat", str(leaf)] if isinstance(leaf, RowsOf) else by_key["state", leaf.key]

    values: dict[Role, torch.Tensor] = {}
    for role in program.inputs():
        expression = parse_statistic(role.key) if role.kind == "stat" else None
        if expression is not None:
            values[role] = evaluate(expression, read, lambda name, operands: OPS[name](*operands))
        elif (role.kind, role.key) in by_key:
            values[role] = by_key[role.kind, role.key]
    return values


def ops(program: Program) -> list[str]:
    """Names of the program's ops in order, without ``getitem``."""
    return [node.target.name for node in program.nodes if hasattr(node.target, "name")]


def keys(roles: Iterable[Role], kind: str) -> set[tuple[str, ...]]:
    """All names of the roles of one kind."""
    return {role.keys for role in roles if role.kind == kind}
