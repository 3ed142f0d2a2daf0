"""lower: from a program to Python functions, one for every set of cadences that a step may find due.

Slicing decides everything that depends on the schedule in advance: each ``on_due`` node is replaced by one of its
operands, what no output needs disappears, and the rest becomes a straight-line Python function whose calls are the
kernels that claimed the nodes (the op's reference where none did). A slice is built when first used, then cached.
"""

from __future__ import annotations

import linecache
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS
from fxcurv.ir.program import STEP, Program, Role, op_of, operand_types
from fxcurv.ir.text import print_type
from fxcurv.kernels.registry import preferred, select
from fxcurv.passes.guard import links
from fxcurv.passes.manager import Compilation, Pass


@dataclass(frozen=True)
class Slice:
    """One compiled function: ``function(*inputs) -> list of outputs``, both described by roles.

    due: the cadences in force. states lists, for every state output, the cadences whose flags decide on its commit.
    """

    due: frozenset[str]
    inputs: tuple[Role, ...]
    outputs: tuple[Role, ...]
    function: Callable[..., list[Any]] = field(repr=False)
    source: str = field(repr=False)


@dataclass
class Lowered:
    """A program with a kernel for every node and its cached slices.

    kernels: name of the implementation by node name. states: owner names and cadences of every state.
    """

    program: Program
    kernels: dict[str, str]
    functions: dict[str, Callable[..., Any]]
    slices: dict[tuple[frozenset[str], frozenset[Role] | None], Slice] = field(default_factory=dict)

    def slice(self, due: Iterable[str], only: frozenset[Role] | None = None) -> Slice:
        """The function for a step in which ``due`` cadences are due; of ``only`` some outputs if given."""
        key = (frozenset(due) | {STEP}, only)
        if key not in self.slices:
            self.slices[key] = cut(self, *key)
        return self.slices[key]

    def commits(self) -> dict[Role, tuple[tuple[str, str], ...]]:
        """For every state the (owner, cadence) pairs whose flags decide whether its new value is kept."""
        return {
            role: tuple((owner, every) for owner in value.meta["owner"] or ("",) for _, every in links(value))
            for role, value in self.program.outputs("state").items()
        }


@dataclass(frozen=True)
class Lower(Pass):
    """Lets kernels claim nodes. backend: "auto", "aten" or "reference" (no kernels at all)."""

    backend: str = "auto"
    name: ClassVar[str] = "lower"

    def run(self, c: Compilation) -> int:
        assert c.program is not None
        backend = c.options.get("backend") or self.backend
        preferred(backend)  # raises for a name that is not known
        kernels: dict[str, str] = {}
        functions: dict[str, Callable[..., Any]] = {}
        for node in c.program.nodes:
            if node.target is operator.getitem or node.target is OPS["on_due"]:
                continue
            kernel = None
            if backend != "reference":
                kernel = select(op_of(node).name, node.meta["type"], operand_types(node), backend)
            kernels[node.name] = kernel.name if kernel else f"{op_of(node).name}_reference"
            functions[node.name] = kernel.run if kernel else op_of(node).reference
        c.lowered = Lowered(c.program, kernels, functions)
        return sum(not name.endswith("_reference") for name in kernels.values())


def resolve(node: fx.Node, due: frozenset[str]) -> fx.Node:
    """The value that stands for ``node`` in a slice."""
    while node.target is OPS["on_due"]:
        node = node.args[0] if node.meta["every"] in due else node.args[1]  # type: ignore[assignment]
    return node


def cut(lowered: Lowered, due: frozenset[str], only: frozenset[Role] | None = None) -> Slice:
    """Build the slice of a set of due cadences. With ``only`` some outputs it runs the references, as repairs need."""
    program = lowered.program
    outputs: dict[Role, fx.Node] = {}
    for role, value in program.outputs().items():
        node = resolve(value, due)
        if role.kind == "state" and (node.op == "placeholder" and node.meta["role"] == role):
            continue  # unchanged in such a step
        if only is not None and role not in only:
            continue
        if role.kind in ("flag", "info") and node.meta["every"] not in due:
            continue
        outputs[role] = node
    live = _live(list(outputs.values()), due)
    names = {node: node.name for node in live}
    inputs = [node for node in program.placeholders if node in live]
    lines: list[str] = []
    scope: dict[str, Any] = {}
    last = {operand: node for node in live for operand in _operands(node, due)}
    kept = set(outputs.values())
    for node in live:
        if node.op == "placeholder":
            continue
        if node.meta["every"] not in due:
            raise FxcurvError(f"%{node.name} is evaluated every {node.meta['every']} but read in a step without it.")
        arguments = ", ".join(_argument(value, due, names) for value in node.args)
        comment = f"  # {print_type(node.meta['type'])}"
        if node.target is operator.getitem:
            lines.append(f"{node.name} = {names[resolve(node.args[0], due)]}[{node.args[1]}]{comment}")  # type: ignore[arg-type]
        else:
            called, function = lowered.kernels[node.name], lowered.functions[node.name]
            if only is not None:
                called, function = f"{op_of(node).name}_reference", op_of(node).reference
            if scope.setdefault(called, function) is not function:
                raise FxcurvError(f"two kernels are called {called}.")
            lines.append(f"{node.name} = {called}({arguments}){comment}")
        dead = [o.name for o in dict.fromkeys(_operands(node, due)) if last[o] is node and o not in kept]
        if dead:
            lines.append(f"{' = '.join(dead)} = None")
    suffix = "_".join(sorted(due - {STEP})) or "nothing_else_due"
    source = f"def update_{suffix}({', '.join(node.name for node in inputs)}):\n"
    source += "".join(f"    {line}\n" for line in lines)
    source += f"    return [{', '.join(node.name for node in outputs.values())}]\n"
    filename = f"<fxcurv update_{suffix} {id(lowered)}>"
    exec(compile(source, filename, "exec"), scope)
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    function = scope[f"update_{suffix}"]
    roles = tuple(node.meta["role"] for node in inputs)
    return Slice(due, roles, tuple(outputs), function, source)


def _operands(node: fx.Node, due: frozenset[str]) -> list[fx.Node]:
    if node.op == "placeholder":
        return []
    return [resolve(operand, due) for operand in node.all_input_nodes]


def _live(roots: list[fx.Node], due: frozenset[str]) -> dict[fx.Node, None]:
    """Nodes that the roots need, in an order in which operands come first."""
    order: dict[fx.Node, None] = {}
    stack = [(root, False) for root in reversed(roots)]
    while stack:
        node, ready = stack.pop()
        if ready:
            order[node] = None
        elif node not in order:
            stack.append((node, True))
            stack += [(operand, False) for operand in reversed(_operands(node, due)) if operand not in order]
    return order


def _argument(value: Any, due: frozenset[str], names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[resolve(value, due)]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument(item, due, names) for item in value)}]"
    return repr(value)
