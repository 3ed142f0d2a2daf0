"""Every loss and option against torch's own loss and autograd's Hessian of the sum over its terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxcurv.losses import BCE, MSE, CrossEntropy, Gaussian, Loss

F64 = torch.float64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@dataclass(frozen=True)
class Case:
    """A loss, its outputs and targets, and torch's word for it with ``reduction`` "none", "sum" or "mean"."""

    loss: Loss
    torch_loss: Callable[[Tensor, Tensor, str], Tensor]
    outputs: Tensor
    targets: Tensor
    mask: Tensor | None = None

    def total(self, outputs: Tensor) -> Tensor:
        terms = self.torch_loss(outputs, self.targets, "none")
        return (terms if self.mask is None else terms * self.mask).sum()

    def hessian(self) -> Tensor:
        n = self.outputs.numel()
        return torch.autograd.functional.hessian(self.total, self.outputs).reshape(n, n)

    @property
    def given(self) -> dict[str, Tensor | None]:
        return {"targets": self.targets, "mask": self.mask}

    def repeated(self, times: int) -> Case:
        def repeat(t: Tensor) -> Tensor:
            return t.repeat(times, *[1] * (t.dim() - 1))

        return Case(
            self.loss,
            self.torch_loss,
            repeat(self.outputs),
            repeat(self.targets),
            None if self.mask is None else repeat(self.mask),
        )


def ce(shape: Sequence[int], targets: Tensor | None = None, mask: Tensor | None = None, **options: object) -> Case:
    rows, classes, *positions = shape
    torch_options = {k: v for k, v in options.items() if v is not None}
    if targets is None:
        targets = torch.randint(classes, (rows, *positions), generator=torch.Generator().manual_seed(1))
    return Case(
        CrossEntropy(**options),
        lambda f, y, reduction: F.cross_entropy(f, y, reduction=reduction, **torch_options),
        randn(*shape),
        targets,
        mask,
    )


def bce(shape: Sequence[int], mask: Tensor | None = None, **options: Tensor) -> Case:
    return Case(
        BCE(**options),
        lambda f, y, reduction: F.binary_cross_entropy_with_logits(f, y, reduction=reduction, **options),
        randn(*shape) * 2,
        randn(*shape, seed=1).sigmoid().where(randn(*shape, seed=2) > 0, 1.0),
        mask,
    )


def gaussian(f: Tensor, y: Tensor, reduction: str) -> Tensor:
    rows = 0.5 * (f - y).square()
    return {"none": rows, "sum": rows.sum(), "mean": rows.sum(-1).mean()}[reduction]


