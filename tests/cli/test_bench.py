"""``bench``: nothing wrong is timed, one schema, and a cost model whose ratios agree with measured ones."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS
from fxcurv.ir.types import Rows
from fxcurv.kernels import registry
from fxcurv.kernels.registry import KERNELS, Kernel
from fxcurv.losses import resolve_loss
from fxcurv.tools import bench_steps, calibrate
from fxcurv.tools.bench_ops import CASES, bench_ops, compare
from fxcurv.tools.bench_steps import Workload, bench_methods, bench_step, difference
from fxcurv.tools.clock import fastest, interleaved, percentiles, ratio
from fxcurv.tools.devices import Device
from fxcurv.tools.estimate import estimate
from fxcurv.tools.execute import Executor
from fxcurv.tools.rows import COLUMNS, BenchRow, to_csv

Invoke = Callable[..., Any]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of its own with a made-up machine, so that nothing is calibrated unasked."""
    monkeypatch.setenv("FXCURV_CACHE", str(tmp_path / "cache"))
    kinds = ("product", "convolution", "cholesky", "inverse", "eigen")
    calibrate.save(
        {
            "format": calibrate.FORMAT,
            "processor": "toy",
            "threads": 1,
            "torch": "0",
            "launch": 5e-6,
            "rates": {kind: [[16.0, 5e9], [256.0, 5e10]] for kind in kinds},
            "relative": {"f64": 0.5},
            "bandwidth": [[1e4, 1e10]],
        }  # fmt: skip
    )


@pytest.fixture
def wrong_gram() -> Iterator[Kernel]:
    """A kernel that forgets the last row."""
    registry.load("aten")
    kernel = Kernel(
        "gram", "wrong", "aten", lambda result, rows: rows.shape[2] == 1, lambda r: OPS["gram"].reference(r[:-1]), "no"
    )
    KERNELS.append(kernel)
    yield kernel
    KERNELS.remove(kernel)


def work(methods: tuple[str, ...] = ("kfac",), width: int = 24) -> Workload:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 5))
    loss = resolve_loss("cross_entropy")
    assert loss is not None
    return Workload(
        net, (torch.randn(32, 12),), torch.randint(5, (32,)), loss, {}, {m: {"damping": 0.1} for m in methods}
    )


def test_a_wrong_kernel_is_not_timed(wrong_gram: Kernel, invoke: Invoke) -> None:
    rows = list(bench_ops(["gram"], rounds=2, sizes=[16]))
    by_side = {row.side: row for row in rows}
    bad = by_side["aten.wrong"]
    assert bad.status == "wrong" and bad.error is not None and bad.error > 1e-3 and "not timed" in bad.note
    assert bad.p20 is bad.p50 is bad.p80 is bad.ratio is None and bad.rounds == 0
    good = by_side["aten.slabs"]
    assert good.status == "ok" and good.error is not None and good.error < 1e-5 and good.p50 is not None
    assert by_side["reference"].ratio == 1.0
    assert "not timed" in invoke("bench", "ops", "--op", "gram", "--rounds", 1, code=1).stdout


def test_compare_finds_shapes_and_nan() -> None:
    def kernel(run: Callable[[Any], Any]) -> Kernel:
        return Kernel("gram", "trial", "aten", lambda result, rows: True, run, "")

    op, types = OPS["gram"], [Rows((9, 1, 1, 4))]
    assert compare(op, kernel(op.reference), types, "cpu") < 1e-6
    assert compare(op, kernel(lambda r: op.reference(r)[:2]), types, "cpu") == float("inf")
    assert compare(op, kernel(lambda r: op.reference(r) * float("nan")), types, "cpu") == float("inf")
    assert compare(op, kernel(lambda r: -op.reference(r)), types, "cpu") == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_case_runs_and_every_kernel_is_right(name: str) -> None:
    rows = list(bench_ops([name], rounds=1, sizes=[32]))
    assert rows[0].side == "reference" and all(row.status == "ok" for row in rows), rows
    assert all(row.p20 <= row.p50 <= row.p80 for row in rows)  # type: ignore[operator]


def test_methods_are_compared_before_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(bench_methods(work(("kfac", "ekfac")), ["kfac", "ekfac"], rounds=3))
    assert [row.name for row in rows] == ["plain", "kfac", "ekfac"]
    assert all(row.status == "ok" and row.ratio is not None for row in rows)
    assert all(row.error is not None and row.error < 1e-8 for row in rows[1:])
    monkeypatch.setattr(bench_steps, "difference", lambda work, method: 0.5 if method == "ekfac" else 0.0)
    found = {row.name: row for row in bench_methods(work(), ["kfac", "ekfac"], rounds=2)}
    assert found["ekfac"].status == "wrong" and found["ekfac"].p50 is None and found["kfac"].p50 is not None
    assert [row.status for row in bench_step(work(), "ekfac", rounds=2)] == ["wrong"]


def test_a_wrong_step_shows(wrong_gram: Kernel) -> None:
    registry.KERNELS.insert(0, wrong_gram)  # before the right one
    try:
        assert difference(work(), "kfac") > 1e-5
    finally:
        registry.KERNELS.remove(wrong_gram)
    assert difference(work(), "kfac") < 1e-8


def test_steps_carry_the_estimate() -> None:
    rows = {row.side: row for row in bench_step(work(), "kfac", rounds=3)}
    assert list(rows) == ["plain", "apply", "apply + statistics", "apply + statistics + refresh"]
    estimates = [rows[side].estimate for side in list(rows)[1:]]
    assert estimates == sorted(estimates) and estimates[0] is not None and estimates[0] > 1  # type: ignore[type-var]


