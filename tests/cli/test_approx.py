"""``approx``: the exact block is exact, and what is said of the approximations is right."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import FxcurvError
from fxcurv.losses import BCE, MSE, CrossEntropy
from fxcurv.methods.facts import Target
from fxcurv.tools import exact as exact_module
from fxcurv.tools.approx import ApproxRow, approximations
from fxcurv.tools.exact import Batch, Stored, exact_block, mean_gradient
from tests.methods import oracle
from tests.methods.nets import Attention, convnet, mlp

pytestmark = pytest.mark.usefixtures("float64")
Invoke = Callable[..., Any]


def targets(net: nn.Module, x: Tensor) -> dict[str, Target]:
    module = fxcurv.transform(copy.deepcopy(net), "foof", example_inputs=(x,), loss="cross_entropy", proofs=False)
    return {target.name: target for target in module._engine.facts.targets}


def case(kind: str) -> tuple[nn.Module, Tensor, Tensor, str, int]:
    """(net, inputs, class targets, layer, groups)."""
    torch.manual_seed(0)
    if kind == "linear":
        return mlp(4, 5, 3), torch.randn(7, 4), torch.randint(3, (7,)), "0", 1
    if kind == "conv":
        return convnet(), torch.randn(4, 2, 5, 5), torch.randint(3, (4,)), "2", 1
    if kind == "grouped conv":
        return convnet(groups=2), torch.randn(4, 2, 5, 5), torch.randint(3, (4,)), "0", 2
    if kind == "norm":
        net = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
        return net, torch.randn(6, 4), torch.randint(3, (6,)), "1", 5
    return Attention(), torch.randn(5, 4, 3), torch.randint(3, (5, 4)), "k", 1


KINDS = ("linear", "conv", "grouped conv", "norm", "tokens")


@pytest.mark.parametrize("kind", KINDS)
def test_exact_gauss_newton_block(kind: str) -> None:
    net, x, y, name, groups = case(kind)
    stored = Stored(net, targets(net, x)[name])
    batch = Batch(lambda model: model(x), y, CrossEntropy())
    expected = oracle.ggn(net, name, x, lambda f: F.cross_entropy(f, y), groups)
    torch.testing.assert_close(exact_block(net, stored, batch, "ggn"), expected)
    net.zero_grad()
    F.cross_entropy(net(x), y).backward()
    grads = [dict(net.named_parameters())[n].grad for n in oracle.stored(net, name)]
    torch.testing.assert_close(mean_gradient(net, stored, batch), oracle.joined(grads, groups).flatten())  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_exact_empirical_block(kind: str) -> None:
    net, x, y, name, groups = case(kind)
    stored = Stored(net, targets(net, x)[name])
    batch = Batch(lambda model: model(x), y, CrossEntropy())
    rows = oracle.example_gradients(
        net, name, x, lambda f, n: F.cross_entropy(f, y[n : n + 1], reduction="sum"), groups
    )
    torch.testing.assert_close(exact_block(net, stored, batch, "empirical"), rows.T @ rows / y.numel())


class Transposed(nn.Module):
    """x @ w + b, with w stored as (inputs, outputs)."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w + self.b


def test_a_weight_stored_the_other_way_round() -> None:
    net, x, y = Transposed(), torch.randn(6, 4), torch.randint(3, (6,))
    ((name, target),) = targets(net, x).items()
    assert (target.d_out, target.d_in) == (3, 5)
    F.cross_entropy(net(x), y).backward()
    assert net.w.grad is not None and net.b.grad is not None
    expected = torch.cat([net.w.grad.T, net.b.grad[:, None]], 1).flatten()
    batch = Batch(lambda model: model(x), y, CrossEntropy())
    torch.testing.assert_close(mean_gradient(net, Stored(net, target), batch), expected)


@pytest.mark.parametrize(
    ("loss", "divisor"), [(MSE(), 14), (MSE(reduction="sum"), 14), (BCE(reduction="batchmean"), 7), (BCE(), 14)]
)
def test_blocks_are_of_the_mean_loss(loss: Any, divisor: int) -> None:
    torch.manual_seed(0)
    net, x, y = mlp(3, 2), torch.randn(7, 3), torch.rand(7, 2)
    batch = Batch(lambda model: model(x), y, loss)
    stored = Stored(net, targets(net, x)["0"])
    plain: Any = F.mse_loss if isinstance(loss, MSE) else F.binary_cross_entropy_with_logits
    expected = oracle.ggn(net, "0", x, lambda f: plain(f, y, reduction="sum") / divisor)
    torch.testing.assert_close(exact_block(net, stored, batch, "ggn"), expected)


