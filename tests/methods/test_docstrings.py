"""Every method says what it costs, when to choose it and where it comes from: its docstring is its page."""

from __future__ import annotations

import pytest

from fxcurv.cli.docpages import hyper_meaning
from fxcurv.cli.docstring import missing, sections
from fxcurv.methods import PUBLISHED
from fxcurv.methods.registry import COMMON


@pytest.mark.parametrize("method", sorted(PUBLISHED))
def test_a_docstring_has_all_parts(method: str) -> None:
    lacking = missing(PUBLISHED[method].doc)
    assert not lacking, f"the docstring of {method} lacks {', '.join(lacking)}"


@pytest.mark.parametrize("method", sorted(PUBLISHED))
def test_a_docstring_begins_with_its_summary(method: str) -> None:
    doc = PUBLISHED[method].doc
    first, _, rest = doc.partition("\n\n")
    assert "\n" not in first and first.endswith(".") and ": " in first, f"the first line of {method} is '{first}'"
    assert sections(doc)["Idea"] != first, f"the docstring of {method} has a summary and no equations"
    assert rest.strip()


@pytest.mark.parametrize("method", sorted(PUBLISHED))
def test_every_hyper_parameter_is_explained(method: str) -> None:
    published = PUBLISHED[method]
    silent = [name for name in published.defaults if name not in COMMON and not hyper_meaning(name, published)]
    assert not silent, f"the docstring of {method} does not say what {', '.join(silent)} means"
