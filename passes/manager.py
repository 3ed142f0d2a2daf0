"""Passes and the manager that runs them.

A pass is a frozen dataclass: its fields are its options, on the command line too (``-p "share,sink{limit=3}"``). It
changes a :class:`Compilation` in place and returns how many rewrites it made. The manager times it, checks types
before and after, keeps the program's text after each pass and, on request, compares results numerically. Fuel limits
the total number of rewrites, so that a wrong one can be found by bisection.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx, nn

from fxcurv.capture.captured import Captured
from fxcurv.errors import FxcurvError
from fxcurv.ir.program import Program
from fxcurv.layers.layer import Detection, Layer
from fxcurv.methods.facts import Facts
from fxcurv.methods.method import Method

CHECKS = ("none", "types", "numeric")


@dataclass(frozen=True)
class Record:
    """What one pass left behind: its name, time, rewrites, and the program's text (or the forward graph's code)."""

    name: str
    seconds: float
    rewrites: int
    text: str

    def __str__(self) -> str:
        return f"{self.name}: {self.rewrites} rewrites in {self.seconds * 1e3:.1f} ms"


@dataclass
class Compilation:
    """Everything passes work on. ``opt`` on a text file fills ``program`` only; ``transform`` starts from a capture.

    fuel: rewrites left, ``None`` for no limit. check: one of CHECKS. history: a record for every pass that ran.
    """

    program: Program | None = None
    model: nn.Module | None = None
    captured: Captured | None = None
    method: Method | None = None
    detection: Detection | None = None
    layers: tuple[Layer, ...] = ()
    facts: Facts | None = None
    tapped: Any = None
    lowered: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    fuel: int | None = None
    check: str = "types"
    history: list[Record] = field(default_factory=list)

    def spend(self) -> bool:
        """Take one unit of fuel; False when there is none left and the rewrite must not happen."""
        if self.fuel is None:
            return True
        if self.fuel <= 0:
            return False
        self.fuel -= 1
        return True


@dataclass(frozen=True)
class Pass(ABC):
    """Abstract: one step of the pipeline. ``needs`` names the fields of the compilation it reads."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ("program",)
    semantic: ClassVar[bool] = True  # whether program outputs are the same values before and after

    @abstractmethod
    def run(self, c: Compilation) -> int:
        """Change the compilation; returns the number of rewrites."""


def run_passes(c: Compilation, passes: Iterable[Pass], disabled: Iterable[str] = ()) -> Compilation:
    """Run passes in order, without those whose name is in ``disabled``; fills ``c.history``.

    Raises :class:`FxcurvError` when a pass breaks the types of the program or, with ``check="numeric"``, its results.
    """
    from fxcurv.ir.verify import verify
    from fxcurv.passes.validate import compare

    text, verified = "", False
    for step in passes:
        if step.name in disabled:
            continue
        missing = [name for name in step.needs if getattr(c, name) is None]
        if missing:
            raise FxcurvError(f"pass '{step.name}' needs a {missing[0]}, which this compilation does not have.")
        before = c.program.copy() if c.program is not None and c.check == "numeric" and step.semantic else None
        start = time.perf_counter()
        rewrites = step.run(c)
        seconds = time.perf_counter() - start
        untouched = verified and not rewrites
        if c.program is not None and c.check != "none" and not untouched:
            verify(c.program, f"after pass '{step.name}'")
        if before is not None and c.program is not None:
            compare(before, c.program, step.name)
        if untouched:  # nothing was rewritten, so nothing needs to be looked at or printed again
            text = text.replace(f"after {c.history[-1].name}", f"after {step.name}", 1)
        else:
            text = c.program.text(f"after {step.name}") if c.program is not None else ""
        verified = c.program is not None
        c.history.append(Record(step.name, seconds, rewrites, text))
    return c


_PASS = re.compile(r"\s*(\w+)\s*(?:\{([^}]*)\})?\s*(?:,|$)")


def parse_pipeline(text: str, known: dict[str, type[Pass]]) -> tuple[Pass, ...]:
    """Passes from text such as ``"sink,share{states=False}"``; raises :class:`FxcurvError` naming what is unknown."""
    passes: list[Pass] = []
    position = 0
    while position < len(text):
        match = _PASS.match(text, position)
        if match is None or match.end() == position:
            raise FxcurvError(f"'{text[position:]}' is not a pass; write for example \"sink,share,simplify\".")
        position = match.end()
        if match[1] not in known:
            near = difflib.get_close_matches(match[1], known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}."
            raise FxcurvError(f"there is no pass '{match[1]}'; {hint}")
        cls = known[match[1]]
        options = {f.name: f for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for part in filter(None, (p.strip() for p in (match[2] or "").split(","))):
            key, _, value = part.partition("=")
            if key not in options:
                raise FxcurvError(f"pass '{match[1]}' has no option '{key}'; it has {', '.join(options) or 'none'}.")
            values[key] = _literal(value)
        passes.append(cls(**values))
    return tuple(passes)


def _literal(text: str) -> Any:
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def erase(graph: fx.Graph, node: fx.Node, replacement: fx.Node) -> None:
    """Replace all uses of a node and remove it."""
    node.replace_all_uses_with(replacement)
    graph.erase_node(node)
