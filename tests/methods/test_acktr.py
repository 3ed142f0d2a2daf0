"""ACKTR: the trust region of the operator that is inverted, and the closed form for a linear Gaussian policy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcurv
from fxcurv.losses import CategoricalActorCritic, GaussianActorCritic
from tests.methods.nets import mlp
from tests.methods.oracle import Step, step

pytestmark = pytest.mark.usefixtures("float64")


def taken(net: nn.Module, loss: Any, x: Tensor, **options: Any) -> Step:
    """A step on made-up actions, advantages and returns."""
    torch.manual_seed(2)
    outputs = net(x).detach()
    goal = loss.targets(loss.policy(outputs).sample(), torch.randn(len(x)), torch.randn(len(x)))
    options = {"loss": loss, "cold_steps": 0, "kl_clip": 1e-3, **options}
    return step(net, "acktr", x, lambda f: loss.value(f, goal), **options)


@pytest.mark.parametrize("lr", [1e-3, 0.25])
@pytest.mark.parametrize("rescale", ["trust", "kl"])
@pytest.mark.parametrize("fisher", ["mc", "ggn"])
def test_a_step_stays_in_its_trust_region(lr: float, rescale: str, fisher: str) -> None:
    """Check (1): with F the damped operator over all layers, lr^2 u^T F u <= 2 kl_clip; equal where it was clipped."""
    net, x = mlp(3, 5, 4), torch.randn(7, 3)
    options = {"fisher": fisher, "damping": 0.03, "lr": lr}
    plain = taken(net, CategoricalActorCritic(), x, rescale="none", **options)
    result = taken(net, CategoricalActorCritic(), x, rescale=rescale, **options)
    lengths, free = torch.zeros(()), torch.zeros(())
    for name in ("0", "2"):
        f = result.model.block(name)
        f = f + 0.03 * torch.eye(len(f))
        for step_, total in ((result, lengths), (plain, free)):
            u = step_.pair(name)[1].flatten()
            total += lr**2 * (u @ f @ u)
    bound = 1e-3 * (2 if rescale == "trust" else 1)
    assert (free > bound) == (lr > 0.1)
    torch.testing.assert_close(lengths, free.clamp(max=bound))


@pytest.mark.parametrize("lr", [0.5, 1e-3])
def test_a_linear_gaussian_policy_takes_its_natural_step(lr: float) -> None:
    """Check (2): F = kron(diag(1 / std^2, 1), E[a a^T]) for every state, so the step and its divergence are exact."""
    std, x = torch.tensor([0.5, 2.0]), torch.randn(9, 3)
    net = nn.Sequential(nn.Linear(3, 3))
    before = net(x).detach()
    result = taken(net, GaussianActorCritic(std=std), x, fisher="ggn", damping=1e-12, lr=lr)
    gradient, direction = (part.squeeze(0) for part in result.pair("0"))
    a = torch.cat([x, torch.ones(9, 1)], 1)
    metric = torch.diag(torch.cat([1 / std.square(), torch.ones(1)]))
    natural = torch.linalg.inv(metric) @ gradient @ torch.linalg.inv(a.T @ a / 9)
    eta = min(lr, float((2e-3 / (natural * gradient).sum()).sqrt()))
    assert (eta < lr) == (lr > 0.1)
    torch.testing.assert_close(lr * direction, eta * natural, rtol=1e-6, atol=1e-9)
    after = before - a @ (lr * direction).T
    divergence = ((after - before).square() @ metric.diagonal()).mean() / 2
    torch.testing.assert_close(divergence, torch.tensor(eta**2 / 2) * (natural * gradient).sum())
    assert lr < 0.1 or float(divergence) == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.parametrize(("fisher", "copies", "tolerance"), [("ggn", 1, 1e-12), ("mc", 3000, 0.05)])
def test_the_value_head_has_unit_curvature(fisher: str, copies: int, tolerance: float) -> None:
    """Check (3), in the last layer; the heads do not meet there."""
    net, x = mlp(3, 4, 3), torch.randn(3, 3).repeat(copies, 1)
    options = {"fisher": fisher}
    g = taken(net, CategoricalActorCritic(), x, **options).factors("2")["G"]
    assert float(g[-1, -1]) == pytest.approx(1.0, abs=tolerance)
    assert g[-1, :-1].abs().max() <= tolerance
    p = net(x).detach()[:, :-1].softmax(1)
    policy = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)).mean(0)
    torch.testing.assert_close(g[:-1, :-1], policy, atol=tolerance, rtol=0)
    four = taken(net, CategoricalActorCritic(vf_fisher_coef=4.0), x, **options).factors("2")["G"]
    assert float(four[-1, -1]) == pytest.approx(4.0, abs=4 * tolerance)


def test_the_start_is_the_clipped_gradient() -> None:
    net, loss, x = mlp(3, 5, 4), CategoricalActorCritic(), torch.randn(7, 3)
    goal = loss.targets(loss.policy(net(x)).sample(), 9 * torch.randn(7), torch.randn(7))
    model = fxcurv.transform(net, "acktr", example_inputs=(x,), loss=loss, cold_steps=2, cold_clip=0.5, kl_clip=1e9)
    for k in range(4):
        model.zero_grad()
        outputs = model(x)
        model.backward(loss.value(outputs, goal), outputs)
        gradient = [p.grad.clone() for p in model.parameters()]
        norm = torch.stack([g.norm() for g in gradient]).norm()
        assert norm > 0.5
        model.precondition_()
        cold = all(torch.allclose(p.grad, g * (0.5 / norm)) for p, g in zip(model.parameters(), gradient, strict=True))
        assert cold == (k < 2)
    assert float(model._engine.states.read("0.updates")) == 4


def test_it_is_kfac_with_another_clip() -> None:
    net, x = mlp(3, 5, 4), torch.randn(7, 3)
    loss = CategoricalActorCritic()
    mine = taken(net, loss, x, rescale="none")
    goal = loss.targets(*(torch.zeros(7) for _ in range(3)))
    kfac = step(net, "kfac", x, lambda f: loss.value(f, goal), loss=loss, damping_scheme="eigenvalue")
    for part in ("A", "G"):
        torch.testing.assert_close(mine.factors("0")[part], kfac.factors("0")[part])


def test_the_reference_code_is_reached_by_its_numbers() -> None:
    """Bounded by lr but stepping with lr (1 - m): the docstring's translation gives the same first step."""
    net, x, lr, m = mlp(3, 5, 4), torch.randn(7, 3), 0.25, 0.9
    loss = CategoricalActorCritic(vf_fisher_coef=4.0)
    plain = taken(net, loss, x, rescale="none", damping=0.01)
    dot = sum((plain.direction[n] * plain.gradient[n]).sum() for n in plain.gradient)
    nu = (1e-3 / (lr**2 * dot)).sqrt()
    assert nu < 1
    ours = taken(net, loss, x, rescale="kl", damping=0.01, lr=lr * (1 - m), momentum=m, kl_clip=1e-3 * (1 - m) ** 2)
    for name, direction in plain.direction.items():
        torch.testing.assert_close(lr * (1 - m) * ours.direction[name], lr * (1 - m) * nu * direction)
