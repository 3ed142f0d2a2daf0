"""Blocks against the dense Gauss-Newton matrix of the loss that the user really computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcurv import losses
from fxcurv.errors import FxcurvError
from tests.methods.nets import Attention, mlp
from tests.methods.oracle import accumulate, corrected, ggn, step, transform

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore:fisher='ggn' runs")]

ROWS = torch.tensor([0, 2, 1, -100, 2])
CUSTOM = torch.tensor([0, 2, 1, 1, 2])
SOFT = torch.softmax(torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64), 1)
WEIGHT = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
TOKENS = torch.tensor([[0, 2, 1, -100], [1, 1, -100, 0], [2, 0, 0, 1]])
BINARY = torch.rand(5, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
KEEP = torch.tensor([[True, True, False], [True] * 3, [False] * 3, [True, False, True], [True] * 3])

# name: (loss=, the user's scalar, arguments of backward)
FLAT: dict[str, tuple[Any, Callable[[Tensor], Tensor], dict[str, Any]]] = {
    "indices": ("cross_entropy", lambda f: F.cross_entropy(f, CUSTOM), {}),
    "torch's ignore_index": ("cross_entropy", lambda f: F.cross_entropy(f, ROWS), {"targets": ROWS}),
    "ignore_index": (
        nn.CrossEntropyLoss(ignore_index=1),
        lambda f: F.cross_entropy(f, CUSTOM, ignore_index=1),
        {"targets": CUSTOM},
    ),
    "ignore_index by mask": (
        losses.CrossEntropy(ignore_index=1),
        lambda f: F.cross_entropy(f, CUSTOM, ignore_index=1),
        {"mask": CUSTOM != 1},
    ),
    "class weights": (
        nn.CrossEntropyLoss(weight=WEIGHT),
        lambda f: F.cross_entropy(f, CUSTOM, weight=WEIGHT),
        {"targets": CUSTOM},
    ),
    "weights and ignored": (
        nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1),
        lambda f: F.cross_entropy(f, CUSTOM, weight=WEIGHT, ignore_index=1),
        {"targets": CUSTOM},
    ),
    "smoothing": (
        nn.CrossEntropyLoss(label_smoothing=0.2),
        lambda f: F.cross_entropy(f, CUSTOM, label_smoothing=0.2),
        {},
    ),
    "smoothing and weights": (
        nn.CrossEntropyLoss(label_smoothing=0.2, weight=WEIGHT),
        lambda f: F.cross_entropy(f, CUSTOM, label_smoothing=0.2, weight=WEIGHT),
        {"targets": CUSTOM},
    ),
    "probabilities": ("cross_entropy", lambda f: F.cross_entropy(f, SOFT), {}),
    "batchmean": (
        losses.CrossEntropy(reduction="batchmean"),
        lambda f: F.cross_entropy(f, CUSTOM, reduction="sum") / 5,
        {},
    ),
    "bce": ("bce", lambda f: F.binary_cross_entropy_with_logits(f, BINARY), {}),
    "bce batchmean": (
        losses.BCE(reduction="batchmean"),
        lambda f: F.binary_cross_entropy_with_logits(f, BINARY, reduction="sum") / 5,
        {},
    ),
    "bce pos_weight": (
        nn.BCEWithLogitsLoss(pos_weight=WEIGHT),
        lambda f: F.binary_cross_entropy_with_logits(f, BINARY, pos_weight=WEIGHT),
        {"targets": BINARY},
    ),
    "bce weight": (
        nn.BCEWithLogitsLoss(weight=WEIGHT),
        lambda f: F.binary_cross_entropy_with_logits(f, BINARY, weight=WEIGHT),
        {},
    ),
    "bce masked": ("bce", lambda f: F.binary_cross_entropy_with_logits(f[KEEP], BINARY[KEEP]), {"mask": KEEP}),
    "mse": ("mse", lambda f: F.mse_loss(f, BINARY), {}),
    "mse masked": ("mse", lambda f: F.mse_loss(f[KEEP], BINARY[KEEP]), {"mask": KEEP}),
    "gaussian": ("gaussian", lambda f: (f - BINARY).square().sum() / 2 / 5, {}),
    "gaussian masked rows": (
        "gaussian",
        lambda f: (f - BINARY)[KEEP.any(1)].square().sum() / 2 / 4,
        {"mask": KEEP.any(1)},
    ),
}


@pytest.mark.parametrize("case", FLAT)
def test_diagonal_and_trace_equal_those_of_the_exact_block(case: str) -> None:
    loss, user, arguments = FLAT[case]
    net, x = mlp(3, 4, 3), torch.randn(5, 3)
    taken = step(net, "diag", x, user, loss=loss, fisher="ggn", backward=arguments)
    for name in ("0", "2"):
        torch.testing.assert_close(taken.factors(name)["D"].flatten(), ggn(net, name, x, user).diagonal())


@pytest.mark.parametrize("case", FLAT)
def test_output_factor_of_a_single_input_is_exact(case: str) -> None:
    """With equal inputs A has rank one and carries no correlation with G: the Kronecker product is exact."""
    loss, user, arguments = FLAT[case]
    net, x = mlp(3, 3), torch.randn(1, 3).expand(5, 3)
    taken = step(net, "kfac", x, user, loss=loss, fisher="ggn", backward=arguments)
    g = taken.factors("0")["G"]
    torch.testing.assert_close(torch.kron(g, taken.factors("0")["A"]), ggn(net, "0", x, user))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("case", ["plain", "ignored", "weights", "sum per example"])
def test_token_losses(case: str, flat: bool) -> None:
    net, x = Attention(flat=flat), torch.randn(3, 4, 3)
    y = TOKENS.clamp(min=0) if case in ("plain", "sum per example") else TOKENS
    y = y.flatten() if flat else y
    options: dict[str, Any] = {"weight": WEIGHT} if case == "weights" else {}
    terms = float(y.numel() if flat else 3)

    def user(f: Tensor) -> Tensor:
        if case == "sum per example":
            return F.cross_entropy(f, y, reduction="sum") / terms
        return F.cross_entropy(f, y, **options)

    loss = losses.CrossEntropy(reduction="batchmean" if case == "sum per example" else "mean", **options)
    arguments = {} if case in ("plain", "sum per example") else {"targets": y}
    taken = step(net, "diag", x, user, loss=loss, fisher="ggn", backward=arguments)
    for name in ("q", "k", "v", "head"):
        torch.testing.assert_close(taken.factors(name)["D"].flatten(), ggn(net, name, x, user).diagonal())


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
@pytest.mark.parametrize("fisher", ["mc", "ggn", "ggn_signs"])
def test_reductions_differ_by_the_divisor_only(reduction: str, fisher: str) -> None:
    """ "batchmean" of 5 x 3 numbers is three times "mean"; "sum" is reported as "mean"."""
    net, x = mlp(3, 4, 3), torch.randn(5, 3)
    mean = step(net, "kfac", x, lambda f: F.mse_loss(f, BINARY), loss="mse", fisher=fisher)
    factor = {"mean": 1.0, "sum": 15.0, "batchmean": 3.0}[reduction]
    other = step(
        net, "kfac", x, lambda f: factor * F.mse_loss(f, BINARY), loss=losses.MSE(reduction=reduction), fisher=fisher
    )
    curvature = 3.0 if reduction == "batchmean" else 1.0
    torch.testing.assert_close(other.factors("0")["G"], curvature * mean.factors("0")["G"])
    torch.testing.assert_close(other.factors("0")["A"], mean.factors("0")["A"])


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(weight=WEIGHT), losses.CrossEntropy(ignore_index=1)])
def test_a_loss_that_weighs_terms_needs_the_targets(loss: Any) -> None:
    net, x = mlp(3, 4, 3), torch.randn(5, 3)
    for fisher in ("mc", "ggn", "empirical"):
        with pytest.raises(FxcurvError, match="targets"):
            step(net, "kfac", x, lambda f: F.cross_entropy(f, CUSTOM), loss=loss, fisher=fisher)


def test_ignored_terms_leave_no_trace() -> None:
    """Statistics of a batch with ignored rows equal those of the batch without them, but for the rows that A counts."""
    net, x = mlp(3, 4, 3), torch.randn(5, 3)
    full = step(
        net,
        "diag",
        x,
        lambda f: F.cross_entropy(f, ROWS),
        loss="cross_entropy",
        fisher="ggn",
        backward={"targets": ROWS},
    )
    kept = ROWS >= 0
    part = step(net, "diag", x[kept], lambda f: F.cross_entropy(f, ROWS[kept]), loss="cross_entropy", fisher="ggn")
    torch.testing.assert_close(full.factors("0")["D"], part.factors("0")["D"])
    torch.testing.assert_close(full.direction["0.weight"], part.direction["0.weight"])


def test_ekfac_of_a_masked_loss_has_the_right_trace() -> None:
    net, x = mlp(3, 4, 3), torch.randn(5, 3)
    user, arguments = FLAT["mse masked"][1:]
    model = transform(net, "ekfac", x, loss="mse", fisher="ggn")
    accumulate(model, [(x, user, dict(arguments))])
    model.due(refresh=False)
    taken = accumulate(model, [(x, user, dict(arguments))])
    torch.testing.assert_close(corrected(taken.factors("0")).trace(), ggn(net, "0", x, user).trace())
