"""The readable files of an artifact: forward.py, update.py, kernels/*.py and report.html.

update.py runs: each function is one slice, its calls are the ops' references and the kernels themselves. The tests
execute it and compare.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from fxcurv.ir.program import STEP
from fxcurv.kernels.registry import KERNELS, Kernel
from fxcurv.kernels.triton.family import Specialised
from fxcurv.passes.lower import Slice
from fxcurv.passes.tap import BoundTap
from fxcurv.runtime.describe import reachable
from fxcurv.runtime.module import CurvatureModule

TEMPLATES = Path(__file__).parent / "templates"


def forward_page(module: CurvatureModule) -> str:
    """The tapped forward graph as Python, or a line that says why there is none."""
    compilation = module._engine.compilation
    if compilation.tapped is None:
        return f'"""{module._engine.method.name} reads gradients alone: nothing is tapped."""\n'
    tapped = compilation.tapped
    names = [node.name for node in tapped.graph.nodes if node.op == "placeholder"]
    meanings = [slot.key for slot in tapped.slots] + list(tapped.states)
    lines = [
        '"""The forward graph with taps, for reading.',
        "",
        "`self` is the model. A slot is a leaf whose gradient becomes the statistic named here; a state is a tensor of",
        "the update program that a tap reads.",
        "",
        *(f"  {name}: {meaning}" for name, meaning in zip(names, meanings, strict=False)),
        '"""',
        "",
    ]
    return "\n".join(lines) + tapped.text().strip() + "\n"


def update_page(module: CurvatureModule) -> str:
    """The slices of every combination of due cadences that the schedule reaches, as an importable Python file."""
    lowered = module._engine.lowered
    slices = [lowered.slice(due) for due in reachable(lowered.program.cadences)]
    called = {node.name: lowered.kernels.get(node.name, "") for node in lowered.program.nodes}
    ops = {node.target.name for node in lowered.program.nodes if called[node.name].endswith("_reference")}
    claimed, own = claiming(module), generated_nodes(module)
    periods = ", ".join(f"{name} every {n}" for name, n in lowered.program.cadences.items() if name != STEP)
    lines = [
        f'"""The update program of {module._engine.method.name} as Python: a function for each set of due cadences.',
        "",
        f"Cadences: {periods or 'every step is alike'}. Inputs and outputs come in the order listed.",
        '"""',
        "",
        *(["from pathlib import Path", ""] if own else []),
        "import fxcurv.ir.ops",
        "from fxcurv.ir.op import OPS",
    ]
    lines += [f"from {f.__module__} import {f.__name__} as {name}" for name, f in variants(module).items()]
    if own:
        lines += ["from fxcurv.kernels.generator import launcher", "", '_FOLDER = Path(__file__).parent / "kernels"']
        lines += [f'{name} = launcher(_FOLDER / "{kernel.source.name}.py")' for name, kernel in own.items()]
    if claimed:
        lines += ["from fxcurv.kernels.registry import KERNELS, load"]
        lines += ["", *(f"load({name!r})" for name in dict.fromkeys(kernel.backend for kernel in claimed))]
        lines += ["_KERNELS = {(kernel.op, kernel.backend, kernel.name): kernel.run for kernel in KERNELS}"]
    lines += ["", *(f"{name}_reference = OPS[{name!r}].reference" for name in sorted(ops))]
    lines += [f"{k.name} = _KERNELS[{k.op!r}, {k.backend!r}, {k.name!r}]" for k in claimed]
    for current in slices:
        lines += ["", "", *_roles(current), current.source.rstrip()]
    return "\n".join(lines) + "\n"


def _roles(current: Slice) -> list[str]:
    due = ", ".join(sorted(current.due - {STEP})) or "nothing else"
    return [
        f"# due: {due}",
        f"# inputs: {', '.join(str(role) for role in current.inputs)}",
        f"# outputs: {', '.join(str(role) for role in current.outputs)}",
    ]


