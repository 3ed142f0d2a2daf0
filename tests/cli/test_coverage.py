"""``fxcurv inspect --coverage``: every parameter with its treatment, in a table that can be read and in stable JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fxcurv
from fxcurv.cli.folding import fold, folded_name
from fxcurv.cli.modelfile import load_model_file

Invoke = Callable[..., Any]
ROW = {
    "parameter", "tensor", "elements", "layer", "kind", "shape", "uses", "statistic", "status", "reason", "source",
    "chain", "state_bytes", "shared_bytes", "transient_bytes",
}  # fmt: skip
REPORT = {
    "method", "fisher", "frontend", "rows", "notes", "state_bytes", "transient_bytes", "covered", "kinds",
}  # fmt: skip
DEEP = '''
"""Forty-eight layers in twelve blocks, a tied head, a parameter that is never read and one behind a sine."""
import torch
from torch import nn

loss = "cross_entropy"
example_inputs = (torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(1)),)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.phase = nn.Parameter(torch.ones(8))

    def forward(self, x):
        y = self.norm(x)
        y = (self.query(y) @ self.key(y).transpose(1, 2)).softmax(-1) @ self.value(y)
        return x + y * torch.sin(self.phase)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.encoder_blocks = nn.ModuleList(Block() for _ in range(12))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.words.weight
        self.unused = nn.Parameter(torch.zeros(3))

    def forward(self, tokens):
        x = self.words(tokens)
        for block in self.encoder_blocks:
            x = block(x)
        return self.head(x.mean(1))


def build_model():
    torch.manual_seed(0)
    return Net()
'''


@pytest.fixture
def deep_file(tmp_path: Path) -> Path:
    path = tmp_path / "deep.py"
    path.write_text(DEEP)
    return path


def test_a_hundred_parameters_are_read_at_a_glance(deep_file: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    lines = invoke("inspect", deep_file, "--coverage").stdout.splitlines()
    assert len(lines) < 50 and max(map(len, lines)) <= 100 and not any("\x1b" in line for line in lines)
    text = " ".join(" ".join(lines).split())
    assert "encoder_blocks.0-11.query (12)" in text and "encoder_blocks.1.query" not in text
    assert "kfac: 96.7 % of 2,971 elements covered, captured by symbolic" in text
    assert "tied weight" in text
    assert "unused, 3 elements" in text and "It is never used in this graph." in text
    assert "encoder_blocks.0-11.phase (12), 96 elements" in text
    assert "-> sin" in text and "deep.py:20: return x + y * torch.sin(self.phase)" in text
    for kind, share in (("linear", "90.2 %"), ("layer_norm", "6.5 %"), ("gradient only", "3.3 %")):
        assert any(line.startswith(kind) and line.rstrip().endswith(share) for line in lines), kind


@pytest.mark.parametrize("method", ["kfac", "ekfac", "diag", "shampoo", "adam", "sgd"])
def test_json_says_all_of_every_parameter(method: str, deep_file: Path, invoke_json: Invoke):
    found = invoke_json("inspect", deep_file, "--method", method, "--coverage")
    assert set(found) == REPORT and all(set(row) == ROW for row in found["rows"])
    model = load_model_file(str(deep_file), None, None, None).model
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    assert {row["parameter"]: row["tensor"] for row in found["rows"]} == shapes
    total = sum(row["elements"] for row in found["rows"])
    left = sum(row["elements"] for row in found["rows"] if row["status"] == "gradient only")
    assert total == 2971 and found["covered"] == pytest.approx(1 - left / total)
    assert sum(kind["elements"] for kind in found["kinds"].values()) == total
    assert sum(kind["share"] for kind in found["kinds"].values()) == pytest.approx(1)
    assert found["kinds"].get("gradient only", {"elements": 0})["elements"] == left
    if method in ("kfac", "ekfac", "diag"):
        assert found["kinds"]["linear"]["layers"] == 37 and found["kinds"]["layer_norm"]["layers"] == 12
        rows = {row["parameter"]: row for row in found["rows"]}
        assert rows["words.weight"]["uses"] == 2 and rows["words.weight"]["shape"] == [1, 11, 8]
        assert rows["encoder_blocks.3.phase"]["chain"][-1].startswith("sin")
        assert "deep.py:20" in rows["encoder_blocks.3.phase"]["source"]


@pytest.mark.parametrize("method", ["kfac", "ekfac", "diag", "shampoo", "adam"])
def test_memory_is_that_of_the_states(method: str, deep_file: Path):
    """By layer from the values that are really there, a shared one in the account of each and once in the sum."""
    model = fxcurv.transform(load_model_file(str(deep_file), None, None, None).model, method, loss="cross_entropy")
    report, states = model.report(), model._engine.states
    real = {role: value.numel() * value.element_size() for role, value in states.values.items()}
    assert report.state_bytes == sum(real.values()) > 0
    for row in report.rows:
        owner = row.layer or row.parameter
        mine = {states.by_key[key] for key in states.by_key if key.startswith(f"{owner}.")}
        assert row.state_bytes == sum(real[role] for role in mine)
    assert report.transient_bytes == max(row.transient_bytes for row in report.rows) > 0


def test_shared_factors_are_said(deep_file: Path):
    model = fxcurv.transform(load_model_file(str(deep_file), None, None, None).model, "kfac", loss="cross_entropy")
    rows = {row.parameter: row for row in model.report().rows}
    block = "encoder_blocks.0"
    factor = 9 * 9 * torch.finfo(torch.float32).bits // 8  # the input factor of query, key and value, bias included
    assert rows[f"{block}.query.weight"].shared_bytes >= factor
    assert rows["words.weight"].shared_bytes == rows[f"{block}.norm.weight"].shared_bytes == 0


def test_names_fold_where_only_numbers_differ():
    names = ["a.0.w", "a.1.w", "b", "a.2.w", "a.7.w", "c.1.d.3", "c.2.d.3"]
    groups = fold(names, lambda name: name, lambda name: name == "a.2.w")
    assert groups == [["a.0.w", "a.1.w", "a.7.w"], ["b"], ["a.2.w"], ["c.1.d.3", "c.2.d.3"]]
    assert [folded_name(group) for group in groups] == ["a.0-1,7.w", "b", "a.2.w", "c.1-2.d.3"]
