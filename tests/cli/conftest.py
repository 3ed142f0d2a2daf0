"""A small model file, and the command line in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fxcurv.cli.main import app

MODEL = '''
"""Two layers, a dropout, a parameter that no layer covers."""
import torch
from torch import nn

loss = "cross_entropy"
example_inputs = (torch.randn(6, 5, generator=torch.Generator().manual_seed(1)),)
settings = {"kfac": {"lr": 0.05}, "sgd": {"lr": 0.2, "momentum": 0.5}}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.drop = nn.Dropout(0.2)
        self.last = nn.Linear(8, 3)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.last(self.drop(torch.tanh(self.first(x)))) * self.gain.exp()


def build_model():
    return Net()


def batches(epoch):
    draw = torch.Generator().manual_seed(epoch)
    for _ in range(4):
        x = torch.randn(6, 5, generator=draw)
        yield (x,), (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def evaluate(model):
    return {"norm": float(sum(p.square().sum() for p in model.parameters()))}
'''


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    """The file above."""
    path = tmp_path / "net.py"
    path.write_text(MODEL)
    return path


@pytest.fixture
def invoke() -> Callable[..., Any]:
    """Runs the command line; checks the exit code and returns the result."""

    def run(*arguments: object, code: int = 0) -> Any:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == code, f"exit code {result.exit_code}\n{result.output}"
        return result

    return run


@pytest.fixture
def invoke_json(invoke: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a verb with --json; stdout must be JSON and nothing else."""
    return lambda *arguments, code=0: json.loads(invoke(*arguments, "--json", code=code).stdout)