W = torch.tensor([0.5, 2.0, 0.0, 1.3], dtype=F64)
SOFT = randn(3, 4, seed=3).softmax(1)
SOFT_2D = randn(2, 4, 2, seed=4).abs()  # not normalised
SOME = torch.tensor([[True, False], [True, True]])
CASES = {
    "ce": ce((4, 3)),
    "ce-positions": ce((2, 3, 2, 2)),
    "ce-one-class": ce((3, 1)),
    "ce-torch-ignored": ce((4, 3), torch.tensor([0, -100, 2, 1])),
    "ce-ignored": ce((2, 4, 2), torch.tensor([[1, 3], [0, 1]]), ignore_index=1),
    "ce-ignored-outside": ce((3, 4), torch.tensor([7, 3, 7]), ignore_index=7, weight=W),
    "ce-smoothed": ce((3, 4), label_smoothing=0.2),
    "ce-weighted": ce((4, 4), torch.tensor([1, 0, 2, 3]), weight=W),
    "ce-everything": ce((2, 4, 2), torch.tensor([[1, 0], [0, 3]]), weight=W, label_smoothing=0.3, ignore_index=0),
    "ce-masked": ce((2, 4, 2), mask=SOME, weight=W),
    "ce-probabilities": ce((3, 4), SOFT),
    "ce-probabilities-unnormalised": ce((2, 4, 2), SOFT_2D, label_smoothing=0.3),
    "ce-probabilities-all": ce((2, 4, 2), SOFT_2D, weight=W, label_smoothing=0.3),
    "bce": bce((3, 2)),
    "bce-1d": bce((4,)),
    "bce-weighted": bce((3, 2), weight=torch.tensor([0.3, 0.0], dtype=F64)),
    "bce-positive": bce((3, 2), pos_weight=torch.tensor([3.0, 0.2], dtype=F64)),
    "bce-masked": bce((2, 2), SOME, weight=W[:2], pos_weight=W[2:]),
    "mse": Case(MSE(), lambda f, y, r: F.mse_loss(f, y, reduction=r), randn(2, 3, 2), randn(2, 3, 2, seed=1)),
    "mse-masked": Case(MSE(), lambda f, y, r: F.mse_loss(f, y, reduction=r), randn(2, 2), randn(2, 2, seed=1), SOME),
    "gaussian": Case(Gaussian(), gaussian, randn(2, 3, 2), randn(2, 3, 2, seed=1)),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def outer(b: Tensor) -> Tensor:
    return b.flatten()[:, None] * b.flatten()


def by_row(matrix: Tensor, rows: int) -> Tensor:
    """The diagonal blocks over dimension 0 of an (n, n) matrix, (rows, n / rows, n / rows)."""
    blocks = matrix.unflatten(0, (rows, -1)).unflatten(2, (rows, -1))
    return torch.stack([blocks[r, :, r] for r in range(rows)])


def replaced(loss: Loss, reduction: str) -> Loss:
    fields = {k: getattr(loss, k) for k in loss.__dataclass_fields__}
    return type(loss)(**{**fields, "reduction": reduction})


@every_case
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_value_and_gradient_are_torchs(case: Case, reduction: str) -> None:
    ours, theirs = case.outputs.clone().requires_grad_(), case.outputs.clone().requires_grad_()
    value = replaced(case.loss, reduction).value(ours, case.targets)
    expected = case.torch_loss(theirs, case.targets, reduction)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    value.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


@every_case
def test_count_turns_the_mean_into_the_sum(case: Case) -> None:
    total = case.torch_loss(case.outputs, case.targets, "sum")
    for reduction in ("mean", "batchmean"):
        loss = replaced(case.loss, reduction)
        count = loss.count(case.outputs, case.targets)
        assert count.dim() == 0 and count.dtype == F64
        torch.testing.assert_close(loss.value(case.outputs, case.targets) * count, total, rtol=1e-12, atol=1e-12)
    assert replaced(case.loss, "batchmean").count(case.outputs, case.targets) == case.outputs.shape[0]
    same = replaced(case.loss, "sum").count(case.outputs, **case.given)
    assert torch.equal(same, replaced(case.loss, "mean").count(case.outputs, **case.given))


@every_case
def test_hessian_product_is_autograds(case: Case) -> None:
    u = randn(*case.outputs.shape, seed=9)
    product = case.loss.hessian_product(case.outputs, u, **case.given)
    assert product.shape == u.shape
    torch.testing.assert_close(product.flatten(), case.hessian() @ u.flatten(), rtol=1e-11, atol=1e-11)


@every_case
def test_columns_are_a_factor_of_every_example(case: Case) -> None:
    rows = case.outputs.shape[0]
    columns = list(case.loss.columns(case.outputs, **case.given))
    assert len(columns) == case.loss.column_count(case.outputs) == case.outputs[0].numel()
    got = sum(by_row(outer(b), rows) for b in columns)
    torch.testing.assert_close(got, by_row(case.hessian(), rows), rtol=1e-11, atol=1e-11)
    for b in columns:  # one position at a time
        per_row = b.movedim(1, -1).reshape(rows, -1, b.shape[1]) if isinstance(case.loss, CrossEntropy) else b
        touched = (per_row != 0).any(-1) if isinstance(case.loss, CrossEntropy) else per_row.reshape(rows, -1) != 0
        assert (touched.sum(-1) <= 1).all()


def assert_monte_carlo(samples: Tensor, expected: Tensor) -> None:
    """``samples`` (n, ...) average to ``expected`` within 4.5 standard errors, elementwise."""
    error = samples.std(0) / len(samples) ** 0.5
    assert ((samples.mean(0) - expected).abs() <= 4.5 * error + 1e-10).all()


@every_case
def test_samples_have_the_hessian_as_second_moment(case: Case) -> None:
    many, rows = case.repeated(4000), case.outputs.shape[0]
    b = case.loss.sample(many.outputs, (1, 2), **many.given).reshape(4000, rows, -1)
    assert_monte_carlo(b, torch.zeros_like(b[0]))
    assert_monte_carlo(b[..., :, None] * b[..., None, :], by_row(case.hessian(), rows))


@every_case
def test_sign_columns_are_unbiased(case: Case) -> None:
    many, rows = case.repeated(2000), case.outputs.shape[0]
    columns = list(case.loss.sign_columns(many.outputs, (1, 2), **many.given))
    assert len(columns) == (case.outputs.shape[1] if isinstance(case.loss, CrossEntropy) else 1)
    got = sum(b[..., :, None] * b[..., None, :] for b in (c.reshape(2000, rows, -1) for c in columns))
    assert_monte_carlo(got, by_row(case.hessian(), rows))


@pytest.mark.parametrize("name", ["ce-positions", "ce-everything", "bce-positive", "mse", "gaussian"])
def test_draws_are_independent_over_keys_and_terms(name: str) -> None:
    """The whole Hessian, cross products of different rows included, from many keys on one batch."""
    case = CASES[name]
    drawn = torch.stack([outer(case.loss.sample(case.outputs, (3, k), **case.given)) for k in range(600)])
    assert_monte_carlo(drawn, case.hessian())
    signed = torch.stack(
        [sum(outer(b) for b in case.loss.sign_columns(case.outputs, (3, k), **case.given)) for k in range(600)]
    )
    assert_monte_carlo(signed, case.hessian())


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("ce", "bce"))])
def test_samples_are_gradients_of_the_likelihood_of_a_draw(name: str) -> None:
    """Discrete losses: an unweighted draw is p - y~ with y~ an admissible label."""
    case = CASES[name]
    discrete = isinstance(case.loss, CrossEntropy)
    p = case.outputs.softmax(1) if discrete else case.outputs.sigmoid()
    label = p - type(case.loss)().sample(case.outputs, (5,))
    assert torch.isclose(label * (1 - label), torch.zeros_like(label), atol=1e-12).all()
    if discrete:
        torch.testing.assert_close(label.sum(1), torch.ones_like(label[:, 0]))
