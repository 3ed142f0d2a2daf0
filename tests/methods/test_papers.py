"""papers.toml is complete and says nothing that is not so: every name in it exists."""

from __future__ import annotations

import ast
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from fxcurv.methods import PUBLISHED
from fxcurv.methods.papers import Paper, load_papers

ROOT = Path(__file__).resolve().parents[2]
PAPERS = load_papers()
EACH = pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: str(paper.number))


def exists(name: str) -> bool:
    """Whether ``name`` is a method, or a dotted name that can be imported."""
    if name in PUBLISHED:
        return True
    module, _, attribute = name.rpartition(".")
    try:
        getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        return False
    return True


@cache
def functions(path: Path) -> frozenset[str]:
    """Names of the test functions of a file."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return frozenset(node.name for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))


def missing_test(reference: str) -> str:
    """What is wrong with "tests/...py" or "tests/...py::test_name", "" if nothing."""
    file, _, function = reference.partition("::")
    path = ROOT / file
    if not file.startswith("tests/") or path.suffix != ".py" or not path.is_file():
        return f"there is no test file '{file}'"
    if function and function not in functions(path):
        return f"'{file}' has no '{function}'"
    return ""


def test_every_paper_is_listed_once() -> None:
    assert [paper.number for paper in PAPERS] == list(range(1, 84))
    assert len({paper.title for paper in PAPERS}) == len(PAPERS)


@EACH
def test_entry_is_filled_in(paper: Paper) -> None:
    for field in ("title", "author", "sheet", "becomes"):
        value = getattr(paper, field)
        assert value and value == value.strip(), f"{field} = {value!r}"
    assert 1989 <= int(paper.year) <= 2023
    assert ": " in paper.sheet
    assert paper.status in ("working", "partial", "planned")
    assert not paper.author.endswith(".")


@EACH
def test_status_is_backed(paper: Paper) -> None:
    """Working and partial rows name what is there and a test of it; the others say what is missing."""
    if paper.status in ("working", "partial"):
        assert paper.implements and paper.tests
        assert any("::" in test for test in paper.tests), "name the functions, not only a file"
    else:
        assert not paper.implements
    if paper.status == "working":
        assert not paper.note
    else:
        assert paper.note.endswith(".") and len(paper.note) > 20


@EACH
def test_names_exist(paper: Paper) -> None:
    assert [name for name in paper.implements if not exists(name)] == []
    assert [problem for test in paper.tests if (problem := missing_test(test))] == []


@pytest.mark.parametrize("method", sorted(PUBLISHED))
def test_methods_and_papers_agree(method: str) -> None:
    """A method that gives itself a number is named by that paper."""
    by_number = {paper.number: paper for paper in PAPERS}
    for number in PUBLISHED[method].papers:
        assert method in by_number[number].implements, f"paper {number} does not name '{method}'"


def test_what_is_missing_is_found() -> None:
    """The checks above can fail."""
    assert not exists("kfack") and not exists("fxcurv.layers.conv.Convform") and not exists("nowhere.at.all")
    assert missing_test("tests/methods/test_absent.py") and missing_test("docs/x.py")
    assert missing_test("tests/methods/test_papers.py::test_absent")
    assert not missing_test("tests/methods/test_papers.py::test_what_is_missing_is_found")
