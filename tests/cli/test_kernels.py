"""``fxcurv kernels --aot`` and ``fxcurv inspect --kernels``: compiled without a GPU, shown without anything."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from fxcurv.kernels import aot

Invoke = Callable[..., Any]


def test_aot_prints_what_the_compilers_say(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    text = invoke("kernels", "triangle_pack", "--aot", "--jobs", 1).stdout
    assert "Compiled" in text and "Traffic" in text
    for target in ("sm_80", "sm_90", "gfx942"):
        assert re.search(rf"triangle_pack +fp32-38-1 +{target} +triangle_pack_kernel +\d+ +0 +\d+ +0 ", text)
    assert re.search(r"triangle_pack +fp32-38-1 +sm_90 +1 +11\.9 KB +17\.5 KB +0\.68 .* memory", text)


def test_aot_prints_json(invoke_json: Invoke) -> None:
    found = invoke_json("kernels", "gram_packed", "--aot", "--jobs", 1)
    assert {b["arch"] for b in found["binaries"]} == set(aot.TARGETS)
    assert all(b["spills"] == 0 < b["tensor_cores"] for b in found["binaries"] if b["kernel"] == "gram_kernel")
    assert {
        "family",
        "variant",
        "arch",
        "kernel",
        "registers",
        "spills",
        "shared",
        "tensor_cores",
        "warps",
        "seconds",
    } == set(found["binaries"][0])
    assert all(one["ratio"] == pytest.approx((one["read"] + one["written"]) / one["floor"]) for one in found["traffic"])


def test_aot_refusals(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "there is no kernel family 'nope'; there are" in invoke("kernels", "nope", "--aot", code=1).stderr
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *package: None)
    assert "--aot needs the package triton" in invoke("kernels", "--aot", code=1).stderr


def test_kernels_lists_the_generated_ones(invoke_json: Invoke) -> None:
    (gram,) = (
        k for k in invoke_json("kernels") if k["backend"] == "triton" and k["op"] == "gram" and k["name"] == "gram"
    )
    assert (
        gram["summary"].startswith("Sums of r r^T over rows")
        and gram["when"] == "Rows of float32, bfloat16 or float16 with known groups and features."
    )


def test_inspect_shows_sources_that_stand_alone(
    model_file: Path, tmp_path: Path, invoke: Invoke, invoke_json: Invoke
) -> None:
    found = invoke_json("inspect", model_file, "--kernels", "--backend", "triton")
    assert any(name.startswith("gram_d6_fp32_") for name in found)
    assert all("@triton.jit" in text and ast.parse(text) for text in found.values())
    printed = invoke("inspect", model_file, "--kernels", "--backend", "triton").stdout
    assert all(name in printed for name in found) and "def launch(" in printed
    invoke("compile", model_file, "--backend", "triton", "-o", tmp_path / "out")
    assert invoke_json("inspect", tmp_path / "out", "--kernels") == found
    assert {
        path.stem: path.read_text() for path in (tmp_path / "out" / "kernels").glob("gram_*.py")
    }.items() <= found.items()


def test_inspect_says_when_nothing_was_generated(model_file: Path, invoke: Invoke) -> None:
    assert "no kernel was generated" in invoke("inspect", model_file, "--kernels", "--backend", "aten").stdout
