"""Every variant of every kernel family in Triton's interpreter: against float64, and its traffic against the model.

One process runs the variants of all families that this session tests; each variant is a test of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from fxcurv.errors import FxcurvError
from fxcurv.kernels import interpret
from fxcurv.kernels.interpret import Outcome
from fxcurv.kernels.triton import FAMILIES

Outcomes = dict[tuple[str, str], Outcome]


def cases() -> Iterator[Any]:
    for family in FAMILIES.values():
        for variant in family.variants():
            if variant.run:
                yield pytest.param(family.name, variant.name, id=f"{family.name}-{variant.name}")


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    """The outcomes of the families of all tests that were selected."""
    chosen = {
        item.callspec.params["family"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.module is request.module and "outcomes" in item.fixturenames
    }
    return interpret.outcomes(sorted(chosen))


@pytest.mark.parametrize(("family", "variant"), list(cases()))
def test_variant(family: str, variant: str, outcomes: Outcomes) -> None:
    found = outcomes[family, variant]
    assert not found.problem
    assert found.error <= found.tolerance
    assert found.modelled_load == pytest.approx(found.loaded, rel=0.05)
    assert found.modelled_store == pytest.approx(found.stored, rel=0.05)


def test_names_of_variants_are_unique() -> None:
    for family in FAMILIES.values():
        names = [variant.name for variant in family.variants()]
        assert len(set(names)) == len(names), family.name


def test_every_family_varies_sizes_and_dtypes() -> None:
    """At least one odd size, and more than one dtype of operands unless a family exists for one alone."""
    for family in FAMILIES.values():
        shapes = {size for v in family.variants() if v.run for x in interpret.tensors(v.operands()) for size in x.shape}
        assert any(size % 2 and size > 1 for size in shapes), family.name


HARNESS = """
import json, os, sys
os.environ["TRITON_INTERPRET"] = "1"
from pathlib import Path
import torch
from fxcurv.kernels import generator, interpret
from fxcurv.kernels.triton.family import Family, Traffic, Variant, normal

generator.TEMPLATES = Path(sys.argv[1])
found = {}
for fault in ("none", "unwritten", "operand", "shared", "shape", "crash", "dtype"):
    family = Family(
        fault, "neg", "neg.jinja", "", lambda *types: None, lambda x: 1 - x.double() - 1, lambda: (),
        lambda values, x: Traffic(4 * x.numel(), 4 * x.numel(), 0), "Negation.",
    )
    variant = Variant("v", {"fault": fault}, lambda: (normal(5),))
    outcome = interpret.interpret(family, variant)
    found[fault] = [outcome.correct, outcome.error, outcome.problem, outcome.loaded, outcome.stored, outcome.launches]
print(json.dumps(found))
"""
NEGATION = """
@triton.jit
def neg_kernel(x_ptr, out_ptr, n):
    at = tl.arange(0, 8)
    value = tl.load(x_ptr + at, mask=at < n)
    tl.store(out_ptr + at, -value, mask=at < n{{ " - 1" if fault == "unwritten" }})
{% if fault == "operand" %}
    tl.store(x_ptr + at, value + 1, mask=at < 1)
{% endif %}


def launch(x):
    out = torch.empty_like(x{{ "[1:]" if fault == "shape" }}{{ ", dtype=torch.float64" if fault == "dtype" }})
    neg_kernel[(1,)](x, {{ "missing" if fault == "crash" else "out" }}, x.numel())
    return {{ "x.neg_()" if fault == "shared" else "out" }}
"""


def test_the_harness_sees_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "neg.jinja").write_text(NEGATION)
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": root, "FXCURV_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["none"] == [True, 0.0, "", 20, 20, 1]
    assert found["unwritten"][:3] == [False, float("inf"), ""] and found["unwritten"][4] == 16
    assert {fault: found[fault][2] for fault in ("operand", "shared", "shape", "dtype")} == {
        "operand": "an operand was written",
        "shared": "an operand was written",
        "shape": "results have shapes [(4,)], not [(5,)]",
        "dtype": "results have dtypes [torch.float64], the op's [torch.float32]",
    }
    assert found["crash"][2].startswith("launch failed: NameError: name 'missing'")
    assert not any(found[fault][0] for fault in found if fault != "none")


def test_a_process_that_dies_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.dumps(dict.fromkeys(Outcome.__dataclass_fields__, 0) | {"family": "gram", "variant": "big"})
    for stdout, place in ((line + "\n", "after gram big"), ("", "before the first variant")):
        done = subprocess.CompletedProcess([], -11, stdout, "noise\nSegmentation fault\n")
        monkeypatch.setattr(subprocess, "run", lambda *args, done=done, **kwargs: done)
        with pytest.raises(FxcurvError, match=f"ended {place}: Segmentation fault"):
            interpret.outcomes(["gram"])
