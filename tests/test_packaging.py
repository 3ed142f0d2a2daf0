"""The package tables of pyproject.toml against the folders on disk, and the import paths that they promise.

setuptools is given an explicit list, because three sub-packages lie beside ``fxcurv/``; a folder missing from the list
works in a checkout and is absent from the wheel, so the list is compared with what is there.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings tomli where the standard library has no TOML reader
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS: dict[str, Any] = PYPROJECT["tool"]["setuptools"]
BESIDE = ("cli", "kernels", "passes")  # installed as fxcurv.cli, fxcurv.kernels, fxcurv.passes


def packages_on_disk() -> dict[str, Path]:
    """Package name -> folder, for every folder with Python files under the package's top-level folders."""

    def folders(top: Path, name: str) -> Iterator[tuple[str, Path]]:
        for folder in [top, *(p for p in sorted(top.rglob("*")) if p.is_dir())]:
            if any(folder.glob("*.py")):
                yield ".".join((name, *folder.relative_to(top).parts)), folder

    found = dict(folders(ROOT / "fxcurv", "fxcurv"))
    for top in BESIDE:
        found |= folders(ROOT / top, f"fxcurv.{top}")
    return found


def test_packages_equal_the_folders() -> None:
    assert sorted(SETUPTOOLS["packages"]) == sorted(packages_on_disk())


def test_packages_are_listed_once_and_in_order() -> None:
    assert SETUPTOOLS["packages"] == sorted(set(SETUPTOOLS["packages"]))


def test_every_folder_with_python_files_is_a_package() -> None:
    assert [str(p) for p in packages_on_disk().values() if not (p / "__init__.py").exists()] == []


def test_package_dir_leads_to_the_folders() -> None:
    mapping: dict[str, str] = SETUPTOOLS["package-dir"]

    def resolve(name: str) -> Path:
        """setuptools' rule: the longest listed prefix names the folder, the rest of the name goes below it."""
        parts = name.split(".")
        prefix = next(n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in mapping)
        return ROOT.joinpath(mapping[".".join(parts[:prefix])], *parts[prefix:])

    assert {name: resolve(name) for name in packages_on_disk()} == packages_on_disk()


def test_data_files_match_a_package_data_pattern() -> None:
    """A file that is neither Python nor matched by package-data would be missing from the wheel."""
    patterns: list[str] = SETUPTOOLS["package-data"]["*"]
    packages = packages_on_disk()
    packed = {p for folder in packages.values() for pattern in patterns for p in folder.glob(pattern)}
    there = {
        p
        for top in ("fxcurv", *BESIDE)
        for p in (ROOT / top).rglob("*")
        if p.is_file() and p.suffix not in (".py", ".pyc") and not p.name.startswith(".")
    }
    assert sorted(map(str, there - packed)) == []


def test_readme_is_in_the_metadata() -> None:
    has_readme = (ROOT / "README.md").exists()
    assert (PYPROJECT["project"].get("readme") == "README.md") == has_readme


def test_torch_is_bounded_first_in_the_constraints() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins[0].startswith("torch==")
    assert [pin for pin in pins if "==" not in pin.split(";")[0]] == []


@pytest.mark.parametrize("top", BESIDE)
def test_folders_beside_the_package_are_its_sub_packages(top: str) -> None:
    module = importlib.import_module(f"fxcurv.{top}")
    assert module.__name__ == f"fxcurv.{top}"


@pytest.mark.parametrize("cwd", [ROOT, ROOT / "tests"], ids=["root", "elsewhere"])
@pytest.mark.parametrize("top", BESIDE)
def test_import_in_a_fresh_process(top: str, cwd: Path) -> None:
    """In the root the checkout is found through the working directory, elsewhere through PYTHONPATH."""
    env = os.environ | {"PYTHONPATH": str(ROOT)} if cwd != ROOT else os.environ
    code = f"import fxcurv.{top}; print(fxcurv.{top}.__name__)"
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, f"fxcurv.{top}"), result.stderr
