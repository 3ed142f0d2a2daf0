"""Balancing a pole from scratch: an actor-critic on CartPole-v1 with method "acktr", beside SGD and Adam.

One network has two heads, [logits of two actions | value], and ``fxcurv.losses.CategoricalActorCritic`` is its loss:
the policy gradient of A2C, and the Fisher of policy and critic together for the curvature. Sixteen poles run side by
side; every 32 steps make one batch, with advantages by GAE (Schulman et al. 2016). An episode is over after 500 steps,
so a mean return of 500 is the best there is.

With the settings below, 100 updates or 51,200 steps, the mean return of the last 20 episodes was 500 for each of the
seeds 0, 1 and 2, after 5 seconds on one core. From seed 0 SGD with momentum ended at 144 and Adam at 237, each at the
better of two or three learning rates; Adam needed 150 updates for 488.

    python examples/cartpole_acktr.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import gymnasium as gym
import torch
from torch import Tensor, nn

import fxcurv
from fxcurv.losses import CategoricalActorCritic

ENVS, HORIZON, HIDDEN = 16, 32, 64
GAMMA, LAMBDA = 0.99, 0.95
UNIT = 0.05  # of rewards inside the training: discounted returns of up to 100 steps become values of up to 5
UPDATES = 100
EPISODES = 20  # the last ones, whose mean return is reported
RATES = {"acktr": 0.25, "sgd": 0.1, "adam": 0.01}
OPTIONS: dict[str, dict[str, float]] = {"acktr": {"ema": 0.95, "solve_every": 5, "kl_clip": 0.003}}
"""Hyper-parameters other than the defaults."""


class Batch(NamedTuple):
    """What a rollout leaves: states (n, 4), and the loss's targets (n, 3) of actions, advantages and returns."""

    states: Tensor
    goal: Tensor


def build_model() -> nn.Module:
    """A trunk and two heads; the last layer starts small, so that all actions are equally likely."""
    last = nn.Linear(HIDDEN, 3)
    nn.init.orthogonal_(last.weight, 0.01)
    return nn.Sequential(nn.Linear(4, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), last)


def advantages(rewards: Tensor, values: Tensor, ended: Tensor, failed: Tensor) -> Tensor:
    """Generalised advantage estimates (steps, envs) from values (steps + 1, envs).

    ended: whether an episode was over after the step; failed: whether it was so for good. One that only ran out of time
    is worth the value of its last state.
    """
    found, following = torch.zeros_like(rewards), torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        surprise = rewards[t] + GAMMA * values[t + 1] * ~failed[t] - values[t]
        found[t] = following = surprise + GAMMA * LAMBDA * following * ~ended[t]
    return found


@dataclass
class Poles:
    """The environments, the state they are in and the returns of episodes that are over."""

    seed: int

    def __post_init__(self) -> None:
        self.env = gym.make_vec("CartPole-v1", num_envs=ENVS, vectorization_mode="sync")
        self.state = torch.as_tensor(self.env.reset(seed=self.seed)[0])
        self.over = torch.zeros(ENVS, dtype=torch.bool)
        self.running = torch.zeros(ENVS)
        self.returns: list[float] = []

    @torch.no_grad()
    def rollout(self, net: nn.Module, loss: CategoricalActorCritic) -> Batch:
        """HORIZON steps of the policy in every environment."""
        kept: list[tuple[Tensor, ...]] = []
        for _ in range(HORIZON):
            outputs = net(self.state)
            action = loss.policy(outputs).sample()
            state, reward, failed, late, _ = self.env.step(action.numpy())
            reward, failed = torch.as_tensor(reward, dtype=torch.float32), torch.as_tensor(failed)
            ended = failed | torch.as_tensor(late)
            # After the end of an episode one step only resets the environment: it is played by nobody.
            kept.append((self.state, action, reward, loss.values(outputs), ended, failed, ~self.over))
            self.running = torch.where(self.over, 0.0, self.running + reward)
            self.returns += self.running[ended].tolist()
            self.state, self.over = torch.as_tensor(state), ended
        states, actions, rewards, values, ended, failed, played = map(torch.stack, zip(*kept, strict=True))
        final = loss.values(net(self.state))
        found = advantages(UNIT * rewards, torch.cat([values, final[None]]), ended, failed)
        goals, chosen = (found + values)[played], found[played]
        chosen = (chosen - chosen.mean()) / (chosen.std() + 1e-8)
        return Batch(states[played], loss.targets(actions[played], chosen, goals))

    def score(self) -> float:
        """Mean return of the last episodes."""
        last = self.returns[-EPISODES:]
        return sum(last) / max(len(last), 1)


def train(method: str = "acktr", updates: int = UPDATES, seed: int = 0, lr: float | None = None) -> list[float]:
    """Mean return of the last episodes after every update; the learning rate falls linearly to 0."""
    torch.manual_seed(seed)
    poles, loss = Poles(seed), CategoricalActorCritic()
    example, options = (torch.zeros(4, 4),), OPTIONS.get(method, {})
    model = fxcurv.transform(build_model(), method, example_inputs=example, loss=loss, seed=seed, **options)
    rate = RATES[method] if lr is None else lr
    optimizer = fxcurv.optimizer(model, lr=rate)
    net, scores = model.strip(), []
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - update / updates)
        batch = poles.rollout(net, loss)
        optimizer.zero_grad()
        outputs = model(batch.states)
        model.backward(loss.value(outputs, batch.goal), outputs)
        optimizer.step()
        scores.append(poles.score())
    poles.env.close()
    return scores


def main(updates: int = UPDATES, methods: tuple[str, ...] = tuple(RATES), seed: int = 0) -> dict[str, float]:
    """Mean return of the last episodes by method."""
    final = {}
    for method in methods:
        scores = train(method, updates, seed)
        final[method] = scores[-1]
        shown = "  ".join(f"{scores[updates * (k + 1) // 6 - 1]:5.1f}" for k in range(6))
        print(f"{method:6s} mean return of the last {EPISODES} episodes, by sixths of the run: {shown}")
    return final


if __name__ == "__main__":
    main()
