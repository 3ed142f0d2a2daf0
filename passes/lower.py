"""lower: from a program to Python functions, one for every set of cadences that a step may find due.

Slicing decides everything that depends on the schedule in advance: each ``on_due`` node is replaced by one of its
operands, what no output needs disappears, and the rest becomes a straight-line Python function whose calls are the
kernels that claimed the nodes (the op's reference where none did). A slice is built when first used, then cached.
"""

from __future__ import annotations

import hashlib
import linecache
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from torch import fx
from torch.profiler import record_function

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS
from fxcurv.ir.program import STEP, Program, Role, op_of, operand_types
from fxcurv.ir.ranges import profiling, title
from fxcurv.ir.text import print_type
from fxcurv.kernels.aten.layout import VIEWS
from fxcurv.kernels.aten.tracking import INTO
from fxcurv.kernels.registry import preferred, select
from fxcurv.passes.guard import links
from fxcurv.passes.manager import Compilation, Pass


@dataclass(frozen=True, eq=False)
class Bundle:
    """The roles of the rows of a stack, in order. There is one object for equal ones."""

    roles: tuple[Role, ...]

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Their first keys."""
        return tuple(role.key for role in self.roles)

    @property
    def kind(self) -> str:
        """What kind of values they are."""
        return self.roles[0].kind


class Due(frozenset[str]):
    """The cadences in force in a step; for what only ``retired`` layers own, "step" alone is."""

    retired: frozenset[str] = frozenset()

    @classmethod
    def of(cls, cadences: Iterable[str], retired: frozenset[str] = frozenset()) -> Due:
        """These cadences, and "step"."""
        due = cls({*cadences, STEP})
        due.retired = retired
        return due


@dataclass(frozen=True)
class Slice:
    """One compiled function: ``function(*inputs) -> list of outputs``, both described by roles.

    Statistics among the inputs may be overwritten (see :mod:`fxcurv.passes.memory`).
    due: the cadences in force. A bundled slice takes the stacks of states and statistics that it would put together,
    and gives those of states that it would take apart: a :class:`Bundle` then stands among the roles.
    Called under a profiler it runs its twin ``ranged``, which names every node; nothing of that is in ``function``.
    """

    due: frozenset[str]
    inputs: tuple[Any, ...]  # of roles and bundles
    outputs: tuple[Any, ...]
    function: Callable[..., list[Any]] = field(repr=False)
    source: str = field(repr=False)
    ranged_source: str = field(repr=False)
    scope: dict[str, Any] = field(repr=False, compare=False)

    def __call__(self, *inputs: Any) -> list[Any]:
        return self.ranged(*inputs) if profiling() else self.function(*inputs)

    @cached_property
    def ranged(self) -> Callable[..., list[Any]]:
        """The same function with a profiler range around every node, built when first wanted."""
        return _compiled(self.ranged_source, {**self.scope, "record_function": record_function})


@dataclass
class Lowered:
    """A program with a kernel for every node and its cached slices.

    kernels: name of the implementation by node name. states: owner names and cadences of every state.
    """

    program: Program
    kernels: dict[str, str]
    functions: dict[str, Callable[..., Any]]
    slices: dict[tuple[Any, ...], Slice] = field(default_factory=dict)
    bundles: dict[tuple[Role, ...], Bundle] = field(default_factory=dict)

    def bundle(self, roles: tuple[Role, ...]) -> Bundle:
        """The bundle of these roles."""
        return self.bundles.setdefault(roles, Bundle(roles))

    def slice(
        self,
        due: Iterable[str],
        only: frozenset[Role] | None = None,
        bundled: bool = False,
        retired: frozenset[str] = frozenset(),
    ) -> Slice:
        """The function for a step in which ``due`` cadences are due; of ``only`` some outputs if given.

        retired: layers whose states change with "step" alone, see :data:`fxcurv.ir.schedule.RETIRED`.
        """
        now = Due.of(due, retired)
        key = (frozenset(now), only, bundled, retired)
        if key not in self.slices:
            self.slices[key] = cut(self, now, only, bundled)
        return self.slices[key]

    def commits(self) -> dict[Role, tuple[tuple[str, str], ...]]:
        """For every state the (owner, cadence) pairs whose flags decide whether its new value is kept."""
        return {
            role: tuple((owner, every) for owner in value.meta["owner"] or ("",) for _, every in links(value))
            for role, value in self.program.outputs("state").items()
        }


@dataclass(frozen=True)
class Lower(Pass):
    """Lets kernels claim nodes. backend: "auto", "aten", "triton" or "reference" (no kernels at all)."""

    backend: str = "auto"
    name: ClassVar[str] = "lower"

    def run(self, c: Compilation) -> int:
        assert c.program is not None
        backend = c.options.get("backend") or self.backend
        preferred(backend)  # raises for a name that is not known
        kernels: dict[str, str] = {}
        functions: dict[str, Callable[..., Any]] = {}
        named: dict[str, Callable[..., Any]] = {}
        for node in c.program.nodes:
            if node.target is operator.getitem or node.target is OPS["on_due"]:
                continue
            kernel = None
            if backend != "reference":
                kernel = select(op_of(node).name, node.meta["type"], operand_types(node), backend)
            kernels[node.name] = kernel.name if kernel else f"{op_of(node).name}_reference"
            functions[node.name] = kernel.run if kernel else op_of(node).reference
            if node.meta.get("into") and kernel is not None and kernel.backend == "aten":
                kernels[node.name], functions[node.name] = f"{kernel.name}_into", INTO[op_of(node).name]
            if node.meta.get("view") and backend != "reference":
                kernels[node.name], functions[node.name] = f"{op_of(node).name}_view", VIEWS[op_of(node).name]
            kernels[node.name] = _own_name(kernels[node.name], functions[node.name], named)
        c.lowered = Lowered(c.program, kernels, functions)
        return sum(not name.endswith("_reference") for name in kernels.values())


def _own_name(name: str, function: Callable[..., Any], named: dict[str, Callable[..., Any]]) -> str:
    """``name``, numbered when it is taken: one generated source may have several fallbacks."""
    own, number = name, 1
    while named.setdefault(own, function) is not function:
        number += 1
        own = f"{name}_{number}"
    return own


def resolve(node: fx.Node, due: frozenset[str]) -> fx.Node:
    """The value that stands for ``node`` in a slice."""
    retired = due.retired if isinstance(due, Due) else frozenset()
    while node.target is OPS["on_due"]:
        takes = node.meta["every"] in due and not _is_over(node.meta["owner"], retired)
        node = node.args[0] if takes else node.args[1]  # type: ignore[assignment]
    return node


def _is_over(owners: Iterable[str], retired: frozenset[str]) -> bool:
    """Whether all of a value's owners have retired."""
    return bool(retired) and bool(owners) and retired.issuperset(owners)


