"""Artifacts: loaded numbers equal transformed ones bit for bit, folders appear whole or not at all."""

from __future__ import annotations

import json
import multiprocessing
import runpy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import FxcurvError
from fxcurv.ir.program import STEP
from fxcurv.losses import BCE, CrossEntropy
from fxcurv.passes.validate import random_inputs
from fxcurv.runtime.artifact import read_report
from fxcurv.runtime.describe import pack_loss, reachable, unpack_loss

X = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(7) % 3


def net(width: int = 6, last: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3)]
    return nn.Sequential(*(layers if last else layers[:1]))


def train(model: fxcurv.CurvatureModule, steps: int = 7) -> list[Tensor]:
    opt = fxcurv.optimizer(model, lr=0.1)
    for _ in range(steps):
        opt.zero_grad()
        outputs = model(X)
        loss = nn.functional.cross_entropy(outputs, Y)
        model.backward(loss, outputs)
        opt.step()
    return [p.detach().clone() for p in model.parameters()] + list(model.state_dict().values())


@pytest.mark.parametrize(
    ("method", "hyper"),
    [
        ("kfac", {"solve_every": 3, "damping_scheme": "eigenvalue"}),
        ("kfac", {"factor_every": 2, "solve_every": 4, "kl_clip": None}),
        ("ekfac", {"solve_every": 3, "fisher": "ggn"}),
        ("shampoo", {"solve_every": 2}),
    ],
)
def test_a_loaded_model_computes_what_the_transformed_one_does(method: str, hyper: Any, tmp_path: Path) -> None:
    first = fxcurv.transform(net(), method, example_inputs=(X,), loss="cross_entropy", **hyper)
    folder = fxcurv.save(first, tmp_path / "a")
    second = fxcurv.load(folder, net())
    third = fxcurv.load(fxcurv.save(second, tmp_path / "b"), net(), example_inputs=(X,))
    expected = train(first)
    for model in (second, third):
        assert model.program.text() == first.program.text()
        for mine, theirs in zip(train(model), expected, strict=True):
            assert torch.equal(mine, theirs)


def test_the_program_in_the_folder_is_what_runs(tmp_path: Path) -> None:
    folder = fxcurv.save(fxcurv.transform(net(), "foof", loss="cross_entropy"), tmp_path / "a")
    program = folder / "update.fxc"
    program.write_text(program.read_text().replace("refresh=10", "refresh=2"))
    assert fxcurv.load(folder, net()).program.cadences["refresh"] == 2
    program.write_text(program.read_text().replace(" = mean(", " = meen(", 1))
    with pytest.raises(FxcurvError, match=r"update.fxc, line \d+: there is no op named 'meen'"):
        fxcurv.load(folder, net())


def test_changed_numbers_and_losses_are_kept(tmp_path: Path) -> None:
    loss = CrossEntropy(label_smoothing=0.1, ignore_index=2, weight=[0.3, 1.0, 2.0])
    model = fxcurv.transform(net(), "kfac", loss=loss)
    model.hyper["damping"] = 0.125
    loaded = fxcurv.load(fxcurv.save(model, tmp_path / "a"), net())
    assert loaded.hyper == model.hyper and loaded._engine.loss == loss
    assert unpack_loss(json.loads(json.dumps(pack_loss(BCE(reduction="batchmean"))))) == BCE(reduction="batchmean")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: net(width=7), r"layer '0' has d_out=7 in this model, 6 in the artifact"),
        (lambda: net(last=False), r"layer '2' that this model does not have"),
        (lambda: nn.Sequential(*net(), nn.Linear(3, 3)), r"this model has a layer '3' that the artifact was not"),
    ],
)
def test_another_model_is_refused(other: Any, message: str, tmp_path: Path) -> None:
    folder = fxcurv.save(fxcurv.transform(net(), "kfac", loss="cross_entropy"), tmp_path / "a")
    with pytest.raises(FxcurvError, match=message):
        fxcurv.load(folder, other())


def test_tensorwise_programs_check_parameters(tmp_path: Path) -> None:
    folder = fxcurv.save(fxcurv.transform(net(), "shampoo"), tmp_path / "a")
    with pytest.raises(FxcurvError, match=r"parameter '0.weight' has shape \(7, 5\) in this model and \(6, 5\)"):
        fxcurv.load(folder, net(width=7))


def test_a_method_object_has_to_be_given_again(tmp_path: Path) -> None:
    method = fxcurv.methods.kfac(damping=0.5, solve_every=2)
    first = fxcurv.transform(net(), method, loss="cross_entropy")
    folder = fxcurv.save(first, tmp_path / "a")
    with pytest.raises(FxcurvError, match="Method object 'kfac': pass the same object as method="):
        fxcurv.load(folder, net())
    second = fxcurv.load(folder, net(), method=method)
    for mine, theirs in zip(train(second), train(first), strict=True):
        assert torch.equal(mine, theirs)


