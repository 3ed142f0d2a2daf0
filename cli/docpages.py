"""The reference as data: pages with sections, made of docstrings and registries alone, so it cannot be out of date."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import fxcurv
from fxcurv.cli import catalogue
from fxcurv.cli.docstring import Block, blocks, explained, mentioned, sections
from fxcurv.cli.verb import HYPER, verb
from fxcurv.errors import FxcurvError
from fxcurv.methods import PUBLISHED, Published, get_method
from fxcurv.methods.facts import Facts
from fxcurv.methods.papers import Paper, load_papers
from fxcurv.methods.registry import COMMON

GENERAL = {
    **{name: text for name, (_, text) in HYPER.items()},
    "nesterov": "Whether the optimizer looks ahead by its momentum.",
    "epsilon": "Added to what is divided by.",
    "beta1": "Weight of the old average of gradients.",
    "beta2": "Weight of the old average of their squares.",
    "damping_scheme": "How the damping of a block is divided between its factors.",
    "trace_floor": "With damping in units of a curvature's trace: the least trace that is assumed.",
    "rescale": "What scales the directions.",
    "burst": "Statistics only in so many steps up to each factorisation; 0: every factor_every steps.",
    "decay": "How weight_decay acts: decoupled, or l2 (added to the gradient, before the preconditioner).",
    "step": "fixed (lr and momentum as given), or quadratic (both from an exact quadratic model).",
}


@dataclass(frozen=True)
class Table:
    """columns and rows; in ``links`` mode the first cell of a row is the address of its page, the second its text."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    links: bool = False


@dataclass(frozen=True)
class Section:
    """A heading ("" for none) with text, then a table, then code."""

    heading: str
    text: tuple[Block, ...] = ()
    table: Table | None = None
    code: str = ""
    level: int = 2


@dataclass(frozen=True)
class Page:
    """name: its path without a suffix, "methods/kfac"; lead: one line."""

    name: str
    title: str
    lead: str
    sections: tuple[Section, ...] = field(default=())


def pages(commands: dict[str, dict[str, Callable[..., None]]], report: Callable[[str], object] = str) -> list[Page]:
    """All pages, the index first. commands: the verbs of the command line by panel."""
    papers = load_papers()
    facts = _tiny()
    methods = []
    for name, method in sorted(PUBLISHED.items()):
        report(f"method {name}")
        methods.append(_method_page(name, method, papers, facts))
    others = [
        _entries_page("ops", "Operations", "What update programs are written in.", catalogue.found_ops(), "schema"),
        _entries_page("passes", "Passes", "The rewrites between a method and what runs, in their order.",
                      catalogue.found_passes(), "defaults"),
        _entries_page("kernels", "Kernels", "What may run in place of an op's reference.",
                      catalogue.found_kernels(), "when"),
        _commands_page(commands),
        _papers_page(papers),
    ]  # fmt: skip
    return [_index(methods, others), *methods, *others]


def _index(methods: Sequence[Page], others: Sequence[Page]) -> Page:
    rows = tuple((page.name, page.title, page.lead.partition(": ")[2] or page.lead) for page in methods)
    rest = tuple((page.name, page.title, page.lead) for page in others)
    return Page(
        "index",
        "fxcurv reference",
        f"Version {fxcurv.__version__}.",
        (
            Section("Methods", table=Table(("method", "what"), rows, links=True)),
            Section("The rest", table=Table(("page", "what"), rest, links=True)),
        ),
    )


def _method_page(name: str, method: Published, papers: Sequence[Paper], facts: Facts) -> Page:
    parts = sections(method.doc)
    lead, _, rest = parts.pop("Idea").partition("\n\n")
    lead = " ".join(lead.split())
    found = [Section("Idea and equations", tuple(blocks(rest)))] if rest.strip() else []
    rows = []
    for key, default in sorted(method.defaults.items(), key=lambda item: (item[0] in COMMON, item[0])):
        rows.append((key, "none" if default is None else str(default), hyper_meaning(key, method)))
    found.append(Section("Hyper-parameters", table=Table(("name", "default", "meaning"), tuple(rows))))
    found += [Section(heading, tuple(blocks(text))) for heading, text in parts.items()]
    mine = [paper for paper in papers if paper.number in method.papers or name in paper.implements]
    found += [_paper_section(paper) for paper in mine]
    call = f'model = fxcurv.transform(net, "{name}", example_inputs=(x,), loss="cross_entropy")'
    usage = f"{call}\nopt = fxcurv.optimizer(model)\n\nfxcurv train FILE --method {name}"
    found.append(Section("Use", code=usage))
    found.append(_program(name, facts))
    return Page(f"methods/{name}", name, lead, tuple(found))


