"""backend="triton" from end to end: selection, a whole training run in the interpreter, artifacts, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxcurv
from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS
from fxcurv.ir.types import Psd, Rows, Scalar
from fxcurv.kernels.generator import Source
from fxcurv.kernels.registry import KERNELS, select
from fxcurv.kernels.triton.family import Specialised
from fxcurv.passes.lower import Lower
from fxcurv.passes.manager import Compilation
from fxcurv.runtime.pages import generated

ROOT = Path(__file__).resolve().parents[2]
X = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(7) % 3

TRAIN = """
import json, sys
import torch
from torch import nn
import fxcurv
from fxcurv.runtime.pages import generated

X = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(7) % 3


def train(backend, disable, dtype):
    torch.manual_seed(0)
    alike = [layer for _ in range(4) for layer in (nn.Linear(8, 8), nn.Tanh())]
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), *alike, nn.Linear(8, 3, bias=False)).to(dtype)
    model = fxcurv.transform(
        net, "kfac", example_inputs=(X.to(dtype),), loss="cross_entropy", backend=backend, fisher="empirical",
        disable=disable,
    )
    opt = fxcurv.optimizer(model, lr=0.1)
    for _ in range(3):
        opt.zero_grad()
        outputs = model(X.to(dtype))
        loss = nn.functional.cross_entropy(outputs, Y)
        model.backward(loss, outputs)
        opt.step()
    return model, torch.cat([p.detach().flatten().double() for p in model.parameters()])


