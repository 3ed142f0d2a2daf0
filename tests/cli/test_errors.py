"""Bad input: one sentence on standard error, a non-zero exit code, and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fxcurv.cli.modelfile import load_model_file, parse_inputs
from fxcurv.errors import FxcurvError

Invoke = Callable[..., Any]

FILES = {
    "nothing": ("x = 1\n", "has no model; define 'model = ...' or 'def build_model(): ...'"),
    "syntax": ("import torch\nmodel = (\n", "line 2: '(' was never closed"),
    "import": ("import torch\n\nimport nonesuch\n", "line 3: ModuleNotFoundError: No module named 'nonesuch'"),
    "raise": ("def f():\n    return 1 / 0\nmodel = f()\n", "line 2: ZeroDivisionError: division by zero"),
    "builder": ("def build_model():\n    raise ValueError('no data')\n", "line 2: ValueError: no data"),
    "exit": ("import sys\nsys.exit(3)\n", "line 2: it exits; guard that"),
    "type": ("model = [1, 2]\n", "'model' is a list, not an nn.Module"),
    "class": ("from torch import nn\nclass model(nn.Linear): pass\n", "'model' is a class; give an instance"),
    "returns": ("def build_model():\n    pass\n", "what 'build_model()' returns is a NoneType, not an nn.Module"),
    "settings": (
        "from torch import nn\nmodel = nn.Linear(2, 2)\nsettings = {'lr': 1}\n",
        "'settings' must be a dictionary of dictionaries",
    ),
    "example": ("from torch import nn\nmodel = nn.Linear(2, 2)\nexample_inputs = 3\n", "'example_inputs' is a int"),
    "frozen": ("from torch import nn\nmodel = nn.Tanh()\n", "Tanh has no trainable parameter"),
    "control flow": (
        "import torch\nfrom torch import nn\nclass Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.a = nn.Linear(2, 2)\n"
        "    @torch.compiler.disable\n    def forward(self, x):\n"
        "        if x.sum() > 0:\n            x = -x\n        return self.a(x)\n"
        "model = Net()\nexample_inputs = (torch.ones(1, 2),)\n",
        "control flow",
    ),
}


def sentence(result: Any) -> str:
    """The one line that was printed."""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and result.stdout == "", result.output
    return lines[0]


@pytest.mark.parametrize("case", FILES)
def test_a_file_without_a_usable_model(case: str, tmp_path: Path, invoke: Invoke) -> None:
    text, message = FILES[case]
    path = tmp_path / "net.py"
    path.write_text(text)
    shown = sentence(invoke("compile", path, "-o", tmp_path / "out", code=1))
    expected = "Python branch on a value" if message == "control flow" else message
    assert expected in shown
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != "__pycache__"] == ["net.py"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "kfax"), "there is no method 'kfax'; did you mean "),
        (("--input", "f32[8"), "'f32[8' is not a tensor; write for example f32[8,3,32,32]"),
        (("--input", "f31[8,5]"), "'f31' is not a type; there are f64, f32"),
        (("--input", "f32[8,5]<3"), "an upper bound is for integers"),
        (("--input", "f32[8,6]"), "mat1 and mat2 shapes cannot be multiplied"),
        (("--input", "f32[8,5]", "--input", "f32[8,5]"), "the example inputs do not fit Net.forward"),
        (("--loss", "crossentropy"), "did you mean 'cross_entropy'?"),
        (("--set", "damping"), "--set damping: write NAME=VALUE"),
        (("--set", "dampin=1"), "no hyper-parameter 'dampin'; it has "),
        (("--kl-clip", "much"), "--kl-clip much: give a number or none"),
        (("--frontend", "magic"), "there is no front-end 'magic'"),
        (("--backend", "magic"), "there is no backend 'magic'; choose auto"),
        (("--layers", "lstm*"), "the pattern 'lstm*' matches no layer name or kind"),
        (("--disable", "shares"), "there is no pass 'shares' to disable"),
        (("--fisher", "true"), "fisher='true' is not a source"),
        (("--strict",), "strict=True and 'gain' is not covered"),
    ],
)
def test_a_wrong_option(
    options: tuple[str, ...], message: str, model_file: Path, tmp_path: Path, invoke: Invoke
) -> None:
    assert message in sentence(invoke("compile", model_file, "-o", tmp_path / "out", *options, code=1))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compile", "nowhere.py"), "there is no file 'nowhere.py'"),
        (("compile", "{file}:other"), "has no 'other'; define"),
        (("inspect", "{file}", "--graph", "all"), "--graph all: choose one of forward, program, both"),
        (("inspect", "{file}", "--after", "melt"), "no pass 'melt' ran here"),
        (("inspect", "{folder}"), "is not an fxcurv artifact: it has no report.json"),
        (("inspect", "nowhere.fxc"), "'nowhere.fxc' cannot be read: No such file or directory"),
        (("opt", "{folder}/bad.fxc"), "bad.fxc, line 1: a node reads: %name : Type = op(operands)"),
        (("opt", "{folder}/bad.fxc", "-p", "nope"), "there is no pass 'nope'"),
        (("train", "{file}", "--steps", "1", "--epochs", "1"), "--steps and --epochs both say when to stop"),
        (("train", "{folder}/bare.py"), "has no 'batches(epoch)'"),
    ],
)
def test_a_wrong_call(
    arguments: tuple[str, ...], message: str, model_file: Path, tmp_path: Path, invoke: Invoke
) -> None:
    (tmp_path / "bad.fxc").write_text("hello\n")
    (tmp_path / "bare.py").write_text("from torch import nn\nmodel = nn.Linear(2, 2)\nloss = 'mse'\n")
    filled = [argument.format(file=model_file, folder=tmp_path) for argument in arguments]
    assert message in sentence(invoke(*filled, code=1))


def test_usage_errors_exit_with_2(model_file: Path, invoke: Invoke) -> None:
    invoke("compile", code=2)
    invoke("compile", model_file, "--damping", "much", code=2)
    invoke("nonsense", code=2)


def test_debug_shows_the_traceback(model_file: Path, invoke: Invoke) -> None:
    result = invoke("compile", model_file, "--method", "nope", "--debug", code=1)
    assert "Traceback" in result.stderr and result.stderr.splitlines()[-1].startswith("error: ")


def test_warnings_are_one_line(model_file: Path, invoke: Invoke) -> None:
    model_file.write_text(model_file.read_text() + "\n\ndef build_model():\n    return nn.Linear(5, 70)\n")
    result = invoke("train", model_file, "--steps", 1, "--fisher", "ggn")
    lines = [line for line in result.stderr.splitlines() if not line.startswith("step ")]
    assert len(lines) == 1 and lines[0].startswith("warning: fisher='ggn' runs 70 backward passes")


def test_neighbours_of_the_file_are_found(tmp_path: Path) -> None:
    (tmp_path / "fxcurv_test_neighbour.py").write_text("from torch import nn\nnet = nn.Linear(2, 2)\n")
    path = tmp_path / "net.py"
    path.write_text("from fxcurv_test_neighbour import net\nmodel = net\n\ndef other():\n    return net\n")
    assert load_model_file(str(path)).model is load_model_file(f"{path}:other").model


def test_input_specifications() -> None:
    x, mask, index = parse_inputs(["f32[2,3], bool[2]", "i64[4,5]<7"])
    assert tuple(x.shape) == (2, 3) and tuple(mask.shape) == (2,) and mask.dtype.is_floating_point is False
    assert tuple(index.shape) == (4, 5) and 2 <= int(index.max()) < 7 and int(index.min()) >= 0
    assert x.equal(parse_inputs(["f32[2,3]"])[0])
    assert [tuple(t.shape) for t in parse_inputs(["f64[]; bf16[3]"])] == [(), (3,)]
    with pytest.raises(FxcurvError, match="the upper bound must be at least 1"):
        parse_inputs(["i64[2]<0"])
