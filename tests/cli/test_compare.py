"""``compare``: equal weights and batches, a row whatever happens, runs that are kept, and a table that follows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fxcurv.cli import attempt as attempt_module
from fxcurv.cli.attempt import Attempt, smoothed
from fxcurv.cli.contenders import BASELINES, Axis, chosen_methods, contenders, family, parse_grid
from fxcurv.cli.contest import Contest, Result, rungs
from fxcurv.cli.draws import Stream, own_batches
from fxcurv.cli.modelfile import load_model_file
from fxcurv.cli.standings import markdown, standings
from fxcurv.cli.store import Store
from fxcurv.errors import FxcurvError
from fxcurv.methods import PUBLISHED
from fxcurv.tools.allocated import allocated_peak

Invoke = Callable[..., Any]
OPTIONS: dict[str, Any] = {}

MODEL = '''
"""Data and dropout from the global generator."""
import os, signal
from pathlib import Path
import torch
from torch import nn

loss = "cross_entropy"
example_inputs = (torch.zeros(16, 5),)
settings = {"adam": {"nonsense": 1}, "sgd": {"lr": 0.2}}
STOP = Path(__file__).with_name("stop")
SEEN = []


def build_model():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))


def batches(epoch):
    for k in range(4):
        x = torch.randn(16, 5)
        if epoch == 2 and k == 1 and STOP.exists():
            STOP.unlink()
            signal.raise_signal(signal.SIGINT)
        SEEN.append(float(x.sum()))
        yield (x,), (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def evaluate(model):
    assert not model.training
    return {"norm": float(sum(p.square().sum() for p in model.parameters()))}
'''


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """The file above."""
    path = tmp_path / "net.py"
    path.write_text(MODEL)
    return path


class Silent:
    """Shows nothing."""

    def show(self, lane: str, done: int, total: int, note: str) -> None:
        """Nothing."""


def finished(attempt: Attempt, count: int = 100) -> dict[str, Any]:
    attempt.begin(OPTIONS, measure=False)
    while attempt.outcome is None:
        attempt.advance(count)
    return attempt.outcome


def test_methods_start_from_equal_weights_and_see_equal_batches_whatever_they_draw(net: Path) -> None:
    """Dropout and data share the global generator, and the methods take turns."""
    file = load_model_file(str(net))
    hyper = {"sgd": {"lr": 0.0}, "kfac": {"lr": 0.0}, "hessian_free": {"lr": 0.0, "iterations": 3}}
    attempts = [Attempt(file, method, given, 0, 6) for method, given in hyper.items()]
    for attempt in attempts:
        attempt.begin(OPTIONS, measure=attempt.method == "kfac")  # measuring takes steps of its own
    seen: dict[str, list[float]] = {method: [] for method in hyper}
    while not all(attempt.done for attempt in attempts):
        for attempt in attempts:
            file.source.SEEN.clear()
            attempt.advance(2)
            seen[attempt.method] += file.source.SEEN
        torch.rand(3)  # somebody else draws, too
    assert len(set(seen["sgd"])) == 6 and seen["sgd"] == seen["kfac"] == seen["hessian_free"]
    assert len({attempt.losses[0] for attempt in attempts}) == 1, "equal weights, and equal dropout in the first step"
    file.source.SEEN.clear()
    finished(Attempt(file, "sgd", {"lr": 0.0}, 1, 6))
    assert seen["sgd"] != file.source.SEEN, "another seed has other batches"


def test_a_stream_is_ones_own() -> None:
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    stream, drawn = Stream(7), []
    for _ in range(4):
        with stream.active():
            drawn.append(torch.rand(()))
    assert torch.equal(torch.rand(4), expected)
    torch.manual_seed(7)
    assert torch.equal(torch.stack(drawn), torch.stack([torch.rand(()) for _ in range(4)]))


def test_batches_do_not_depend_on_what_is_drawn_between_them() -> None:
    def batches(epoch: int) -> Any:
        yield from (torch.rand(2) + epoch for _ in range(3))

    drawn = []
    for between in (0, 5):
        mine = own_batches(batches, seed=1)
        values = []
        for batch in (*mine(0), *mine(1)):
            values.append(batch)
            torch.rand(between)
        drawn.append(torch.stack(values))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(torch.stack(list(own_batches(batches, seed=1)(1))), drawn[0][3:]), "an epoch can begin again"
    assert not torch.equal(drawn[0][:3], drawn[0][3:] - 1) and len({float(v) for v in drawn[0].flatten()}) == 12
    assert not torch.equal(torch.stack(list(own_batches(batches, seed=2)(0))), drawn[0][:3])


def test_what_fails_is_a_row_with_the_reason(net: Path, tmp_path: Path, invoke_json: Invoke) -> None:
    arguments = ("compare", net, "-m", "kfac,adam,sgd,shampoo", "-n", 8, "--grid", "none", "--lr", "1e25")
    found = invoke_json(*arguments, "--set", "momentum=0.0", "-o", tmp_path / "out")
    rows = {row["method"]: row for row in found["rows"]}
    assert [row["method"] for row in found["rows"]][0] == "kfac", "the KL clip bounds the step whatever the lr"
    assert rows["kfac"]["status"] == "finished" and rows["kfac"]["loss"][0] < 10
    assert rows["sgd"]["status"] == "diverged" and "diverged at step" in rows["sgd"]["reason"]
    assert rows["adam"]["status"] == "failed" and "no hyper-parameter 'nonsense'" in rows["adam"]["reason"]
    assert rows["sgd"]["loss"] is rows["sgd"]["loss_equal_seconds"] is rows["adam"]["seconds"] is None
    assert f"- adam: {rows['adam']['reason']}" in (tmp_path / "out" / "compare.md").read_text()


def test_interrupted_runs_go_on_bit_for_bit(net: Path, tmp_path: Path, invoke: Invoke, invoke_json: Invoke) -> None:
    arguments = ("compare", net, "-m", "sgd,kfac", "-n", 14, "--seeds", 2, "--grid", "none")
    whole = invoke_json(*arguments, "-o", tmp_path / "whole")
    net.with_name("stop").write_text("")
    result = invoke(*arguments, "-o", tmp_path / "parts", code=130)
    assert "the same command goes on from there" in result.stderr
    kept = sorted(path.suffix for path in (tmp_path / "parts" / "runs").iterdir())
    assert kept == [".json", ".json", ".pt", ".pt"], kept
    assert not (tmp_path / "parts" / "compare.json").exists()
    parts = invoke_json(*arguments, "-o", tmp_path / "parts")
    for mine, theirs in zip(parts["methods"], whole["methods"], strict=True):
        for run, other in zip(mine["runs"], theirs["runs"], strict=True):
            assert run["losses"] == other["losses"] and run["scores"] == other["scores"]
            assert run["counts"] == other["counts"] and len(run["seconds"]) == 14
            assert run["seconds"] == sorted(run["seconds"])
    assert not [path for path in (tmp_path / "parts" / "runs").iterdir() if path.suffix == ".pt"]


def test_what_is_kept_is_not_trained_again_unless_asked(
    net: Path, tmp_path: Path, invoke_json: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("compare", net, "-m", "sgd,kfac", "-n", 9, "-o", tmp_path / "out", "--grid", "lr=x1,x2")
    first = invoke_json(*arguments)
    begun: list[str] = []
    begin = Attempt.begin
    monkeypatch.setattr(Attempt, "begin", lambda self, *a, **k: (begun.append(self.method), begin(self, *a, **k))[1])
    assert invoke_json(*arguments)["methods"] == first["methods"] and not begun
    invoke_json(*arguments, "--fresh")
    assert begun.count("sgd") == begun.count("kfac") == 3, "two points and the race"
    begun.clear()
    net.write_text(MODEL + "\n# another text\n")
    invoke_json(*arguments)
    assert begun, "another file is another run"


def test_files_and_the_tables(net: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ("compare", net, "-m", "sgd,ekfac", "-n", 12, "--seeds", 2, "-o", tmp_path / "out")
    shown = invoke(*arguments).stdout
    for text in ("loss at 3", "at 6", "at 12", "ms/step", "skipped", "norm", "kl_clip=0.1 damping=0.01", "chosen", "±"):
        assert text in shown
    folder = tmp_path / "out"
    assert sorted(path.name for path in folder.iterdir()) == ["compare.json", "compare.md", "curves.png", "runs"]
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    data = json.loads((folder / "compare.json").read_text())
    assert data["steps"] == 12 and data["seeds"] == [0, 1] and {"torch", "fxcurv"} <= set(data["versions"])
    ekfac = next(one for one in data["methods"] if one["method"] == "ekfac")
    assert len(ekfac["searched"]) == 6 and len(ekfac["runs"]) == 2 and len(ekfac["runs"][0]["losses"]) == 12
    row = next(row for row in data["rows"] if row["method"] == "ekfac")
    assert row["state_bytes"] > 0 and row["peak_bytes"] > row["state_bytes"] and row["refreshes"] == 2 * 2
    assert next(row for row in data["rows"] if row["method"] == "sgd")["refreshes"] == 0
    table = invoke(*arguments, "--markdown").stdout
    assert table == (folder / "compare.md").read_text() and table.startswith("| method | loss at 3 |")
    assert {len(line.split("|")) for line in table.splitlines()} == {len(table.splitlines()[0].split("|"))}


def test_the_search_takes_the_better_point(net: Path) -> None:
    file = load_model_file(str(net))
    store = Store(None, file, "net", None)
    contest = Contest(lambda seed: file, 24, [0], OPTIONS, store, Silent())
    grid = parse_grid(["lr=0.000001,0.3,1e30"])
    (result,) = contest.run(contenders(file, ["sgd"], {}, grid))
    assert result.hyper["lr"] == 0.3 and result.runs[0]["hyper"] == result.hyper
    assert [point["hyper"]["lr"] for point in result.searched] == [1e-6, 0.3, 1e30]
    bad = result.searched[2]
    assert bad["loss"] == math.inf and "diverged" in bad["reason"]


@pytest.mark.parametrize(
    ("points", "steps", "expected"),
    [
        (1, 100, []),
        (3, 80, [(3, 0, 10)]),
        (6, 80, [(6, 0, 10), (2, 10, 30)]),
        (30, 80, [(30, 0, 10), (10, 10, 30), (4, 30, 80), (2, 80, 80)]),
        (4, 2, [(4, 0, 2), (2, 2, 2)]),
    ],
)
def test_rungs(points: int, steps: int, expected: list[tuple[int, int, int]]) -> None:
    assert rungs(points, steps) == expected


def run(losses: list[float], step: float, **more: Any) -> dict[str, Any]:
    counts = dict.fromkeys(("refreshes", "fallbacks", "repaired", "kept"), 1)
    return {
        "losses": losses, "seconds": [step * (i + 1) for i in range(len(losses))], "status": "finished", "reason": "",
        "counts": counts, "memory": {"states": 3, "peak": 5}, "scores": {"score": losses[-1]}, **more,
    }  # fmt: skip


def test_standings_by_hand() -> None:
    """Slow has the lower loss at equal steps, fast the lower one at equal seconds; a seed that failed is no winner."""
    fast = Result("fast", {}, [], [run([8, 6, 4, 4, 3, 3, 3, 3], 1.0), run([8, 6, 4, 4, 3, 3, 5, 5], 1.0)])
    slow = Result("slow", {}, [], [run([8, 7, 6, 5, 4, 3, 2, 1], 2.0)])
    bad = run([1, 9], 0.1, status="diverged", reason="diverged at 2")
    broken = Result("broken", {}, [], [run([1.0] * 8, 0.1), bad])
    found = standings([broken, fast, slow], steps=8, window=2)
    assert [row["method"] for row in found["rows"]] == ["slow", "fast", "broken"]
    slow_row, fast_row, broken_row = found["rows"]
    assert found["equal_seconds"] == pytest.approx(0.8), "the first to finish"
    assert broken_row["reason"] == "1 of 2 seeds: diverged at 2" and broken_row["loss"] == (1.0, 0.0)
    assert fast_row["loss_quarter"] == (7.0, 0.0) and fast_row["loss_half"] == (4.0, 0.0)
    assert fast_row["loss"] == pytest.approx((4.0, math.sqrt(2))) and fast_row["seconds_per_step"] == (1.0, 0.0)
    assert fast_row["refreshes"] == 2 and fast_row["scores"]["score"] == pytest.approx((4.0, math.sqrt(2)))
    assert slow_row["loss_equal_seconds"] is None, "not a step in that time"
    found = standings([fast, slow], steps=8, window=2)
    assert found["equal_seconds"] == 8.0
    assert found["rows"][0]["loss_equal_seconds"] == (5.5, 0.0), "the fourth step of slow ends then"
    assert "| fast | 7 | 4 | 4±1.4 | 4±1.4 | 8 | 1e+03 | 3 B | 5 B |" in markdown(found, 8)


def test_smoothed() -> None:
    assert smoothed([1.0, 2.0, 3.0], 3, 2) == 2.5 and smoothed([1.0, 2.0], 1, 5) == 1.0
    assert smoothed([1.0], 2, 1) is None and smoothed([1.0], 0, 1) is None


def test_points_of_a_method(net: Path) -> None:
    file = load_model_file(str(net))

    def points(method: str, grid: tuple[Axis, ...] | None = None, **given: Any) -> list[dict[str, Any]]:
        return list(contenders(file, [method], given, grid)[0].points)

    assert points("sgd") == [{"lr": 0.2}], "the file's settings are taken as they are"
    assert points("sgd", momentum=0.5) == [{"lr": 0.2, "momentum": 0.5}]
    assert [p["lr"] for p in points("foof")] == [0.03, 0.03, 0.1, 0.1, 0.3, 0.3]
    assert {p["kl_clip"] for p in points("ekfac")} == {1e-3, 1e-2, 1e-1} and "lr" not in points("ekfac")[0]
    assert {p["lr"] for p in points("ekfac", kl_clip=None)} == {0.03, 0.1, 0.3}
    assert points("hessian_free") == [{}] and points("foof", ()) == [{}]
    assert points("foof", parse_grid(["damping=0.5,2"])) == [{"damping": 0.5}, {"damping": 2}]
    assert points("sgd", parse_grid(["lr=x1,x3"])) == [{"lr": 0.2}, {"lr": 0.6}]
    both = contenders(file, ["sgd", "foof"], {"damping": 0.3}, ())
    assert both[0].points == ({"lr": 0.2},) and both[1].points == ({"damping": 0.3},)
    with pytest.raises(FxcurvError, match="none of the methods has a hyper-parameter 'dampin'"):
        points("foof", None, dampin=1)


def test_groups_of_methods() -> None:
    assert set(chosen_methods("all")) == set(PUBLISHED) and chosen_methods("all")[:2] == BASELINES
    assert {"kfac", "ekfac", "foof", "kfac_rnn", "gnn_ng"} <= set(family())
    assert not {"sgd", "adam", "shampoo", "diag", "hessian_free"} & set(family())
    assert set(chosen_methods("family")) == {*BASELINES, *family()}
    assert chosen_methods("ekfac, kfac,ekfac") == ("ekfac", "kfac")
    assert set(chosen_methods(None)) <= set(PUBLISHED) and {"sgd", "kfac"} <= set(chosen_methods(None))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-m", "kfax"), "there is no method 'kfax'; did you mean "),
        (("-m", ","), "--methods is empty"),
        (("--grid", "lr"), "--grid lr: write NAME=VALUE,VALUE"),
        (("--grid", "lr=x1,2"), "give numbers, or factors such as x0.3,x1,x3, not both"),
        (("--grid", "dampin=1"), "none of the methods has a hyper-parameter 'dampin'"),
        (("--set", "dampin=1"), "none of the methods has a hyper-parameter 'dampin'"),
    ],
)
def test_one_sentence(net: Path, invoke: Invoke, arguments: tuple[str, ...], message: str) -> None:
    assert message in invoke("compare", net, *arguments, code=1).stderr


def test_a_file_without_data(tmp_path: Path, invoke: Invoke) -> None:
    path = tmp_path / "bare.py"
    path.write_text("from torch import nn\nmodel = nn.Linear(2, 2)\nloss = 'mse'\n")
    assert "has no 'batches(epoch)'" in invoke("compare", path, code=1).stderr


def test_an_error_of_any_kind_is_the_attempts_own(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the kernel\nfell over")

    monkeypatch.setattr(attempt_module, "transformed", broken)
    outcome = finished(Attempt(load_model_file(str(net)), "kfac", {}, 0, 5))
    assert outcome["status"] == "failed" and outcome["reason"] == "RuntimeError: the kernel fell over"


def test_allocated_peak_is_what_is_alive_at_once() -> None:
    held = [torch.zeros(1000)]
    kept = []

    def before() -> None:
        kept.append(torch.zeros(1_000_000))
        replace()

    def replace() -> None:
        held[0] = torch.zeros(1000)

    def work() -> None:
        replace()
        first = torch.zeros(250_000)
        second = first + 1  # both alive: 2 MB
        del first, second
        torch.zeros(300_000)

    assert allocated_peak(work, before=before) in range(2_000_000, 2_001_000 + 4_000)
