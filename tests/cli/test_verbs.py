"""Every verb: what it prints, its JSON, its exit code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fxcurv
from fxcurv.cli.modelfile import load_model_file
from fxcurv.errors import FxcurvError
from fxcurv.methods.papers import load_papers

ROOT = Path(__file__).resolve().parents[2]
Invoke = Callable[..., Any]


def test_help_does_not_import_torch() -> None:
    """Nor rich's renderer or anything else heavy: the help is typer's alone."""
    code = (
        "import sys; sys.argv = ['fxcurv', '--help']\n"
        "from fxcurv.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as exit: code = exit.code\n"
        "print(code, sorted({'torch', 'numpy', 'networkx', 'jinja2'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "0 []", done.stdout + done.stderr
    assert all(verb in done.stdout for verb in ("compile", "train", "inspect", "check", "opt", "papers", "kernels"))


def test_the_module_runs_and_colours_stay_out_of_pipes(model_file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fxcurv.cli", "inspect", str(model_file), "--method", "nope"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "FORCE_COLOR": "", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: there is no method 'nope'; ")
    assert "\x1b" not in done.stderr


def test_compile_says_what_it_found_and_writes_it(model_file: Path, tmp_path: Path, invoke: Invoke) -> None:
    text = invoke("compile", model_file, "--method", "ekfac", "-o", tmp_path / "out", "--damping", "0.02").stdout
    assert "1 x 8 x 6" in text and "first.weight, first.bias" in text
    assert "Not covered" in text and "gain" in text
    assert all(word in text for word in ("Graphs", "Passes", "Kernels", "Cost for 6 rows", "refresh", "states take"))
    assert f"written to {tmp_path / 'out'}" in text
    model = load_model_file(str(model_file)).model
    assert fxcurv.load(tmp_path / "out", model).hyper["damping"] == 0.02


def test_compile_prints_json(model_file: Path, tmp_path: Path, invoke_json: Invoke) -> None:
    found = invoke_json(
        "compile", model_file, "-o", tmp_path / "o", "--set", "damping_scheme=sqrt", "--kl-clip", "none",
        "--skip", "last", "--disable", "share", "--rows", 100,
    )  # fmt: skip
    assert found["request"]["hyper"] == {"lr": 0.05, "damping_scheme": "sqrt", "kl_clip": None}
    assert [layer["name"] for layer in found["layers"]] == ["first"]
    assert "share" not in [step["name"] for step in found["passes"]]
    assert found["cost"]["rows"] == 100
    rows = {row["parameter"]: row for row in found["report"]["rows"]}
    assert rows["last.weight"]["reason"] == "its layer was skipped"
    assert rows["gain"]["status"] == "gradient only"


def test_fused_layers_are_divided(model_file: Path, tmp_path: Path, invoke: Invoke, invoke_json: Invoke) -> None:
    found = invoke_json("compile", model_file, "-o", tmp_path / "o", "--fused", "fir*=2")
    assert [layer["name"] for layer in found["layers"]][:2] == ["first[0:4]", "first[4:8]"]
    assert found["request"]["fused"] == {"fir*": 2}
    assert "first[4:8]" in invoke("check", model_file, "--fused", "first=2").stdout
    assert "PATTERN=N" in invoke("inspect", model_file, "--fused", "first", code=1).stderr
    assert "fits no layer" in invoke("train", model_file, "--fused", "other=2", "--steps", 1, code=1).stderr


def test_inspect_shows_both_graphs_at_any_stage(model_file: Path, invoke: Invoke) -> None:
    both = invoke("inspect", model_file).stdout
    assert "fxcurv_passes_tap_tap" in both and "kron_apply(" in both
    assert "kron_apply" not in invoke("inspect", model_file, "--graph", "forward").stdout
    after = invoke("inspect", model_file, "--after", "build").stdout
    assert "stat['first.a']" in after and "gram(" in after
    diff = invoke("inspect", model_file, "--diff", "sink").stdout
    assert any(line.startswith("-") and "stat['first.a']" in line for line in diff.splitlines())
    assert any(line.startswith("+") and "stat['gram(first.a)']" in line for line in diff.splitlines())
    assert "gradient only" in invoke("inspect", model_file, "--coverage").stdout


def test_inspect_reads_artifacts_and_program_text(
    model_file: Path, tmp_path: Path, invoke: Invoke, invoke_json: Invoke
) -> None:
    folder = tmp_path / "art"
    invoke("compile", model_file, "-o", folder)
    model_text = invoke("inspect", model_file, "--graph", "program").stdout
    assert invoke("inspect", folder, "--graph", "program").stdout == model_text
    assert invoke("inspect", folder / "update.fxc", "--graph", "program").stdout == model_text
    assert invoke("inspect", folder, "--diff", "sink").stdout == invoke("inspect", model_file, "--diff", "sink").stdout
    assert invoke_json("inspect", folder / "update.fxc")["cost"]["rows"] == 1
    assert invoke_json("inspect", folder, "--coverage")["covered"] > 0.9
    page = tmp_path / "page.html"
    invoke("inspect", folder, "--html", page)
    assert page.read_text() == (folder / "report.html").read_text()


@pytest.mark.parametrize("method", ["kfac", "ekfac", "diag", "shampoo", "hessian_free", "adahessian"])
def test_check_passes_on_a_sound_model(method: str, model_file: Path, invoke_json: Invoke) -> None:
    found = invoke_json("check", model_file, "--method", method)
    assert found["passed"] and {c["status"] for c in found["checks"]} <= {"pass", "info", "skipped"}
    assert {"passes", "types", "coverage", "step"} <= {c["check"] for c in found["checks"] if c["status"] == "pass"}


def test_check_measures_the_distance_to_dense_blocks(tmp_path: Path, invoke_json: Invoke) -> None:
    """K-FAC is exact on a deep linear net with square loss, the diagonal is not; EKFAC is never worse than K-FAC."""
    path = tmp_path / "linear.py"
    path.write_text(
        "import torch\nfrom torch import nn\ntorch.manual_seed(3)\n"
        "model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False))\n"
        "loss = 'mse'\nexample_inputs = (torch.randn(5, 4),)\n"
    )

    def distances(method: str) -> list[float]:
        rows = invoke_json("check", path, "--method", method)["checks"]
        return [row["value"] for row in rows if row["check"].startswith("block of")]

    assert len(distances("kfac")) == 2 and max(distances("kfac")) < 1e-12
    assert max(distances("ekfac")) < 1e-12
    assert min(distances("diag")) > 0.1


def test_check_fails_with_exit_code_1(model_file: Path, invoke: Invoke, invoke_json: Invoke) -> None:
    found = invoke_json("check", model_file, "--strict", code=1)
    failed = {row["check"]: row["detail"] for row in found["checks"] if row["status"] == "fail"}
    assert list(failed) == ["coverage"] and "'gain'" in failed["coverage"]
    model_file.write_text(model_file.read_text().replace("torch.tanh(self", "torch.log(self"))
    assert re.search(r"^step +fail", invoke("check", model_file, code=1).stdout, re.MULTILINE)


def test_opt_prints_a_program_that_parses_back(model_file: Path, tmp_path: Path, invoke: Invoke) -> None:
    start = tmp_path / "build.fxc"
    start.write_text(invoke("inspect", model_file, "--after", "build").stdout)
    assert invoke("opt", start).stdout.splitlines()[1:] == start.read_text().splitlines()[1:]
    passes = "sink,share{states=False},simplify"
    done = invoke("opt", start, "-p", passes, "--time", "--numeric", "-o", tmp_path / "x.fxc")
    assert done.stdout == "" and done.stderr.startswith("sink: ") and done.stderr.count(" rewrites in ") == 3
    assert "stat['gram(first.a)']" in invoke("opt", tmp_path / "x.fxc").stdout
    assert "stat['gram(first.a)']" not in invoke("opt", start, "-p", "sink", "--fuel", 0).stdout
    assert invoke("opt", start, "-p", "sink,simplify", "--print-between").stdout.count("# after ") == 2
    assert "did you mean 'simplify'?" in invoke("opt", start, "-p", "simplfy", code=1).stderr


@pytest.mark.parametrize(
    ("listing", "one", "key", "word"),
    [
        ("methods", "ekfac", "name", "damping"),
        ("ops", "kron_apply", "name", "Tensor"),
        ("passes", "share", "name", "states"),
        ("kernels", "potri", "name", "inverse"),
    ],
)
def test_listings(listing: str, one: str, key: str, word: str, invoke: Invoke, invoke_json: Invoke) -> None:
    names = [entry[key] for entry in invoke_json(listing)]
    table = invoke(listing).stdout
    assert one in names and all(name in table for name in names)
    page = invoke(listing, one).stdout
    assert one in page and word in page
    assert invoke_json(listing, one)["doc"]
    wrong = invoke(listing, one[:-1] + "q", code=1).stderr
    assert wrong.startswith("error: there is no ") and one in wrong


def test_what_exists_is_callable_from_python() -> None:
    methods = fxcurv.methods()
    assert methods["kfac"] is fxcurv.methods.kfac and list(methods) == sorted(methods)
    assert callable(fxcurv.papers)


def test_papers_are_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "papers.toml"
    path.write_text(
        '[[paper]]\nnumber = 2\ntitle = "B"\nstatus = "planned"\n'
        '[[paper]]\nnumber = 1\ntitle = "A"\nyear = 2015\nstatus = "working"\nimplements = ["kfac"]\n'
    )
    first, second = load_papers(path)
    assert (first.number, first.year, first.implements, second.title) == (1, 2015, ("kfac",), "B")
    for wrong, message in (
        ("number = 1\ntitle = 'A'\nstatus = 'done'", "status 'done'"),
        ("number = 1\ntitle = 'A'", "no 'status'"),
        ("number = 1\ntitle = 'A'\nstatus = 'working'\nstars = 5", "unknown field 'stars'"),
        ("number = 1\ntitle = 'A'\nstatus = 'working'\n" * 2, "is not TOML"),
        ("\n[[paper]]\n".join(["number = 1\ntitle = 'A'\nstatus = 'working'"] * 2), "twice"),
        ("number = ", "is not TOML"),
    ):
        path.write_text(f"[[paper]]\n{wrong}\n")
        with pytest.raises(FxcurvError, match=message):
            load_papers(path)
    with pytest.raises(FxcurvError, match="is missing"):
        load_papers(tmp_path / "no.toml")


@pytest.mark.parametrize("method", ["kfac", "ekfac", "shampoo", "adam", "sgd", "hessian_free"])
def test_train_prints_its_numbers(method: str, model_file: Path, invoke: Invoke, invoke_json: Invoke) -> None:
    found = invoke_json("train", model_file, "--method", method, "--epochs", 2)
    assert found["steps"] == 8 and len(found["losses"]) == 8 and found["losses"][-1] == found["final_loss"]
    assert set(found["scores"]) == {"norm"}
    again = invoke_json("train", model_file, "--method", method, "--steps", 8)
    assert again["losses"] == found["losses"]
    assert invoke_json("train", model_file, "--method", method, "--steps", 8, "--seed", 1)["losses"] != found["losses"]


def test_train_shows_progress_and_a_table(model_file: Path, invoke: Invoke) -> None:
    done = invoke("train", model_file, "--method", "kfac", "--steps", 3)
    assert "step     3/3  loss " in done.stderr and "KL scale" in done.stderr and "refreshes 1" in done.stderr
    assert "final loss" in done.stdout and "norm" in done.stdout


def test_settings_of_the_file_are_defaults_and_options_win(model_file: Path, invoke_json: Invoke) -> None:
    losses = [
        invoke_json("train", model_file, "--method", "sgd", "--steps", 4, *options)["losses"]
        for options in ((), ("--lr", 0.2, "--momentum", 0.5), ("--lr", 0.3))
    ]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("method", ["kfac", "ekfac", "adam", "hessian_free"])
def test_resume_goes_on_bit_for_bit(method: str, model_file: Path, tmp_path: Path, invoke_json: Invoke) -> None:
    """Ten steps in one go equal five and five: dropout, momentum, curvature, schedule, and place in the epoch."""
    whole, half, rest = (tmp_path / name for name in ("whole.pt", "half.pt", "rest.pt"))
    options = ("train", model_file, "--method", method, "--set", "solve_every=4")
    losses = invoke_json(*options, "--steps", 10, "--save", whole)["losses"]
    first = invoke_json(*options, "--steps", 5, "--save", half)["losses"]
    second = invoke_json(*options, "--steps", 10, "--resume", half, "--save", rest)["losses"]
    assert first + second == losses
    one, two = (torch.load(path, weights_only=True) for path in (whole, rest))
    assert one["step"] == two["step"] == 10 and one["epoch"] == two["epoch"] and one["smooth"] == two["smooth"]
    assert one["model"].keys() == two["model"].keys()
    assert all(torch.equal(one["model"][key], two["model"][key]) for key in one["model"])
    assert torch.equal(one["rng"], two["rng"])
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["half.pt", "rest.pt", "whole.pt"]


def test_resume_refuses_what_does_not_fit(model_file: Path, tmp_path: Path, invoke: Invoke) -> None:
    checkpoint = tmp_path / "c.pt"
    invoke("train", model_file, "--method", "kfac", "--steps", 1, "--save", checkpoint)
    wrong = invoke("train", model_file, "--method", "sgd", "--resume", checkpoint, code=1).stderr
    assert "is of method 'kfac'; pass --method kfac" in wrong
    checkpoint.write_bytes(b"no")
    assert "is not a checkpoint" in invoke("train", model_file, "--resume", checkpoint, code=1).stderr
    assert "there is no checkpoint" in invoke("train", model_file, "--resume", "no.pt", code=1).stderr
