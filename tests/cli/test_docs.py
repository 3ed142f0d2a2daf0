"""``docs``: pages that say what docstrings and registries say, for every method, op, pass, kernel and verb."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fxcurv.cli.docs import _html, _markdown
from fxcurv.cli.docstring import Block, blocks, explained, mentioned, missing, sections
from fxcurv.cli.main import VERBS
from fxcurv.ir.op import OPS
from fxcurv.ir.text import parse_program
from fxcurv.methods import PUBLISHED
from fxcurv.methods.papers import load_papers
from fxcurv.passes import PIPELINE

Invoke = Callable[..., Any]

DOC = """Idea: in one sentence.

    More of it, U = V / S. floor: the least of S, e.g. 1e-3 of the mean. other, third: both; fourth: "a" or "b".
    A sentence with fifth=2 in it.

        U = G^-1 V

    - one: which goes
      on here;
    - two.

    Cost: much. Choose
    it for this and
    that. Choose it not otherwise.

    Source: somebody 1999. For a cost: nothing.
    """


def test_parts_of_a_docstring() -> None:
    found = sections(DOC)
    assert list(found) == ["Idea", "Cost", "Choose it", "Source"] and not missing(DOC)
    assert found["Cost"] == "much." and found["Source"] == "somebody 1999. For a cost: nothing."
    assert found["Choose it"] == "Choose it for this and\nthat.\n\nChoose it not otherwise."
    assert missing("Only this.\n\nThe Cost: of it.") == ["Cost:", "Choose it", "Source:"]


def test_blocks() -> None:
    found = blocks(sections(DOC)["Idea"])
    assert [block.kind for block in found] == ["p", "p", "code", "list"]
    assert found[2] == Block("code", ("U = G^-1 V",)) and found[3].items == ("one: which goes on here;", "two.")
    assert found[1].items[0].startswith("More of it") and found[1].items[0].endswith("fifth=2 in it.")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("floor", "The least of S, e.g. 1e-3 of the mean."),
        ("other", "Both"),
        ("fourth", '"a" or "b".'),
        ("fifth", ""),
        ("flo", ""),
    ],
)
def test_what_a_hyper_parameter_means(name: str, said: str) -> None:
    assert explained(name, DOC) == said


def test_where_a_hyper_parameter_is_mentioned() -> None:
    assert mentioned("fifth", DOC) == "A sentence with fifth=2 in it." and mentioned("sixth", DOC) == ""


def test_lines_are_no_markup() -> None:
    assert _markdown("z * (H z) and <U, V> of ``a*b`` and :class:`x.Y`, a_i") == (
        "z \\* (H z) and \\<U, V> of `a*b` and `x.Y`, a_i"
    )
    assert str(_html("<U> & ``a<b``")) == "&lt;U&gt; &amp; <code>a&lt;b</code>"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole reference as Markdown."""
    from typer.testing import CliRunner

    from fxcurv.cli.main import app

    folder = tmp_path_factory.mktemp("docs")
    result = CliRunner().invoke(app, ["docs", "-o", str(folder)])
    assert result.exit_code == 0, result.output
    return folder


@pytest.mark.parametrize("method", sorted(PUBLISHED))
def test_a_page_for_every_method(method: str, written: Path) -> None:
    text = (written / "methods" / f"{method}.md").read_text()
    assert text.startswith(f"# {method}\n\n")
    for name in PUBLISHED[method].defaults:
        row = re.search(rf"^\| {name} \| (.+?) \| (.*) \|$", text, re.MULTILINE)
        assert row, f"no row for {name}"
        assert row[2], f"nothing says what {name} of {method} means"
    for paper in load_papers():
        if method in paper.implements:
            assert f"Paper {paper.number}: {paper.title}" in text.replace("\\", "")
            assert all(f"`{test}`" in text for test in paper.tests)
    program = re.search(r"```text\n(update \{.*?\n\})\n```", text, re.DOTALL)
    assert program or "has no program of this method" in text
    if program:
        assert len(parse_program(program[1])) > 0
    assert f'fxcurv.transform(net, "{method}"' in text


def test_the_other_pages_are_complete(written: Path) -> None:
    assert all(f"\n## {name}\n" in (written / "ops.md").read_text() for name in OPS)
    assert all(f"\n## {step.name}\n" in (written / "passes.md").read_text() for step in PIPELINE)
    commands = (written / "commands.md").read_text()
    assert all(f"\n## fxcurv {name}\n" in commands for verbs in VERBS.values() for name in verbs)
    assert "| --methods, -m |" in commands and "| FILE[:NAME] |" in commands and "--debug" in commands
    papers = (written / "papers.md").read_text()
    assert all(f"| {paper.number} |" in papers for paper in load_papers())


def test_every_link_leads_somewhere(written: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", (written / "index.md").read_text())
    assert len(links) == len(PUBLISHED) + 5
    assert all((written / link).is_file() for link in links)
    assert {path.suffix for path in written.rglob("*") if path.is_file()} == {".md"}, "nothing half-written is left"


class Tags(HTMLParser):
    """Checks that tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html(tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in PUBLISHED if name not in ("kfac", "sgd", "foof")]:
        monkeypatch.delitem(PUBLISHED, name)
    listed = invoke("docs", "-o", tmp_path, "--format", "html").stdout
    assert "pages written to" in listed
    for path in tmp_path.rglob("*.html"):
        tags = Tags()
        tags.feed(path.read_text())
        assert not tags.open
    page = (tmp_path / "methods" / "kfac.html").read_text()
    assert "<h2>Cost</h2>" in page and 'href="../index.html"' in page and "update {" in page
    assert "--format pdf: choose one of md, html" in invoke("docs", "-o", tmp_path, "-f", "pdf", code=1).stderr


def test_help_waits_for_no_torch() -> None:
    import subprocess

    code = "import sys; from fxcurv.cli.main import app; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["False"]
