"""The loss of self-training on a graph: its value, its curvature against the Hessian of that, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.losses import CrossEntropy, SemiSupervised, strength

F64 = torch.float64
KNOWN = torch.tensor([True, False, False, True, False])
LABELS = torch.tensor([2, -1, -1, 0, -1])  # nothing that could be read where none is known


def outputs(seed: int = 0) -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_value_is_the_sum_of_two_means(weight: float) -> None:
    f, loss = outputs().requires_grad_(), SemiSupervised(labelled=KNOWN)
    goal = loss.targets(f, LABELS, weight)
    expected = F.cross_entropy(f[KNOWN], LABELS[KNOWN])
    expected = expected + weight * F.cross_entropy(f[~KNOWN], f[~KNOWN].argmax(1))
    torch.testing.assert_close(loss.value(f, goal), expected)
    (ours,), (theirs,) = (torch.autograd.grad(v, f, retain_graph=True) for v in (loss.value(f, goal), expected))
    torch.testing.assert_close(ours, theirs)
    assert not goal.requires_grad
    assert loss.count(f, goal).item() == pytest.approx(2 + 3 * weight)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_curvature_is_that_of_the_value(weight: float) -> None:
    f, loss = outputs(), SemiSupervised(labelled=KNOWN)
    goal = loss.targets(f, LABELS, weight)
    n = loss.count(f, goal)
    hessian = torch.autograd.functional.hessian(lambda x: loss.value(x.reshape(f.shape), goal), f.reshape(-1)) * n
    columns = [b.reshape(-1) for b in loss.columns(f, goal)]
    blocks = sum(torch.outer(b, b) for b in columns) * torch.kron(torch.eye(5, dtype=F64), torch.ones(3, 3, dtype=F64))
    torch.testing.assert_close(blocks, hessian)
    u = outputs(1)
    torch.testing.assert_close(loss.hessian_product(f, u, goal).reshape(-1), hessian @ u.reshape(-1))
    draws = torch.stack([loss.sample(f, (s,), goal).reshape(-1) for s in range(4000)])
    assert (draws.T @ draws / 4000 - hessian).norm() < 0.06 * hessian.norm()


def test_a_graph_of_labelled_nodes_is_plain_cross_entropy() -> None:
    f, labels = outputs(), torch.tensor([2, 1, 0, 0, 1])
    loss = SemiSupervised(labelled=torch.ones(5, dtype=torch.bool))
    goal = loss.targets(f, labels, 0.7)
    torch.testing.assert_close(loss.value(f, goal), F.cross_entropy(f, labels))
    assert loss.count(f, goal) == 5
    for ours, theirs in zip(loss.columns(f, goal), CrossEntropy().columns(f), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_half_precision_is_widened() -> None:
    loss, f = SemiSupervised(labelled=KNOWN), outputs().half()
    goal = loss.targets(f, LABELS, 0.5)
    assert goal.dtype == torch.float32 and loss.value(f, goal).dtype == torch.float32
    assert loss.hessian_product(f, f, goal).dtype == torch.float16


def test_strength_grows_with_the_epochs() -> None:
    assert [strength(k, 4, 2.0) for k in (1, 2, 4)] == [1 / 16, 1 / 4, 1.0]
    assert strength(3, 4, None) == 0.0
    with pytest.raises(FxcurvError, match="epoch 5 does not lie"):
        strength(5, 4, 2.0)


def test_equal_masks_are_equal_losses() -> None:
    assert SemiSupervised(labelled=KNOWN) == SemiSupervised(labelled=KNOWN.clone())
    assert SemiSupervised(labelled=KNOWN) != SemiSupervised(labelled=~KNOWN)
    assert SemiSupervised(labelled=KNOWN).needs_targets


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labelled": KNOWN.long()}, "boolean tensor"),
        ({"labelled": torch.zeros(5, dtype=torch.bool)}, "at least one"),
        ({"labelled": KNOWN, "reduction": "sum"}, "no loss of the paper"),
    ],
)
def test_wrong_settings(options: dict[str, object], message: str) -> None:
    with pytest.raises(FxcurvError, match=message):
        SemiSupervised(**options)  # type: ignore[arg-type]


def test_wrong_calls() -> None:
    loss, f = SemiSupervised(labelled=KNOWN), outputs()
    goal = loss.targets(f, LABELS, 1.0)
    with pytest.raises(FxcurvError, match="needs the targets"):
        loss.count(f)
    with pytest.raises(FxcurvError, match="takes no mask="):
        loss.count(f, goal, KNOWN)
    with pytest.raises(FxcurvError, match="make them with targets"):
        loss.value(f, LABELS)
    with pytest.raises(FxcurvError, match="has 5 nodes"):
        loss.targets(f[:4], LABELS[:4], 1.0)
    with pytest.raises(FxcurvError, match="one class index for each of the 5 nodes"):
        loss.targets(f, LABELS[:4], 1.0)
    with pytest.raises(FxcurvError, match="strength=-1"):
        loss.targets(f, LABELS, -1.0)
