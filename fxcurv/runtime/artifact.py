"""Artifacts: a compiled method as a folder of text, written in one piece and loaded onto a model.

    forward.py    the tapped forward graph            update.fxc   the final update program: what ``load`` runs
    update.py     its slices as Python functions      kernels/     source of the kernels that claimed nodes
    history/      the program after each pass         report.json, report.html   what was found, cost, memory

A folder is written under a temporary name beside its place and then renamed, so a process killed at any moment leaves
the old folder or none, never a part of the new one. Nothing in it is code that loading executes: the program is parsed
and verified, the model is captured again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from fxcurv.errors import FxcurvError
from fxcurv.ir.program import Program
from fxcurv.ir.statistic import RowsOf, leaves, parse_statistic
from fxcurv.ir.text import parse_program
from fxcurv.layers.region import fits, place_of
from fxcurv.losses import Loss
from fxcurv.methods import PUBLISHED, Method
from fxcurv.methods.facts import Facts, gather
from fxcurv.passes.defer import Defer
from fxcurv.passes.detect import Detect
from fxcurv.passes.lower import Lower
from fxcurv.passes.manager import Compilation, Pass
from fxcurv.passes.memory import Memory
from fxcurv.passes.tap import TapPass
from fxcurv.passes.views import Views
from fxcurv.runtime.describe import FORMAT, describe, plain_target, unpack_loss
from fxcurv.runtime.example import zeros_like_text
from fxcurv.runtime.module import CurvatureModule
from fxcurv.runtime.pages import forward_page, html_page, kernel_pages, update_page
from fxcurv.runtime.transform import transform

REPORT, PROGRAM = "report.json", "update.fxc"


def save(module: CurvatureModule, folder: str | os.PathLike[str], *, force: bool = False, rows: int = 0) -> Path:
    """Write a transformed model's artifact; returns the folder.

    An older artifact is replaced, but one whose files were changed since by hand only with ``force``, and a folder
    that is something else never. rows: rows of a statistic that the report counts costs for (0: those of the example
    inputs). Raises :class:`FxcurvError` when the folder may not be replaced.
    """
    if not isinstance(module, CurvatureModule):
        raise FxcurvError("fxcurv.save takes a model made by fxcurv.transform.")
    target = Path(folder)
    _check_replaceable(target, force)
    files = artifact_files(module, rows)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.{os.getpid()}.", suffix=".tmp", dir=target.parent))
    try:
        fresh = scratch / "new"
        for name, text in files.items():
            path = fresh / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        if target.exists():
            target.rename(scratch / "old")
        fresh.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def artifact_files(module: CurvatureModule, rows: int = 0) -> dict[str, str]:
    """The content of an artifact, text by relative path; the report comes last and lists the digests of the others."""
    report = describe(module, rows)
    files = {"forward.py": forward_page(module), PROGRAM: module.program.text() + "\n"}
    files |= {"update.py": update_page(module), **kernel_pages(module)}
    before = ""
    for index, (record, entry) in enumerate(zip(module.history, report["passes"], strict=True)):
        entry["file"] = ""
        body = record.text.partition("\n")[2]
        if record.text and body != before:
            entry["file"] = f"history/{index:02d}-{record.name}.fxc"
            files[entry["file"]] = record.text + "\n"
        before = body
    files["report.html"] = html_page(module, report)
    report["files"] = {name: _digest(text.encode()) for name, text in files.items()}
    return {**files, REPORT: json.dumps(report, indent=1) + "\n"}


def read_report(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """``report.json`` of an artifact; raises :class:`FxcurvError` when the folder is none or of another format."""
    path = Path(folder) / REPORT
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = f"has no {REPORT}" if Path(folder).is_dir() else "does not exist"
        raise FxcurvError(f"'{folder}' is not an fxcurv artifact: it {what}.") from None
    except (OSError, ValueError) as error:
        raise FxcurvError(f"'{path}' cannot be read: {error}.") from None
    found = report.get("format") if isinstance(report, dict) else None
    if found != FORMAT:
        raise FxcurvError(f"'{folder}' has format {found!r} and this version reads {FORMAT!r}: compile it again.")
    return report  # type: ignore[no-any-return]


def read_program(path: Path) -> Program:
    """The program of a text file; raises :class:`FxcurvError` naming the file and the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FxcurvError(f"'{path}' cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    try:
        return parse_program(text)
    except FxcurvError as error:
        raise FxcurvError(f"{path}, {error}") from error


def load(
    folder: str | os.PathLike[str],
    model: nn.Module,
    *,
    method: str | Method | None = None,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    loss: Loss | nn.Module | str | None = None,
) -> CurvatureModule:
    """Put a model under an artifact's program; it computes what :func:`fxcurv.transform` would, bit for bit.

    method: only for an artifact of a ``Method`` object that has no published name. example_inputs, example_kwargs: a
    call of the model, to run the proofs of a transform again; without, the saved shapes serve for capture alone.
    loss: only for a loss class of the user's own.

    Raises :class:`FxcurvError` when the folder is no artifact or the model is not the one it was compiled for.
    """
    root = Path(folder)
    report = read_report(root)
    request, name = report["request"], report["method"]["name"]
    if request["method"] is None and method is None:
        raise FxcurvError(f"'{root}' was compiled with a Method object '{name}': pass the same object as method=.")
    chosen = request["method"] if method is None else method
    if isinstance(chosen, str) and chosen not in PUBLISHED:
        raise FxcurvError(f"'{root}' was compiled with the method '{chosen}', which this version does not have.")
    given = example_inputs is not None or example_kwargs is not None
    if not given and request["example"]:
        example_inputs = [zeros_like_text(text) for text in request["example"]["args"]]
        example_kwargs = {key: zeros_like_text(text) for key, text in request["example"]["kwargs"].items()}
    module = transform(
        model,
        chosen,
        example_inputs=example_inputs,
        example_kwargs=example_kwargs,
        loss=unpack_loss(report["loss"]) if loss is None else loss,
        frontend=request["frontend"],
        backend=request["backend"],
        layers=request["layers"],
        skip=request["skip"],
        fused=request.get("fused"),
        on_nonfinite=request["on_nonfinite"],
        passes=(Detect(), Read(str(root / PROGRAM), report["targets"]), TapPass(), Defer(), Views(), Memory(), Lower()),
        disable=[name for name in request["disable"] if name in ("defer", "views", "memory")],
        proofs=given,
        **request["hyper"],
    )
    module._engine.hyper.update(report["method"]["numbers"])
    return module


@dataclass(frozen=True)
class Read(Pass):
    """The program comes from a file, in place of being built; it must fit the layers that were detected."""

    path: str
    targets: Any
    name: ClassVar[str] = "read"
    needs: ClassVar[tuple[str, ...]] = ("model", "method")

    def run(self, c: Compilation) -> int:
        assert c.model is not None and c.method is not None
        c.facts = gather(c.model, c.layers, c.method.max_factor_dim, c.method.sharing, c.options.get("link", ""))
        c.program = read_program(Path(self.path))
        check_fit(c.program, c.facts, self.targets)
        return len(c.program)


def check_fit(program: Program, facts: Facts, targets: list[dict[str, Any]]) -> None:
    """Raise :class:`FxcurvError` for the first thing in which the model differs from the one that was compiled."""
    mine = {target.name: plain_target(target) for target in facts.targets}
    theirs = {target["name"]: target for target in targets}
    again = "compile it again for this model."
    for name in theirs:
        if name not in mine:
            raise FxcurvError(f"the artifact was compiled for a layer '{name}' that this model does not have; {again}")
    extra = next((name for name in mine if name not in theirs), None)
    if extra is not None:
        raise FxcurvError(f"this model has a layer '{extra}' that the artifact was not compiled for; {again}")
    for name, target in theirs.items():  # after the names: what a layer feeds depends on the others
        for part, value in target.items():
            if mine[name].get(part) != value:
                here = mine[name].get(part)
                raise FxcurvError(f"layer '{name}' has {part}={here} in this model, {value} in the artifact; {again}")
    for role, node in (program.inputs("grad") | program.inputs("param")).items():
        shape = _shape(role.key, facts)
        if shape is None:
            raise FxcurvError(f"the program reads the parameter '{role.key}', which this model does not have; {again}")
        if shape != node.meta["type"].shape:
            raise FxcurvError(
                f"parameter '{role.key}' has shape {shape} in this model and {node.meta['type'].shape} in the "
                f"artifact; {again}"
            )
    for role in program.outputs("update"):
        if _shape(role.key, facts) is None:
            raise FxcurvError(f"the program updates the parameter '{role.key}', which this model lacks; {again}")
    for role in program.inputs("stat"):
        expression = parse_statistic(role.key)
        for leaf in leaves(expression) if expression is not None else ():
            if isinstance(leaf, RowsOf) and leaf.layer not in mine:
                raise FxcurvError(f"the program measures a layer '{leaf.layer}' that this model does not have; {again}")


def _shape(key: str, facts: Facts) -> tuple[int, ...] | None:
    """Shape of a parameter, or of a region of one, ``None`` if the model does not have it."""
    try:
        place = place_of(key, facts.parameters)
    except FxcurvError:
        return None
    return place.shape(facts.parameters[place.name]) if fits(place, facts.parameters) else None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _check_replaceable(target: Path, force: bool) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir() or target.is_symlink():
        raise FxcurvError(f"'{target}' exists and is not a folder; choose another place to write to.")
    if not any(target.iterdir()):
        return
    try:
        report = read_report(target)
    except FxcurvError:
        raise FxcurvError(f"'{target}' holds something else than an fxcurv artifact; choose another folder.") from None
    known = {target / REPORT, *(target / name for name in report["files"])}
    foreign = next((path for path in target.rglob("*") if not _is_known(path, known)), None)
    if foreign is not None:
        raise FxcurvError(f"'{foreign}' does not belong to the artifact in that folder; move it away first.")
    if not force:
        for name, digest in report["files"].items():
            path = target / name
            if not path.is_file() or _digest(path.read_bytes()) != digest:
                raise FxcurvError(f"'{path}' was changed since it was compiled; force (--force) replaces it.")


def _is_known(path: Path, known: set[Path]) -> bool:
    return path.is_dir() or path in known or path.parent.name == "__pycache__"


def _remove_leftovers(target: Path) -> None:
    """Remove scratch folders for this target whose process is gone: it was killed while it wrote."""
    for path in target.parent.glob(f".{target.name}.*.tmp"):
        owner = path.name.removeprefix(f".{target.name}.").split(".")[0]
        if owner.isdigit() and not _alive(int(owner)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