def cut(lowered: Lowered, due: frozenset[str], only: frozenset[Role] | None = None, bundled: bool = False) -> Slice:
    """Build the slice of a set of due cadences.

    With ``only`` some outputs it runs the references, as repairs need, and takes averages that were written over their
    statistics as inputs.
    """
    program = lowered.program
    retired = due.retired if isinstance(due, Due) else frozenset()
    known = [node for node in program.nodes if only is not None and isinstance(node.meta.get("into"), Role)]
    outputs: dict[Role, fx.Node] = {}
    for role, value in program.outputs().items():
        node = resolve(value, due)
        if role.kind == "state" and (node.op == "placeholder" and node.meta["role"] == role):
            continue  # unchanged in such a step
        if only is not None and role not in only:
            continue
        if role.kind in ("flag", "info") and node.meta["every"] not in due:
            continue
        if role.kind == "flag" and node.meta["every"] != STEP and _is_over(_owners(role), retired):
            continue
        outputs[role] = node
    bundles = _stacks_of_inputs(lowered, due) if bundled else {}
    known += bundles
    if bundled:
        outputs = _with_stacks(lowered, outputs, due)
    live = _live(list(outputs.values()), due, known)
    names = {node: node.name for node in live}
    inputs = [node for node in (*program.placeholders, *known) if node in live]
    lines: list[tuple[str, str]] = []  # and the title of its profiler range
    scope: dict[str, Any] = {}
    last = {operand: node for node in live if node not in known for operand in _operands(node, due)}
    kept = set(outputs.values())
    for node in live:
        if node.op == "placeholder" or node in known:
            continue
        if node.meta["every"] not in due:
            raise FxcurvError(f"%{node.name} is evaluated every {node.meta['every']} but read in a step without it.")
        arguments = ", ".join(_argument(value, due, names) for value in node.args)
        comment = f"  # {print_type(node.meta['type'])}"
        if node.target is operator.getitem:
            lines.append((f"{node.name} = {names[resolve(node.args[0], due)]}[{node.args[1]}]{comment}", ""))  # type: ignore[arg-type]
        else:
            called, function = lowered.kernels[node.name], lowered.functions[node.name]
            if only is not None:
                called, function = f"{op_of(node).name}_reference", op_of(node).reference
            if scope.setdefault(called, function) is not function:
                raise FxcurvError(f"two kernels are called {called}.")
            lines.append((f"{node.name} = {called}({arguments}){comment}", title(op_of(node).name, node.meta["owner"])))
        dead = [o.name for o in dict.fromkeys(_operands(node, due)) if last[o] is node and o not in kept]
        if dead:
            lines.append((f"{' = '.join(dead)} = None", ""))
    suffix = "_".join(sorted(due - {STEP})) or "nothing_else_due"
    head = f"def update_{suffix}({', '.join(node.name for node in inputs)}):\n"
    tail = f"    return [{', '.join(node.name for node in outputs.values())}]\n"
    source = head + "".join(f"    {line}\n" for line, _ in lines) + tail
    ranges = [f"with record_function({name!r}): {line}" if name else line for line, name in lines]
    ranged_source = head + "".join(f"    {line}\n" for line in ranges) + tail
    roles = tuple(bundles.get(node) or node.meta["into" if node in known else "role"] for node in inputs)
    return Slice(due, roles, tuple(outputs), _compiled(source, scope), source, ranged_source, scope)