def hyper_meaning(key: str, method: Published) -> str:
    """What a hyper-parameter of a method means: as its docstring explains it, in general, as it mentions it, or as the
    docstring of another method of the same paper does; "" when nothing says it."""
    others = [m.doc for m in PUBLISHED.values() if m is not method and set(m.papers) & set(method.papers)]
    said = [explained(key, method.doc), GENERAL.get(key, ""), mentioned(key, method.doc)]
    said += [explained(key, doc) or mentioned(key, doc) for doc in others]
    return next(filter(None, said), "")


def _paper_section(paper: Paper) -> Section:
    lines = [f"{paper.author}, {paper.year}. Status: {paper.status}. {paper.note}".strip()]
    proofs = (Block("p", ("Shown by these tests:",)), Block("list", tuple(f"``{test}``" for test in paper.tests)))
    return Section(f"Paper {paper.number}: {paper.title}", (Block("p", tuple(lines)), *(proofs if paper.tests else ())))


def _tiny() -> Facts:
    """The facts of one linear layer with a bias, 3 inputs and 2 outputs."""
    module = fxcurv.transform(
        nn.Sequential(nn.Linear(3, 2)), "foof", example_inputs=(torch.ones(4, 3),), loss="cross_entropy", proofs=False
    )
    return module._engine.facts


def _program(name: str, facts: Facts) -> Section:
    try:
        text, say = get_method(name).build(facts).text(), "The update program of one linear layer, before any pass."
    except FxcurvError as error:
        text, say = "", f"One linear layer alone has no program of this method: {error}"
    return Section("Program", (Block("p", (say,)),), code=text)


def _entries_page(name: str, title: str, lead: str, found: dict[str, dict[str, Any]], column: str) -> Page:
    rows = tuple((key, catalogue.text(entry[column]), catalogue.text(entry["summary"])) for key, entry in found.items())
    heading = {"schema": "schema", "defaults": "options", "when": "when"}[column]
    parts = [Section("", table=Table(("name", heading, "what"), rows))]
    for key, entry in found.items():
        traits = entry.get("traits")
        more = (Block("p", (f"Traits: {', '.join(traits)}.",)),) if traits else ()
        parts.append(Section(key, (*blocks(inspect.cleandoc(entry["doc"])), *more)))
    return Page(name, title, lead, tuple(parts))


def _commands_page(commands: dict[str, dict[str, Callable[..., None]]]) -> Page:
    parts = []
    for panel, verbs in commands.items():
        for name, function in verbs.items():
            doc = inspect.cleandoc(function.__doc__ or "")
            rows = tuple(_options(verb(function)))
            parts.append(
                Section(f"fxcurv {name}", tuple(blocks(f"{panel}.\n\n{doc}")), Table(("option", "meaning"), rows))
            )
    return Page("commands", "Command line", "The verbs of fxcurv and their options.", tuple(parts))


def _options(command: Callable[..., None]) -> Iterable[tuple[str, str]]:
    """(option, meaning) of a verb, without the hyper-parameters that all have."""
    hyper = [f"--{name.replace('_', '-')}" for name in HYPER]
    shared = False
    for parameter in inspect.signature(command).parameters.values():
        info = typing.get_args(parameter.annotation)[1]
        first = [info.default] if isinstance(info.default, str) and info.default.startswith("-") else []
        names = [*first, *(info.param_decls or ())] or [info.metavar or parameter.name.upper()]
        if names[0] in hyper:
            shared = True
            continue
        yield ", ".join(names), info.help or ""
    if shared:
        yield ", ".join(hyper), "Hyper-parameters, see the methods' pages."


def _papers_page(papers: Sequence[Paper]) -> Page:
    rows = tuple((str(p.number), p.title, f"{p.author}, {p.year}", p.status, p.becomes) for p in papers)
    table = Table(("number", "paper", "by", "status", "becomes"), rows)
    return Page(
        "papers", "Papers", "The papers behind the methods and what became of each.", (Section("", table=table),)
    )