def test_no_folder_of_another_kind_is_ever_replaced(tmp_path: Path) -> None:
    model = fxcurv.transform(net(), "kfac", loss="cross_entropy")
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(FxcurvError, match="something else than an fxcurv artifact"):
            fxcurv.save(model, other, force=force)
    assert (other / "chapter1.txt").read_text() == "years of work"
    folder = fxcurv.save(model, tmp_path / "a")
    fxcurv.save(model, folder)  # untouched: replaced
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FxcurvError, match="notes.txt' does not belong to the artifact"):
        fxcurv.save(model, folder, force=True)
    (folder / "notes.txt").unlink()
    (folder / "update.fxc").write_text("edited")
    with pytest.raises(FxcurvError, match="update.fxc' was changed"):
        fxcurv.save(model, folder)
    fxcurv.save(model, folder, force=True)
    assert (folder / "update.fxc").read_text() != "edited"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "thesis"]


def test_a_folder_without_report_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(FxcurvError, match="is not an fxcurv artifact: it has no report.json"):
        fxcurv.load(tmp_path, net())
    with pytest.raises(FxcurvError, match="is not an fxcurv artifact: it does not exist"):
        fxcurv.load(tmp_path / "no", net())


def test_update_py_runs_and_equals_the_slices(tmp_path: Path) -> None:
    model = fxcurv.transform(net(), "ekfac", example_inputs=(X,), loss="cross_entropy", factor_every=2, solve_every=4)
    folder = fxcurv.save(model, tmp_path / "a")
    functions = runpy.run_path(str(folder / "update.py"))
    lowered = model._engine.lowered
    inputs = random_inputs(lowered.program, double=False)
    names = {"update_nothing_else_due", "update_statistics", "update_refresh_statistics"}
    assert {name for name in functions if name.startswith("update_")} == names
    for due in reachable(lowered.program.cadences):
        current = lowered.slice(due)
        values = [inputs[role] for role in current.inputs]
        found = functions["update_" + ("_".join(sorted(due)) or "nothing_else_due")](*values)
        for mine, theirs in zip(found, current.function(*values), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("periods", [(1, 1), (1, 10), (2, 4), (4, 2), (2, 3), (3, 3), (6, 4)])
def test_reachable_sets_are_those_of_the_schedule(periods: tuple[int, int]) -> None:
    cadences = {STEP: 1, "statistics": periods[0], "refresh": periods[1]}
    seen = {frozenset(n for n, p in cadences.items() if n != STEP and step % p == 0) for step in range(60)}
    assert set(reachable(cadences)) == seen


def test_the_page_stands_alone(tmp_path: Path) -> None:
    folder = fxcurv.save(fxcurv.transform(net(), "kfac", example_inputs=(X,), loss="cross_entropy"), tmp_path / "a")
    page = (folder / "report.html").read_text()
    assert "http" not in page and "<script" not in page and "<link" not in page
    assert "kron_apply(" in page and "prefers-color-scheme: dark" in page and len(page) < 100_000
    assert (folder / "forward.py").read_text().count("fxcurv_passes_tap_tap") == 2
    compile((folder / "forward.py").read_text(), "forward.py", "exec")
    assert "potri" in (folder / "kernels" / "aten_inverse.py").read_text()
    assert read_report(folder)["program"]["slices"] == [["statistics"], ["refresh", "statistics"]]


def write_forever(target: Path, ready: Any) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6) for _ in range(12)]
    model = fxcurv.transform(nn.Sequential(*layers), "kfac", loss="cross_entropy")
    fxcurv.save(model, target)
    ready.set()
    while True:
        fxcurv.save(model, target)


def test_killed_at_any_moment_there_is_a_whole_folder_or_none(tmp_path: Path) -> None:
    """A process that does nothing but write one artifact over and over is killed at many moments."""
    target = tmp_path / "art"
    processes = multiprocessing.get_context("fork")
    leftovers = 0
    for delay in (0.0, 0.01, 0.02, 0.03, 0.045, 0.06, 0.075, 0.09, 0.12):
        ready = processes.Event()
        writer = processes.Process(target=write_forever, args=(target, ready))
        writer.start()
        assert ready.wait(60)
        time.sleep(delay)
        writer.kill()
        writer.join()
        if target.exists():
            report = read_report(target)
            assert all((target / name).is_file() for name in report["files"])
        for other in tmp_path.iterdir():
            if other != target:
                leftovers += 1
                with pytest.raises(FxcurvError, match="is not an fxcurv artifact"):
                    fxcurv.load(other, net())
    assert leftovers  # or no kill hit a write, and nothing was tested
    fxcurv.save(fxcurv.transform(net(), "kfac", loss="cross_entropy"), target, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["art"]  # leftovers of the dead are swept


def test_a_failure_while_writing_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fxcurv.transform(net(), "kfac", loss="cross_entropy")
    folder = fxcurv.save(model, tmp_path / "a")
    before = (folder / "report.json").read_text()
    plain = Path.write_text

    def full(self: Path, *rest: Any, **more: Any) -> int:
        if self.name == "report.json":
            raise OSError(28, "No space left on device")
        return plain(self, *rest, **more)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        fxcurv.save(model, folder)
    monkeypatch.undo()
    assert (folder / "report.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