def test_one_schema_in_json_and_csv(
    model_file: Path, tmp_path: Path, invoke: Invoke, invoke_json: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    table, picture = tmp_path / "t.csv", tmp_path / "t.png"
    found = invoke_json("bench", model_file, "-m", "kfac,ekfac", "--rounds", 2, "--csv", table, "--plot", picture)
    assert [row["name"] for row in found] == ["plain", "kfac", "ekfac"] and tuple(found[0]) == COLUMNS
    lines = list(csv.DictReader(io.StringIO(table.read_text())))
    assert [line["name"] for line in lines] == ["plain", "kfac", "ekfac"] and tuple(lines[0]) == COLUMNS
    assert float(lines[1]["p50"]) == found[1]["p50"] and lines[0]["error"] == ""
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = invoke("bench", "step", model_file, "--rounds", 2).stdout
    assert "apply + statistics" in text and "estimate" in text
    assert to_csv([BenchRow("ops", "x", "y", "z", "cpu", 1)]).count("\n") == 2


def test_what_is_missing_is_said_in_one_sentence(
    model_file: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "there is no GPU here" in invoke("bench", "--device", "cuda", code=1).stderr
    assert "there is no GPU here" in invoke("bench", model_file, "--device", "cuda", code=1).stderr
    assert "no benchmark of an op 'grum'" in invoke("bench", "ops", "--op", "grum", code=1).stderr
    assert "needs a model file" in invoke("bench", "step", code=1).stderr
    assert "there is no method 'kfca'" in invoke("bench", model_file, "-m", "kfca", code=1).stderr
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = ("bench", "ops", "--op", "dot", "--rounds", 1, "--plot", tmp_path / "x.png")
    assert "needs matplotlib" in invoke(*arguments, code=1).stderr


def test_calibration_is_kept_and_survives_rubbish(invoke_json: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "SIZES", (16, 32))
    monkeypatch.setattr(calibrate, "MATRICES", (8, 16))
    monkeypatch.setattr(calibrate, "CHANNELS", ((2, 4), (3, 5)))
    monkeypatch.setattr(calibrate, "MEGABYTES", (0.01, 0.1))
    found = invoke_json("bench", "--calibrate")
    path = Path(found["file"])
    assert path == calibrate.file() and path.stat().st_mode & 0o077 == 0
    kept = calibrate.read()
    assert kept is not None and kept["launch"] == found["launch"] > 0
    device: Device = calibrate.this_cpu()
    assert device.launch == found["launch"] and set(device.rates) == set(found["rates"])
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file is left
    for rubbish in (
        "",
        "{",
        "[]",
        json.dumps({**found, "launch": 1, "format": 0}),
        json.dumps({"format": calibrate.FORMAT}),
    ):
        path.write_text(rubbish)
        assert calibrate.read() is None
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    assert calibrate.file() != path


def test_clock() -> None:
    calls: list[str] = []
    times = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warm=1)
    assert calls == ["a", "b"] * 4 and [len(t) for t in times.values()] == [3, 3]
    assert ratio({"a": [2.0, 9.0, 4.0], "b": [1.0, 3.0, 1.0]}, "a", "b") == 3.0
    assert percentiles([float(i) for i in range(11)]) == {"p20": 2.0, "p50": 5.0, "p80": 8.0}
    assert percentiles([1.0]) == {"p20": 1.0, "p50": 1.0, "p80": 1.0}
    with pytest.raises(FxcurvError, match="no device to measure on"):
        list(bench_ops(["dot"], "tpu"))


@pytest.fixture(scope="module")
def measured_cpu() -> Device:
    """This machine as it is."""
    return calibrate.as_device(calibrate.measure())


def test_doubling_a_gram_multiplies_both_times_alike(measured_cpu: Device) -> None:
    """Predicted and measured growth from d to 2 d agree within a factor of 2.5 (both near 4 at equal rows)."""
    executor, growth = Executor(), {}
    for d in (128, 256):
        types = [Rows((512, 1, 1, d))]
        x = torch.randn(512, 1, 1, d)
        found = executor.call(("gram", d), OPS["gram"].reference, types)
        assert found is not None
        growth[d] = measured_cpu.seconds(found.works), fastest(lambda x=x: OPS["gram"].reference(x), 9)
    predicted, measured = (growth[256][k] / growth[128][k] for k in (0, 1))
    assert 1 / 2.5 < predicted / measured < 2.5, (predicted, measured)


def test_methods_are_ordered_by_predicted_as_by_measured_time(measured_cpu: Device) -> None:
    """A step with everything due: FOOF (one side), K-FAC (two inverses), EKFAC (two eigendecompositions)."""
    options = {"factor_every": 1, "solve_every": 1}
    names = ("sgd", "foof", "kfac", "ekfac")
    big = work(width=160)
    big = Workload(big.model, big.inputs, big.targets, big.loss, {}, {m: options for m in names[1:]})
    rows = {row.name: row for row in bench_methods(big, names, rounds=5)}
    measured = [rows[name].ratio for name in names]
    predicted = [estimate(big.transformed(name), measured_cpu).ratio() for name in names]
    assert predicted == sorted(predicted), predicted
    assert measured == sorted(measured), measured  # type: ignore[type-var]