def _owners(flag: Role) -> list[str]:
    return [key.rpartition(":")[0] for key in flag.keys]


def _stacks_of_inputs(lowered: Lowered, due: frozenset[str]) -> dict[fx.Node, Bundle]:
    """Stacks that are put together from states or from statistics alone, with the roles of their rows."""
    found = {}
    for node in lowered.program.nodes:
        if node.target is not OPS["stack"]:
            continue
        rows = [resolve(row, due) for row in node.args[0]]  # type: ignore[union-attr, arg-type]
        roles = tuple(row.meta["role"] for row in rows if row.op == "placeholder")
        if len(roles) == len(rows) and {role.kind for role in roles} in ({"state"}, {"stat"}):
            found[node] = lowered.bundle(roles)
    return found


def _with_stacks(lowered: Lowered, outputs: dict[Role, fx.Node], due: frozenset[str]) -> dict[Any, fx.Node]:
    """The outputs with a stack in place of states that are all of its rows."""
    parts: dict[fx.Node, dict[int, list[Role]]] = {}
    for role, node in outputs.items():
        if role.kind == "state" and node.target is operator.getitem and node.args[0].target is OPS["unstack"]:  # type: ignore[union-attr]
            parts.setdefault(node.args[0], {}).setdefault(node.args[1], []).append(role)  # type: ignore[arg-type, index]
    found: dict[Any, fx.Node] = {}
    for apart, rows in parts.items():
        if len(rows) == len(apart.meta["type"]) and all(len(roles) == 1 for roles in rows.values()):
            bundle = lowered.bundle(tuple(rows[i][0] for i in range(len(rows))))
            found[bundle] = resolve(apart.args[0], due)  # type: ignore[arg-type]
    whole = {role for bundle in found for role in bundle.roles}
    return {role: node for role, node in outputs.items() if role not in whole} | found


def _compiled(source: str, scope: dict[str, Any]) -> Callable[..., list[Any]]:
    """The one function that ``source`` defines, its lines known to tracebacks."""
    filename = f"<fxcurv slice {hashlib.sha256(source.encode()).hexdigest()[:12]}>"
    own = dict(scope)
    exec(compile(source, filename, "exec"), own)
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    return own[source[4 : source.index("(")]]  # type: ignore[no-any-return]


def _operands(node: fx.Node, due: frozenset[str]) -> list[fx.Node]:
    if node.op == "placeholder":
        return []
    return [resolve(operand, due) for operand in node.all_input_nodes]


def _live(roots: list[fx.Node], due: frozenset[str], known: Sequence[fx.Node] = ()) -> dict[fx.Node, None]:
    """Nodes that the roots need, in an order in which operands come first; what is ``known`` needs none."""
    order: dict[fx.Node, None] = {}
    stack = [(root, False) for root in reversed(roots)]
    while stack:
        node, ready = stack.pop()
        if ready:
            order[node] = None
        elif node not in order:
            stack.append((node, True))
            needed = [] if node in known else reversed(_operands(node, due))
            stack += [(operand, False) for operand in needed if operand not in order]
    return order


def _argument(value: Any, due: frozenset[str], names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[resolve(value, due)]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument(item, due, names) for item in value)}]"
    return repr(value)
