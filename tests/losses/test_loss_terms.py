"""Masks, ignored terms, layouts, dtypes and bad numbers; names, modules and error sentences."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcurv import sampling
from fxcurv.errors import FxcurvError
from fxcurv.losses import BCE, MSE, CrossEntropy, Gaussian, Loss, resolve_loss

F64 = torch.float64
LOSSES = [CrossEntropy(), BCE(), MSE(), Gaussian()]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def factors(loss: Loss, f: Tensor, **given: Tensor | None) -> list[Tensor]:
    """Everything a loss can say about its Hessian."""
    return [
        loss.sample(f, (1,), **given),
        *loss.columns(f, **given),
        *loss.sign_columns(f, (1,), **given),
        loss.hessian_product(f, torch.ones_like(f), **given),
    ]


# Masks and ignored terms.
def test_a_mask_drops_the_terms_that_targets_would() -> None:
    f, y = randn(5, 3, 2), torch.tensor([[0, -100], [1, 2], [-100, -100], [2, 2], [0, 1]])
    loss = CrossEntropy(ignore_index=-100)
    assert loss.count(f, y) == loss.count(f, mask=y != -100) == 7
    for by_target, by_mask in zip(factors(loss, f, targets=y), factors(loss, f, mask=y != -100), strict=True):
        assert torch.equal(by_target, by_mask)
        assert (by_target.movedim(1, -1)[y == -100] == 0).all()
    both = torch.ones(5, 2, dtype=torch.bool)
    both[0] = False
    assert loss.count(f, y, both) == 6


@every_loss
def test_masked_terms_give_zeros_even_if_not_finite(loss: Loss) -> None:
    f = randn(4, 3)
    f[1], f[2] = float("nan"), float("inf")
    keep = torch.tensor([True, False, False, True])
    mask = keep if isinstance(loss, (CrossEntropy, Gaussian)) else keep[:, None]
    for b in factors(loss, f, mask=mask):
        assert b.isfinite().all() and (b[1:3] == 0).all()


@every_loss
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_outputs_never_raise_and_stay_in_their_row(loss: Loss, bad: float) -> None:
    f = randn(4, 3)
    good = factors(loss, f)
    f[1, 0], f[2] = bad, bad
    for b, clean in zip(factors(loss, f), good, strict=True):
        assert torch.equal(b[[0, 3]], clean[[0, 3]])


@every_loss
def test_nan_is_not_hidden(loss: Loss) -> None:
    f = torch.full((2, 3), float("nan"), dtype=F64)
    assert loss.sample(f, (1,)).isnan().all() and next(loss.sign_columns(f, (1,))).isnan().all()


def test_impossible_classes_are_never_drawn() -> None:
    f = torch.zeros(20_000, 4)
    f[:, 0], f[:, 3] = -float("inf"), -float("inf")
    label = f.softmax(1) - CrossEntropy().sample(f, (4,))
    assert (label[:, [0, 3]] == 0).all() and 0.45 < label[:, 1].mean() < 0.55


def test_the_highest_draw_selects_a_possible_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded probabilities may add up to less than the draw; the impossible last class must not take the rest."""
    monkeypatch.setattr(sampling, "uniform", lambda *args, **kwargs: torch.full((50, 1), 1 - 2.0**-24))
    f = randn(50, 1000).float()
    f[:, -1] = -float("inf")
    assert (CrossEntropy().sample(f, (0,))[:, -1] == 0).all()


@pytest.mark.parametrize(
    ("loss", "mask", "count"),
    [
        (MSE(), torch.tensor([True, False, True]), 8),
        (MSE("sum"), torch.tensor([[True], [False], [True], [True]]), 9),
        (MSE("batchmean"), torch.tensor([True, False, True]), 4),
        (BCE(), None, 12),
        (Gaussian(), None, 4),
        (Gaussian(), torch.tensor([True, False, True, True]), 3),
        (Gaussian(), torch.tensor([[True, True, False]]), 4),
        (Gaussian(), torch.tensor([[True], [False], [False], [True]]), 2),
        (CrossEntropy(), torch.tensor([True, False, True, True]), 3),
    ],
)
def test_count_under_a_mask(loss: Loss, mask: Tensor | None, count: int) -> None:
    assert loss.count(randn(4, 3), mask=mask) == count


def test_a_gaussian_batch_of_numbers_is_rows() -> None:
    f, y = randn(5), randn(5, seed=1)
    assert Gaussian().count(f) == 5
    torch.testing.assert_close(Gaussian().value(f, y), F.mse_loss(f, y) / 2)