disable, dtype = tuple(filter(None, sys.argv[1].split(","))), getattr(torch, sys.argv[2])
model, found = train("triton", disable, dtype)
expected = train("reference", disable, dtype)[1]
loaded = [name.partition(".")[2] for name in sys.modules if name.startswith("fxcurv_generated.")]
print(json.dumps([float((found - expected).abs().max()), [k.source.name for k in generated(model)], loaded]))
"""


def train(disable: str = "", dtype: str = "float32") -> tuple[float, list[str], list[str]]:
    """Difference to the reference after three steps, the kernels of program and taps, and all that were loaded."""
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, disable, dtype],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    difference, names, loaded = json.loads(done.stdout.splitlines()[-1])
    return difference, names, loaded


def transformed(backend: str = "triton", **options: Any) -> fxcurv.CurvatureModule:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3, bias=False))
    return fxcurv.transform(net, "kfac", example_inputs=(X,), loss="cross_entropy", backend=backend, **options)


def test_training_in_the_interpreter_equals_the_reference() -> None:
    pytest.importorskip("triton")
    difference, names, loaded = train()
    assert difference < 2e-6
    assert {name.rpartition("_")[0] for name in names} >= {"gram_d6_fp32", "gram_d8_fp32", "gram_d3_fp32"}
    assert sum(name.startswith("grouped_gram_d9") for name in loaded) == 1, "four equal layers are one launch"
    assert sum(name.startswith("grouped_gram_d8") for name in loaded) == 1


def test_layers_are_taken_one_by_one_without_the_pass_that_defers_them() -> None:
    pytest.importorskip("triton")
    difference, _, loaded = train("defer")
    assert difference < 2e-6
    assert not any(name.startswith("grouped_gram") for name in loaded)
    assert any(name.startswith("gram_d9") for name in loaded)


def test_fused_averages_equal_the_reference() -> None:
    pytest.importorskip("triton")
    difference, names, _ = train("sink")
    assert difference < 2e-6
    assert any(name.startswith("gram_ema_mean_d6") for name in names)
    assert any(name.startswith("gram_ema_scaled_d3") for name in names)
    assert "gram_ema" in transformed(disable=("sink",)).program.text()
    assert "gram_ema" not in transformed("aten", disable=("sink",)).program.text()


def test_double_precision_is_left_to_the_reference() -> None:
    pytest.importorskip("triton")
    difference, names, _ = train(dtype="float64")
    assert difference == 0.0 and not any("gram" in name for name in names)


def test_each_size_gets_its_own_kernel() -> None:
    pytest.importorskip("triton")

    def chosen(rows: Rows) -> Any:
        return select("gram", OPS["gram"].infer(rows), [rows], "triton")

    five, six = chosen(Rows((None, None, 1, 5))), chosen(Rows((None, None, 1, 6)))
    assert five is not None and five.name.startswith("gram_d5_fp32_") and six.name.startswith("gram_d6_fp32_")
    assert chosen(Rows((4, 2, 1, 5))).run is five.run, "the number of rows does not matter"
    assert chosen(Rows((None, None, 1, 5), torch.float64)) is None
    assert chosen(Rows((None, None, 1, 5), torch.bfloat16)).name.startswith("gram_d5_bf16_")
    with pytest.raises(FxcurvError, match="only after it is specialised"):
        next(kernel for kernel in KERNELS if kernel.name == "gram").run(X)


def test_numbers_of_an_average_are_baked_in_or_read() -> None:
    pytest.importorskip("triton")
    old, rows = Psd((5, 5)), Rows((None, None, 1, 5))
    baked = select("gram_ema_mean", old, [old, rows, 4.0, 0.9], "triton")
    read = select("gram_ema_mean", old, [old, rows, Scalar(), Scalar()], "triton")
    assert baked is not None and read is not None and baked.name != read.name
    assert "weight = 0.9" in baked.run.source.text and "weight_ptr" in read.run.source.text
    groups = Psd((2, 5, 5))
    assert select("gram_ema_mean", groups, [groups, Rows((None, None, 2, 5)), 4.0, Scalar((2,))], "triton") is None


def test_float32_is_multiplied_as_torch_is_told_to() -> None:
    pytest.importorskip("triton")
    rows = Rows((None, None, 1, 5))
    before = torch.get_float32_matmul_precision()
    try:
        texts = []
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            kernel = select("gram", Psd((5, 5)), [rows], "triton")
            assert kernel is not None
            texts.append(kernel.run.source.text)
    finally:
        torch.set_float32_matmul_precision(before)
    assert 'input_precision="ieee"' in texts[0] and 'input_precision="tf32"' in texts[1]


def test_without_a_gpu_or_the_interpreter_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = transformed()
    outputs = model(X)
    with pytest.raises(FxcurvError, match="needs a GPU and got tensors on the CPU: use backend='aten'"):
        model.backward(nn.functional.cross_entropy(outputs, Y), outputs)


def test_auto_leaves_tensors_on_the_cpu_to_the_kernel_next_in_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (8, 0))
    rows = normal = torch.randn(4, 2, 1, 5)
    kernel = select("gram", Psd((5, 5)), [Rows((None, None, 1, 5))], "auto")
    assert kernel is not None and isinstance(kernel.run, Specialised) and kernel.run.fallback is not None
    aten = next(k for k in KERNELS if k.op == "gram" and k.backend == "aten")
    assert kernel.run.fallback is aten.run
    torch.testing.assert_close(kernel.run(rows), OPS["gram"].reference(normal))


def test_kernels_start_on_the_device_of_their_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []

    def device(chosen: torch.device) -> Any:
        entered.append(chosen)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr("fxcurv.kernels.triton.family.load", lambda source: SimpleNamespace(launch=lambda *x: len(x)))
    with FakeTensorMode():
        there, here = (torch.empty(2, device=f"cuda:{index}") for index in (0, 1))
    kernel = Specialised("gram", Source("name", "text", "key"))
    assert kernel(there, 3.0) == 2 and entered == [torch.device("cuda", 0)]
    assert kernel([here]) == 1 and len(entered) == 1


def test_an_artifact_holds_the_sources_and_runs_without_a_gpu_under_another_backend(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    model = transformed(disable=("sink",))
    folder = fxcurv.save(model, tmp_path / "a")
    sources = {kernel.source.name: kernel.source.text for kernel in generated(model)}
    assert sources
    for name, text in sources.items():
        assert (folder / "kernels" / f"{name}.py").read_text() == text
        assert name in (folder / "update.py").read_text()


def test_names_are_told_apart_when_one_source_has_two_fallbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    model = transformed(disable=("sink",))
    program = model.program
    sources: list[Any] = []

    def different(op: str, result: Any, operands: Any, backend: str) -> Any:
        kernel = select(op, result, operands, backend)
        if kernel is not None and kernel.op == "gram_ema_mean":
            copy = Specialised(kernel.run.family, kernel.run.source, lambda *x: len(sources))
            sources.append(copy)
            return type(kernel)(kernel.op, "same", kernel.backend, kernel.when, copy, "")
        return kernel

    monkeypatch.setattr("fxcurv.passes.lower.select", different)
    compilation = Compilation(program=program, options={"backend": "triton"})
    Lower().run(compilation)
    assert compilation.lowered is not None
    named = {name for name in compilation.lowered.kernels.values() if name.startswith("same")}
    assert named == {"same", "same_2"} and len(sources) == 2