def test_models_that_allow_no_batched_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, y, name, _ = case("linear")
    stored = Stored(net, targets(net, x)[name])
    batch = Batch(lambda model: model(x), y, CrossEntropy())
    expected = exact_block(net, stored, batch, "ggn")
    plain = torch.autograd.grad

    def no_batches(*args: Any, **options: Any) -> Any:
        if options.pop("is_grads_batched", False):
            raise RuntimeError("not batched here")
        return plain(*args, **options)

    monkeypatch.setattr(torch.autograd, "grad", no_batches)
    torch.testing.assert_close(exact_block(net, stored, batch, "ggn"), expected)


def measured(where: str, methods: dict[str, dict[str, Any]], **options: Any) -> dict[tuple[str, str], ApproxRow]:
    net, x, y, name, _ = case(where)
    batch = Batch(lambda model: model(x), y, CrossEntropy())
    found = approximations(net.eval(), batch, methods, example_inputs=(x,), patterns=(name,), **options)
    return {(row.layer, row.method): row for row in found.rows}


def test_kfac_by_hand() -> None:
    net, x, y, _, _ = case("linear")
    rows = measured("linear", {"kfac": {"damping_scheme": "eigenvalue"}}, damping=0.02)
    row = rows["0", "kfac"]
    factors = oracle.step(net, "kfac", x, lambda f: F.cross_entropy(f, y), loss="cross_entropy", fisher="ggn")
    block, exact = oracle.kron(factors.factors("0")), oracle.ggn(net, "0", x, lambda f: F.cross_entropy(f, y))
    vector = factors.pair("0")[0].flatten()
    damped = [torch.linalg.solve(m + 0.02 * torch.eye(len(m)), vector) for m in (block, exact)]
    assert row.status == "ok" and row.shape == (1, 5, 5) and row.source == "ggn"
    assert row.error == pytest.approx(oracle.relative(block, exact))
    assert row.cosine == pytest.approx(float(F.cosine_similarity(damped[0], damped[1], dim=0)))
    assert row.solve_error == pytest.approx(oracle.relative(damped[0], damped[1]))
    assert row.trace == pytest.approx(float(block.trace() / exact.trace()))
    values = torch.linalg.eigvalsh(block)
    assert row.eigenvalues == pytest.approx(tuple(values.tolist()), abs=1e-12)
    assert row.condition == pytest.approx(float((values[-1] + 0.02) / (values[0] + 0.02)))
    assert row.own_cosine == pytest.approx(row.cosine) and row.own_error == pytest.approx(row.solve_error)
    best = rows["0", "exact"]
    assert best.error == 0 and best.cosine == pytest.approx(1) and best.trace == 1
    assert sum(best.eigenvalues) == pytest.approx(float(exact.trace()))


@pytest.mark.parametrize("kind", ["linear", "grouped conv", "tokens"])
def test_ekfac_is_measured_in_its_basis_and_not_farther_than_kfac(kind: str) -> None:
    rows = {method: row for (_, method), row in measured(kind, {"kfac": {}, "ekfac": {}}, kind="empirical").items()}
    assert rows["ekfac"].error < rows["kfac"].error * (1 - 1e-6)  # type: ignore[operator]
    if kind != "grouped conv":  # the trace of the whole is that of its groups
        assert abs(rows["kfac"].trace - 1) > 1e-3  # type: ignore[operator]
    assert rows["ekfac"].trace == pytest.approx(1)
    assert rows["ekfac"].own_cosine == pytest.approx(rows["ekfac"].cosine)


def test_the_nearest_products_are_as_near_as_the_singular_values_say() -> None:
    """Which they are only if all examples of the batch are used, not the share that a step takes."""
    net, x, y, name, _ = case("linear")
    rows = {method: row for (_, method), row in measured("linear", {"kpsvd": {}, "deflation": {}}).items()}
    block = oracle.ggn(net, name, x, lambda f: F.cross_entropy(f, y)).reshape(5, 5, 5, 5)
    values = torch.linalg.svdvals(block.permute(0, 2, 1, 3).reshape(25, 25))
    for terms, method in ((1, "kpsvd"), (2, "deflation")):
        best = float(values[terms:].norm() / values.norm())
        assert rows[method].error == pytest.approx(best, rel=1e-4)


def test_norm_layers_keep_whole_blocks_of_units() -> None:
    net, x, y, name, groups = case("norm")
    row = measured("norm", {"kfac": {}})[name, "kfac"]
    exact = oracle.ggn(net, name, x, lambda f: F.cross_entropy(f, y), groups)
    expected = oracle.relative(oracle.block_diagonal(exact, groups), exact)
    assert row.error == pytest.approx(expected) and row.trace == pytest.approx(1)


