"""Sources: deterministic, readable, standing alone; the cache: atomic, private, never trusted."""

from __future__ import annotations

import ast
import os
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fxcurv.errors import FxcurvError
from fxcurv.kernels import generator
from fxcurv.kernels.aot import TARGETS
from fxcurv.kernels.generator import Source, cache_folder, load, render, tidy, write
from fxcurv.kernels.triton import FAMILIES
from fxcurv.kernels.tuned import ARCHITECTURES, lookup, table


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FXCURV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("arch", ["sm_80", "interpret"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_sources_are_readable_python_that_stands_alone(family: str, arch: str) -> None:
    for variant in FAMILIES[family].variants():
        source = FAMILIES[family].source(variant.geometry, arch)
        assert not list(unreadable(source, variant.geometry)), (variant.name, source.text)


def unreadable(source: Source, geometry: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a generated file."""
    tree, lines = ast.parse(source.text), source.text.splitlines()
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    if imported != {"__future__", "torch", "triton", "triton.language"}:
        yield f"imports {imported}"
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if "launch" not in functions or len(functions) < 2:
        yield f"functions {list(functions)}"
    yield from (f"{name} has no docstring" for name, node in functions.items() if not ast.get_docstring(node))
    head = " ".join((ast.get_docstring(tree) or "").split())
    yield from (
        f"{key} is not in the head" for key, value in geometry.items() if f"{key} = {value}".rstrip() not in head
    )
    yield from (f"long line: {line}" for line in lines if len(line) > 120)
    yield from (f"blanks end: {line}" for line in lines if line != line.rstrip())
    for name, node in functions.items():
        for argument in node.args.args:
            if argument.arg.endswith("_ptr") and "#" not in lines[argument.lineno - 1]:
                yield f"{name} does not say what {argument.arg} points to"
    for word in (".item()", ".cpu()", ".tolist()", "atomic_", "synchronize"):
        if word in source.text:
            yield f"uses {word}"


@pytest.mark.parametrize("family", list(FAMILIES))
def test_rendering_is_deterministic_and_names_are_identifiers(family: str) -> None:
    variant = next(iter(FAMILIES[family].variants()))
    one, two = (FAMILIES[family].source(variant.geometry, "sm_90") for _ in range(2))
    assert one == two and one.name.isidentifier()


def test_a_missing_variable_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.jinja").write_text("def f(): return {{ nothing }}\n")
    monkeypatch.setattr(generator, "TEMPLATES", tmp_path)
    generator._environment.cache_clear()
    with pytest.raises(FxcurvError, match="t.jinja cannot be rendered: 'nothing' is undefined"):
        render("t.jinja", title="t.", label="t", geometry={})
    with pytest.raises(FxcurvError, match="'d' is given by the geometry and by the tuning table"):
        render("t.jinja", title="t.", label="t", geometry={"d": 1}, config={"d": 2})
    generator._environment.cache_clear()


SOURCE = Source("small", '"""A module."""\n\n\ndef launch(x):\n    """x + 1"""\n    return x + 1\n', "ab" * 32)


def test_equal_sources_are_one_module_whose_text_is_in_the_cache(cache: Path) -> None:
    pytest.importorskip("triton")
    load.cache_clear()
    module = load(SOURCE)
    assert load(Source(*(str(part) for part in (SOURCE.name, SOURCE.text, SOURCE.key)))) is module
    assert module.launch(1) == 2
    path = Path(str(module.__file__))
    assert path.read_text() == SOURCE.text and path.parent == cache / "generated"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_file_that_was_changed_is_not_run(cache: Path) -> None:
    pytest.importorskip("triton")
    load.cache_clear()
    path = Path(str(load(SOURCE).__file__))
    path.write_text(SOURCE.text.replace("+ 1", "+ 2"))
    load.cache_clear()
    assert load(SOURCE).launch(1) == 2
    assert path.read_text() == SOURCE.text


def test_a_source_that_fails_leaves_no_module(cache: Path) -> None:
    pytest.importorskip("triton")
    broken = Source("broken", "raise ValueError('no')\n", "cd" * 32)
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            load(broken)
    assert not any(name.startswith("fxcurv_generated.broken") for name in sys.modules)


def test_the_cache_belongs_to_the_user_alone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cache_folder("generated")
    assert [stat.S_IMODE(path.stat().st_mode) for path in (cache, folder)] == [0o700, 0o700]
    folder.chmod(0o777)
    assert stat.S_IMODE(cache_folder("generated").stat().st_mode) == 0o700
    monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
    with pytest.raises(FxcurvError, match="belongs to another user; set FXCURV_CACHE"):
        cache_folder("generated")


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FXCURV_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(FxcurvError, match=r"file/cache' cannot be used: .*; set FXCURV_CACHE"):
        cache_folder()


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kernel.py"
    write(path, "old")

    def refuse(*paths: Any) -> None:
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk"):
        write(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_without_triton_the_message_says_what_to_install(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "find_spec", lambda name: None)
    load.cache_clear()
    with pytest.raises(FxcurvError, match="pip install"):
        load(SOURCE)


def test_rendering_imports_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from fxcurv.kernels.triton import FAMILIES\n"
        "names = [f.source(v.geometry, 'sm_90').name for f in FAMILIES.values() for v in f.variants()]\n"
        "print(len(names) > 10)"
    )
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "True", done.stderr


def test_the_first_entry_that_fits_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = (
        {"arch": ["sm_80"], "when": {"d": [1, 64], "dtype": "fp32"}, "use": {"block": 1}},
        {"arch": ["sm_80", "sm_90"], "when": {"d": [1, 64]}, "use": {"block": 2}},
        {"use": {"block": 3}},
    )
    module = sys.modules[lookup.__module__]
    monkeypatch.setattr(module, "table", lambda family: entries)
    found = [
        lookup("f", arch, {"d": d, "dtype": dtype})["block"]
        for arch, d, dtype in (
            ("sm_80", 64, "fp32"), ("sm_80", 64, "bf16"), ("sm_80", 65, "fp32"), ("sm_90", 1, "fp32"),
            ("gfx942", 1, ""),
        )
    ]  # fmt: skip
    assert found == [1, 2, 3, 2, 3]
    monkeypatch.setattr(module, "table", lambda family: entries[:1])
    with pytest.raises(FxcurvError, match="no entry for sm_90"):
        lookup("f", "sm_90", {"d": 1})


@pytest.mark.parametrize("family", list(FAMILIES))
def test_tuning_tables_end_with_a_default_and_name_known_targets(family: str) -> None:
    entries = table(FAMILIES[family].tuned or family)
    assert set(TARGETS) | {"interpret"} == set(ARCHITECTURES)
    for entry in entries:
        assert set(entry) <= {"arch", "when", "use"} and set(entry.get("arch", ())) <= set(ARCHITECTURES)
    assert not entries or set(entries[-1]) == {"use"}


def test_architecture_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from fxcurv.kernels.triton import family

    def found() -> str:
        family.architecture.cache_clear()
        return family.architecture()

    assert found() == "sm_90"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (8, 6))
    assert found() == "sm_86"
    monkeypatch.setattr(torch.version, "hip", "6.0")
    named = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: named)
    assert found() == "gfx942"
    family.architecture.cache_clear()


def test_tidy_text_has_blank_lines_between_definitions_alone() -> None:
    body = "\n\nA = 1\n@jit\ndef f(\n    x,\n):\n\n    y = x   \n\n    return y\n# g\n@jit\ndef g():\n    pass\nB = 2\n"
    parts = [
        "A = 1\n",
        "@jit\ndef f(\n    x,\n):\n    y = x\n    return y\n",
        "# g\n@jit\ndef g():\n    pass\n",
        "B = 2\n",
    ]
    assert tidy(body) == "\n\n".join(parts)
