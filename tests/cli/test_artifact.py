"""Artifacts: loaded numbers equal transformed ones bit for bit, folders appear whole or not at all."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import shutil
import signal
import tempfile
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
from fxcurv.runtime.artifact import _digest, read_report
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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_gradients": False},
        {"stale": "packed,bf16"},
        {"stagger": True, "solve_every": 3},
        {"disable": ("defer", "batch")},
    ],
)
def test_a_loaded_model_has_every_optimisation(options: dict[str, Any], tmp_path: Path) -> None:
    """Six equal layers, whose statistics are taken together and whose algebra is batched, and a wide one."""

    def deep() -> nn.Module:
        torch.manual_seed(0)
        layers = [layer for _ in range(5) for layer in (nn.Linear(6, 6), nn.Tanh())]
        return nn.Sequential(nn.Linear(5, 6), *layers, nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3))

    first = fxcurv.transform(deep(), "kfac", example_inputs=(X,), loss="cross_entropy", **options)
    second = fxcurv.load(fxcurv.save(first, tmp_path / "a"), deep())
    for one, other in zip(train(first), train(second), strict=True):
        assert torch.equal(one, other)


def test_the_program_in_the_folder_is_what_runs(tmp_path: Path) -> None:
    folder = fxcurv.save(fxcurv.transform(net(), "foof", loss="cross_entropy"), tmp_path / "a")
    program = folder / "update.fxc"
    program.write_text(program.read_text().replace("refresh=10", "refresh=2"))
    assert fxcurv.load(folder, net()).program.cadences["refresh"] == 2
    program.write_text(program.read_text().replace(" = ema_mean(", " = ema_meen(", 1))
    with pytest.raises(FxcurvError, match=r"update.fxc, line \d+: there is no op named 'ema_meen'"):
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
        one, two = ([inputs[role].clone() for role in current.inputs] for _ in range(2))  # statistics are overwritten
        found = functions["update_" + ("_".join(sorted(due)) or "nothing_else_due")](*one)
        for mine, theirs in zip(found, current.function(*two), strict=True):
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


def save_until_killed(model: fxcurv.CurvatureModule, target: Path, moment: int) -> None:
    """Save, and be killed at the given operation on the file system; a file is then half written."""
    count = 0

    def killed(owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def operation(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            if count == moment:
                if name == "write_text":
                    plain(arguments[0], arguments[1][: len(arguments[1]) // 2], **options)
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return plain(*arguments, **options)

        setattr(owner, name, operation)

    for name in ("write_text", "mkdir", "rename"):
        killed(Path, name)
    killed(tempfile, "mkdtemp")
    killed(shutil, "rmtree")
    fxcurv.save(model, target)
    os._exit(0)


@pytest.mark.parametrize("older", [False, True])
def test_killed_at_any_moment_there_is_a_whole_folder_or_none(older: bool, tmp_path: Path) -> None:
    target = tmp_path / "art"
    model, other = (fxcurv.transform(net(), name, loss="cross_entropy") for name in ("foof", "sgd"))
    processes = multiprocessing.get_context("fork")
    seen = set()
    for moment in range(100):
        if older and not target.exists():
            fxcurv.save(other, target)
        writer = processes.Process(target=save_until_killed, args=(model, target, moment))
        writer.start()
        writer.join()
        assert writer.exitcode in (0, -signal.SIGKILL)
        leftovers = [path for path in tmp_path.iterdir() if path != target]
        for path in leftovers:
            with pytest.raises(FxcurvError, match="is not an fxcurv artifact"):
                fxcurv.load(path, net())
        if target.exists():
            report = read_report(target)
            assert all(_digest((target / name).read_bytes()) == digest for name, digest in report["files"].items())
            seen.add(report["method"]["name"])
        elif older:  # killed between the two renames: the old one is beside it
            assert read_report(next(leftover / "old" for leftover in leftovers))["method"]["name"] == "sgd"
        else:
            seen.add("nothing")
        if writer.exitcode == 0:
            break
        if target.exists() and report["method"]["name"] == "foof":
            shutil.rmtree(target)
    assert writer.exitcode == 0 and moment > 10
    assert seen == ({"sgd", "foof"} if older else {"nothing", "foof"})
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