def claiming(module: CurvatureModule) -> list[Kernel]:
    """The kernels that run some node of the program, each once."""
    lowered = module._engine.lowered
    functions = {
        (node.target.name, lowered.kernels[node.name]): lowered.functions[node.name]
        for node in lowered.program.nodes
        if node.name in lowered.kernels
    }
    found = [k for k in KERNELS if functions.get((k.op, k.name)) is k.run]
    return sorted(found, key=lambda kernel: (kernel.backend, kernel.name))


def variants(module: CurvatureModule) -> dict[str, Callable[..., Any]]:
    """Functions in the place of kernels and references (views, averages in place), by the names that slices call."""
    lowered = module._engine.lowered
    named = {name: lowered.functions[node] for node, name in lowered.kernels.items()}
    return {name: function for name, function in sorted(named.items()) if name.endswith(("_view", "_into"))}


def generated_nodes(module: CurvatureModule) -> dict[str, Specialised]:
    """The generated kernels that run some node of the program, by the names under which its slices call them."""
    lowered = module._engine.lowered
    named = {name: lowered.functions[node] for node, name in lowered.kernels.items()}
    return {name: function for name, function in sorted(named.items()) if isinstance(function, Specialised)}


def generated(module: CurvatureModule) -> list[Specialised]:
    """All generated kernels, those of the taps included, each source once and in the order of their names."""
    found = list(generated_nodes(module).values())
    tapped = module._engine.compilation.tapped
    for graph in () if tapped is None else tapped.graphs:
        for node in graph.graph.nodes:
            if isinstance(node.target, BoundTap):
                found += [kernel for _, kernel in node.target.spec.kernels if isinstance(kernel, Specialised)]
    return [kernel for _, kernel in sorted({kernel.source.name: kernel for kernel in found}.items())]


def kernel_pages(module: CurvatureModule) -> dict[str, str]:
    """The source files of the kernels that claimed nodes or run in taps, by path in the artifact.

    A generated kernel has a file of its own, which stands alone.
    """
    pages = {f"kernels/{kernel.source.name}.py": kernel.source.text for kernel in generated(module)}
    for kernel in claiming(module):
        source = inspect.getmodule(kernel.run)
        if source is None:
            continue
        name = f"kernels/{kernel.backend}_{source.__name__.rpartition('.')[2]}.py"
        pages[name] = inspect.getsource(source)
    return pages


def html_page(module: CurvatureModule, report: dict[str, Any]) -> str:
    """A self-contained page: no script, no font, no image from anywhere."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["size"] = size_text
    return environment.get_template("report.html").render(
        report=report,
        program=module.program.text(),
        forward=forward_page(module),
        passes=changes([(record.name, record.text) for record in module.history], report["passes"]),
    )


def changes(texts: list[tuple[str, str]], passes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every pass what it did to the program text: a unified diff as runs of lines with their first character."""
    found, before = [], ""
    for (name, text), entry in zip(texts, passes, strict=True):
        runs = groupby(diff_lines(before, text, name), key=lambda line: line[:1])
        found.append({**entry, "diff": [(mark, "\n".join(lines)) for mark, lines in runs]})
        before = text or before
    return found


def diff_lines(before: str, after: str, name: str) -> list[str]:
    """The unified diff of a pass, without the comment on the program's first line; empty when nothing changed."""
    old, new = (
        [line.split("  #")[0] if line.startswith("update {") else line for line in text.splitlines()]
        for text in (before, after)
    )
    return list(difflib.unified_diff(old, new, f"before {name}", f"after {name}", lineterm="", n=2))


def size_text(number: float, unit: str = "B") -> str:
    """A size for reading, in powers of 1000: 1536 bytes are "1.5 KB", 2.4e9 with unit "flop" "2.4 Gflop"."""
    value = float(number)
    for prefix in ("", "K", "M", "G", "T"):
        if abs(value) < 1000 or prefix == "T":
            return f"{value:.0f} {unit}" if not prefix else f"{value:.1f} {prefix}{unit}"
        value /= 1000
    raise AssertionError