def test_methods_without_a_block_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = measured("linear", {"sgd": {}, "hessian_free": {}, "kfac": {"damping": -1}})
    sgd, whole, refused = (rows["0", name] for name in ("sgd", "hessian_free", "kfac"))
    assert sgd.status == "no block" and "tensors" in sgd.reason and sgd.error is None and 0 < sgd.own_cosine < 1  # type: ignore[operator]
    assert whole.status == "refused" and "whole optimizer" in whole.reason and whole.own_cosine is None
    assert refused.status == "refused" and "damping=-1" in refused.reason

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such\nthing")

    monkeypatch.setattr("fxcurv.tools.approx._stepped", broken)
    assert measured("linear", {"kfac": {}})["0", "kfac"].reason == "RuntimeError: no such thing"


def test_what_is_too_large_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, y, _, _ = case("linear")
    batch = Batch(lambda model: model(x), y, CrossEntropy())
    found = approximations(net, batch, {}, example_inputs=(x,), limit=20)
    assert found.left_out == (("0", "its block is 25 x 25, beyond --limit 20"),)
    assert [row.layer for row in found.rows] == ["2"] and found.terms == 7
    with pytest.raises(FxcurvError, match="no layer can be measured .*beyond --limit 3"):
        approximations(net, batch, {}, example_inputs=(x,), limit=3)
    with pytest.raises(FxcurvError, match="no layer's name or kind matches"):
        approximations(net, batch, {}, example_inputs=(x,), patterns=["lstm*"])
    monkeypatch.setattr(exact_module, "MEMORY", 100)
    with pytest.raises(FxcurvError, match="take fewer examples with --batch"):
        approximations(net, batch, {}, example_inputs=(x,))


MODEL = """
import torch
from torch import nn
loss = "cross_entropy"
settings = {"kfac": {"damping": 5.0, "ema": 0.5, "damping_scheme": "eigenvalue"}}
def build_model():
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.9), nn.Tanh(), nn.Linear(6, 3))
example_inputs = (torch.zeros(2, 4),)
def batches(epoch):
    x = torch.randn(12, 4)
    yield (x,), (x[:, 0] > 0).long()
"""


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """The file above, in float32 as files are."""
    torch.set_default_dtype(torch.float32)
    path = tmp_path / "net.py"
    path.write_text(MODEL)
    return path


def test_the_verb(net: Path, tmp_path: Path, invoke: Invoke, invoke_json: Invoke) -> None:
    arguments = ("approx", net, "-m", "kfac,ekfac,adam", "--batch", 9, "--layers", "linear", "--damping", 0.01)
    shown = invoke(*arguments, "-o", tmp_path / "out").stdout
    for text in (
        "Gauss-Newton blocks over 9 loss terms, damping 0.01",
        "0: linear, 1 x 6 x 5",
        "adam (0, 3): it works",
    ):
        assert text in shown
    assert (tmp_path / "out" / "spectra.png").read_bytes()[:4] == b"\x89PNG"
    kept = json.loads((tmp_path / "out" / "approx.json").read_text())
    found = invoke_json(*arguments)
    assert found == kept and [row["method"] for row in found["rows"]][:4] == ["exact", "kfac", "ekfac", "adam"]
    kfac = found["rows"][1]
    assert kfac["own_error"] == pytest.approx(kfac["solve_error"]), "the scheme is the file's, the damping is not"
    last = [row for row in found["rows"] if row["layer"] == "3"]
    assert last[1]["error"] < 0.9 and len(last[0]["eigenvalues"]) == 21
    empirical = invoke_json(*arguments, "--fisher", "empirical")
    assert empirical["kind"] == "empirical" and empirical["rows"][1]["source"] == "empirical"
    assert "Gauss-Newton" not in invoke(*arguments, "--fisher", "empirical").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--fisher", "mc"), "--fisher mc: the exact block is 'ggn' or 'empirical'"),
        (("--damping", "0"), "it must be above 0"),
        (("-m", "kfax"), "there is no method 'kfax'; did you mean "),
        (("--set", "dampin=1"), "none of the methods has a hyper-parameter 'dampin'"),
        (("--layers", "lstm*"), "no layer's name or kind matches"),
    ],
)
def test_one_sentence(net: Path, invoke: Invoke, arguments: tuple[str, ...], message: str) -> None:
    assert message in invoke("approx", net, "-m", "kfac", *arguments, code=1).stderr