# Layouts.
@pytest.mark.parametrize("signed", [False, True])
def test_flattened_tokens_need_the_number_of_examples(signed: bool) -> None:
    """logits.view(B*T, V) with examples=B gives the columns of (B, V, T), position by position."""
    batch, time, classes = 2, 3, 4
    f, y = randn(batch, time, classes), torch.tensor([[0, 1, -100], [3, 2, 1]])
    loss = CrossEntropy()
    flat = list(loss.columns(f.view(-1, classes), y.flatten(), examples=batch))
    unflat = list(loss.columns(f.movedim(-1, 1), y))
    assert len(flat) == loss.column_count(f.view(-1, classes), examples=batch) == time * classes
    assert loss.column_count(f.view(-1, classes)) == classes
    for a, b in zip(flat, unflat, strict=True):
        torch.testing.assert_close(a.view(batch, time, classes), b.movedim(1, -1))
        assert ((a.view(batch, time, classes) != 0).any(-1).sum(-1) <= 1).all()


def test_flattened_elementwise_rows() -> None:
    f = randn(6, 2)
    columns = list(BCE().columns(f, examples=3))
    assert len(columns) == BCE().column_count(f, examples=3) == 4
    assert all((b.view(3, 4) != 0).sum(1).eq(1).all() for b in columns)
    torch.testing.assert_close(sum(b.square() for b in columns), f.sigmoid() * (1 - f.sigmoid()))


@every_loss
def test_draws_do_not_depend_on_how_rows_are_split(loss: Loss) -> None:
    f = randn(7, 3, 2)
    whole = loss.sample(f, (1, 2)), *loss.sign_columns(f, (1, 2))
    parts = [
        (loss.sample(f[s], (1, 2), first_row=s.start), *loss.sign_columns(f[s], (1, 2), first_row=s.start))
        for s in (slice(0, 3), slice(3, 7))
    ]
    for a, b in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(a, torch.cat(b), rtol=1e-14, atol=1e-14)  # sigmoid rounds by place in memory
    assert not torch.equal(whole[0], loss.sample(f, (1, 3)))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_dtype_and_layout_of_results(loss: Loss, dtype: torch.dtype) -> None:
    f = randn(3, 4, 2, 2).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    tolerance = 4 * torch.finfo(dtype).eps + (0 if dtype == F64 else 1e-5)  # a normal draw's tail is steep in float32
    for b, exact in zip(factors(loss, f), factors(loss, f.detach().double()), strict=True):
        assert b.dtype == dtype and b.shape == f.shape and not b.requires_grad
        torch.testing.assert_close(b.double(), exact, atol=tolerance, rtol=tolerance)
    targets = torch.zeros(3, 2, 2, dtype=torch.long) if isinstance(loss, CrossEntropy) else f.detach()
    value = loss.value(f, targets)
    assert value.requires_grad and value.dtype == torch.promote_types(dtype, torch.float32)


@every_loss
def test_empty_batch(loss: Loss) -> None:
    f = torch.zeros(0, 3)
    assert loss.count(f) == 0 and all(b.shape == (0, 3) for b in factors(loss, f))


def test_saturated_logits_keep_their_curvature() -> None:
    f = torch.tensor([[40.0], [-40.0]], dtype=F64)
    exact = torch.full_like(f, 40.0).neg().exp()
    torch.testing.assert_close(BCE().hessian_product(f, torch.ones_like(f)), exact, rtol=1e-10, atol=0)


# What users write.
@pytest.mark.parametrize(
    ("given", "loss"),
    [
        (None, None),
        ("cross_entropy", CrossEntropy()),
        ("bce", BCE()),
        ("mse", MSE()),
        ("gaussian", Gaussian()),
        (MSE("sum"), MSE("sum")),
        (nn.CrossEntropyLoss(), CrossEntropy()),
        (nn.CrossEntropyLoss(ignore_index=0, reduction="sum"), CrossEntropy("sum", ignore_index=0)),
        (nn.CrossEntropyLoss(torch.ones(3), label_smoothing=0.1), CrossEntropy(label_smoothing=0.1, weight=[1, 1, 1])),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(2)), BCE(pos_weight=torch.ones(2))),
        (nn.BCEWithLogitsLoss(torch.ones(2), reduction="sum"), BCE("sum", weight=torch.ones(2))),
        (nn.MSELoss(reduction="sum"), MSE("sum")),
    ],
)
def test_resolve(given: object, loss: Loss | None) -> None:
    resolved = resolve_loss(given)
    assert resolved == loss
    assert loss is None or hash(resolved) == hash(loss)


