"""Losses of actor and critic: the value by hand, the curvature against the Hessian of the divergence of both heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fxcurv.errors import FxcurvError
from fxcurv.losses import CategoricalActorCritic, CrossEntropy, GaussianActorCritic, Loss

F64 = torch.float64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def categorical_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of logits, by its definition."""
    a, b = (x - x.logsumexp(-1, keepdim=True) for x in (p, q))
    return (a.exp() * (a - b)).sum(-1)


def gaussian_kl(std: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
    """KL of diagonal Gaussians, by its definition; with ``None`` the log deviations follow the means."""

    def kl(p: Tensor, q: Tensor) -> Tensor:
        if std is not None:
            return ((p - q).square() / (2 * std**2)).sum(-1)
        (m, s), (n, t) = (x.chunk(2, -1) for x in (p, q))
        return (t - s + ((2 * s).exp() + (m - n).square()) / (2 * (2 * t).exp()) - 0.5).sum(-1)

    return kl


DEVIATIONS = torch.tensor([0.5, 1.0, 2.0], dtype=F64)
CASES: dict[str, tuple[Loss, tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "categorical": (CategoricalActorCritic(), (4, 4), categorical_kl),
    "categorical over time": (CategoricalActorCritic(vf_fisher_coef=0.3), (2, 3, 3), categorical_kl),
    "gaussian": (GaussianActorCritic(std=0.5), (4, 3), gaussian_kl(torch.tensor(0.5, dtype=F64))),
    "gaussian, deviations": (GaussianActorCritic(std=DEVIATIONS, vf_fisher_coef=4.0), (3, 4), gaussian_kl(DEVIATIONS)),
    "gaussian, learned": (GaussianActorCritic(std=None), (3, 5), gaussian_kl(None)),
    "without critic": (CategoricalActorCritic(vf_fisher_coef=0.0), (3, 4), categorical_kl),
}


def divergence_hessian(case: str) -> tuple[Loss, Tensor, Tensor]:
    """(loss, outputs, Hessian of the divergence of both heads from the outputs, summed over states)."""
    loss, shape, kl = CASES[case]
    f = randn(*shape)

    def divergence(g: Tensor) -> Tensor:
        critic = (g[..., -1] - f[..., -1]).square().sum() / 2
        return kl(f[..., :-1], g[..., :-1]).sum() + loss.vf_fisher_coef * critic  # type: ignore[attr-defined]

    return loss, f, torch.autograd.functional.hessian(divergence, f).reshape(f.numel(), f.numel())


def of_terms(loss: Loss, f: Tensor, tensors: list[Tensor]) -> Tensor:
    """Sum of outer products without what couples different states."""
    size = f.shape[-1]
    same = torch.kron(torch.eye(f.numel() // size, dtype=F64), torch.ones(size, size, dtype=F64))
    return sum(torch.outer(b.reshape(-1), b.reshape(-1)) for b in tensors) * same


@pytest.mark.parametrize("case", CASES)
def test_curvature_is_that_of_the_joint_divergence(case: str) -> None:
    loss, f, hessian = divergence_hessian(case)
    assert loss.column_count(f) == f[0].numel() and loss.count(f) == f[..., 0].numel()
    torch.testing.assert_close(of_terms(loss, f, list(loss.columns(f))), hessian)
    signed = of_terms(loss, f, list(loss.sign_columns(f, (1,))))
    torch.testing.assert_close(signed, hessian)
    u = randn(*f.shape, seed=1)
    torch.testing.assert_close(loss.hessian_product(f, u).reshape(-1), hessian @ u.reshape(-1))


@pytest.mark.parametrize("case", CASES)
def test_draws_have_the_curvature_for_their_second_moment(case: str) -> None:
    loss, f, hessian = divergence_hessian(case)
    copies = f.repeat(6000, *[1] * (f.dim() - 1))
    drawn = loss.sample(copies, (3,))
    draws = drawn.reshape(6000, -1)
    assert (draws.T @ draws / len(draws) - hessian).norm() < 0.08 * hessian.norm()
    assert draws.mean(0).norm() < 0.05 * hessian.diagonal().sum().sqrt()
    assert torch.equal(loss.sample(f, (3,)), drawn[: len(f)])
    assert torch.equal(loss.sample(f, (3,), first_row=len(f)), drawn[len(f) : 2 * len(f)])


def test_a_draw_of_the_policy_is_one_of_cross_entropy_and_the_critic_has_its_own() -> None:
    loss, f = CategoricalActorCritic(), randn(5, 4)
    draw = loss.sample(f, (7, 1))
    torch.testing.assert_close(draw[:, :-1], CrossEntropy().sample(f[:, :-1], (7, 1)))
    assert draw[:, -1].unique().numel() == 5


def by_hand(case: str, f: Tensor, actions: Tensor, advantages: Tensor, returns: Tensor, loss: Any) -> Tensor:
    policy, value = f[..., :-1], f[..., -1]
    if case.startswith("gaussian"):
        means, log_std = policy.chunk(2, -1) if loss.std is None else (policy, loss.std.log().expand(policy.shape))
        z = (actions - means) / log_std.exp()
        chosen = (-z.square() / 2 - log_std - math.log(2 * math.pi) / 2).sum(-1)
        entropy = (log_std + (1 + math.log(2 * math.pi)) / 2).sum(-1)
    else:
        p = policy.softmax(-1)
        chosen = p.gather(-1, actions.unsqueeze(-1)).squeeze(-1).log()
        entropy = -(p * p.log()).sum(-1)
    terms = -advantages * chosen - loss.ent_coef * entropy + loss.vf_coef * (value - returns) ** 2
    return terms.sum()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_value(case: str, reduction: str) -> None:
    known, shape, _ = CASES[case]
    std = {"std": known.std} if isinstance(known, GaussianActorCritic) else {}
    loss: Any = type(known)(reduction=reduction, vf_coef=0.7, ent_coef=0.2, **std)
    f = randn(*shape).requires_grad_()
    torch.manual_seed(0)
    actions = loss.policy(f).sample()
    advantages, returns = randn(*shape[:-1], seed=2), randn(*shape[:-1], seed=3)
    value = loss.value(f, loss.targets(actions, advantages, returns))
    expected = by_hand(case, f, actions, advantages, returns, loss)
    expected = expected / advantages.numel() if reduction == "mean" else expected
    torch.testing.assert_close(value, expected)
    (mine,), (theirs,) = (torch.autograd.grad(v, f, retain_graph=True) for v in (value, expected))
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(loss.values(f), f[..., -1])


def test_a_mask_takes_states_out() -> None:
    loss, f = CategoricalActorCritic(), randn(4, 3)
    mask = torch.tensor([True, False, True, True])
    assert loss.count(f, mask=mask) == 3
    f[1] = float("nan")
    draw = loss.sample(f, (0,), mask=mask)
    assert torch.isfinite(draw).all() and (draw[1] == 0).all() and (draw[0] != 0).all()
    assert torch.isnan(loss.sample(f, (0,))[1]).any()


def test_half_precision_is_widened() -> None:
    loss, f = GaussianActorCritic(), randn(4, 3).half()
    goal = loss.targets(loss.policy(f).sample(), randn(4).half(), randn(4).half())
    assert goal.dtype == torch.float32 and loss.value(f, goal).dtype == torch.float32
    assert loss.hessian_product(f, f).dtype == torch.float16


def test_equal_settings_are_equal_losses() -> None:
    assert CategoricalActorCritic() == CategoricalActorCritic() != CategoricalActorCritic(vf_fisher_coef=2.0)
    assert GaussianActorCritic(std=DEVIATIONS) == GaussianActorCritic(std=DEVIATIONS.clone()) != GaussianActorCritic()
    assert not CategoricalActorCritic().needs_targets and CategoricalActorCritic().link == ""


def test_wrong_calls() -> None:
    loss, f = CategoricalActorCritic(), randn(4, 3)
    with pytest.raises(FxcurvError, match="vf_coef=-1"):
        CategoricalActorCritic(vf_coef=-1.0)
    with pytest.raises(FxcurvError, match="a policy without noise"):
        GaussianActorCritic(std=0.0)
    with pytest.raises(FxcurvError, match="has 3 numbers for 2 actions"):
        GaussianActorCritic(std=DEVIATIONS).sample(f, (0,))
    with pytest.raises(FxcurvError, match="an odd number of them; got 4"):
        GaussianActorCritic(std=None).sample(randn(2, 4), (0,))
    with pytest.raises(FxcurvError, match="an advantage and a return for every action"):
        loss.targets(torch.zeros(4), randn(3), randn(3))
    with pytest.raises(FxcurvError, match="make them with targets"):
        loss.value(f, loss.targets(torch.zeros(3), randn(3), randn(3)))
    with pytest.raises(FxcurvError, match="policy parameters and value"):
        loss.count(randn(4))