def test_losses_compare_by_value_and_copy() -> None:
    a, b = CrossEntropy(weight=torch.tensor([1.0, 2.0])), CrossEntropy(weight=torch.tensor([1.0, 3.0]))
    assert a != b and a != CrossEntropy() and MSE() != Gaussian() and MSE() != "mse"
    assert copy.deepcopy(a) == a == pickle.loads(pickle.dumps(a))
    weight = torch.ones(2)
    loss = CrossEntropy(weight=weight)
    weight.zero_()
    assert loss == CrossEntropy(weight=torch.ones(2))


@pytest.mark.parametrize(
    ("loss", "needs"),
    [
        (CrossEntropy(), False),
        (CrossEntropy(label_smoothing=0.1), False),
        (CrossEntropy(ignore_index=-100), True),
        (CrossEntropy(weight=torch.ones(3)), True),
        (BCE(), False),
        (BCE(weight=torch.ones(3)), False),
        (BCE(pos_weight=torch.ones(3)), True),
        (MSE(), False),
        (Gaussian(), False),
    ],
)
def test_needs_targets(loss: Loss, needs: bool) -> None:
    assert loss.needs_targets is needs
    f = randn(2, 3)
    calls = [
        lambda: loss.count(f),
        lambda: loss.sample(f, (1,)),
        lambda: loss.columns(f),
        lambda: loss.sign_columns(f, (1,)),
        lambda: loss.hessian_product(f, f),
    ]
    for call in calls:
        if needs:
            with pytest.raises(FxcurvError, match=r"pass targets= (or mask= )?to model\.backward"):
                call()
        else:
            call()


class _Mine(nn.CrossEntropyLoss):
    pass


F23, Y2 = randn(2, 3), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: resolve_loss("crossentropy"), "did you mean 'cross_entropy'"),
        (lambda: resolve_loss("zzz"), "names are cross_entropy, bce, mse, gaussian"),
        (lambda: resolve_loss(nn.BCELoss()), "BCEWithLogitsLoss"),
        (lambda: resolve_loss(nn.NLLLoss()), "use nn.CrossEntropyLoss"),
        (lambda: resolve_loss(nn.L1Loss()), "without known curvature"),
        (lambda: resolve_loss(_Mine()), "_Mine"),
        (lambda: resolve_loss(nn.MSELoss(reduction="none")), "reduction='none'"),
        (lambda: resolve_loss(F.mse_loss), "is a function"),
        (lambda: MSE("none"), "use one of mean, sum, batchmean"),
        (lambda: CrossEntropy(label_smoothing=1.5), "between 0 and 1"),
        (lambda: CrossEntropy(weight=[1.0, -1.0]), "negative"),
        (lambda: BCE(pos_weight=torch.tensor([float("nan")])), "NaN"),
        (lambda: CrossEntropy().count(torch.zeros(3)), "add a batch dimension"),
        (lambda: CrossEntropy(weight=[1.0, 1.0]).count(F23, Y2), "one weight per class"),
        (lambda: CrossEntropy().value(F23, torch.zeros(3, dtype=torch.long)), r"class targets have shape \(3,\)"),
        (lambda: CrossEntropy().sample(F23, (1,), torch.rand(2)), "probability targets"),
        (lambda: CrossEntropy(ignore_index=0).value(F23, F23.softmax(1)), "pass mask="),
        (lambda: CrossEntropy().columns(F23, examples=4), "examples=4"),
        (lambda: CrossEntropy().columns(F23, examples=0), "examples=0"),
        (lambda: MSE().value(F23, F23[:, :1]), "reshape one of them"),
        (lambda: BCE(weight=torch.ones(5)).sample(F23, (1,)), "does not broadcast"),
        (lambda: BCE(pos_weight=torch.ones(3)).sample(F23, (1,), Y2), "targets have shape"),
        (lambda: MSE().sample(F23, (1,), mask=torch.ones(2, 2, dtype=torch.bool)), "does not broadcast"),
        (lambda: CrossEntropy().sample(F23, (1,), mask=torch.ones(2)), "boolean"),
        (lambda: MSE().hessian_product(F23, F23[:1]), "u has shape"),
    ],
)
def test_error_sentences(call: object, sentence: str) -> None:
    with pytest.raises(FxcurvError, match=sentence) as caught:
        call()
    text = str(caught.value)
    assert text[-1] in ".?" and "\n" not in text
