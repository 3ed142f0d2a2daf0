"""The actor-critic example: its estimates by hand, a short run, and (slow) that it learns."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("gymnasium")
EXAMPLE = Path(__file__).parents[2] / "examples" / "cartpole_acktr.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cartpole_acktr", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_advantages_are_discounted_sums_of_surprises(example: ModuleType) -> None:
    """One episode that runs on, one that fails after two steps, one that runs out of time there."""
    rewards, values = torch.rand(4, 3), torch.rand(5, 3)
    ended, failed = torch.zeros(4, 3, dtype=torch.bool), torch.zeros(4, 3, dtype=torch.bool)
    ended[1, 1:] = True
    failed[1, 1] = True
    found = example.advantages(rewards, values, ended, failed)
    g, w = example.GAMMA, example.GAMMA * example.LAMBDA
    delta = rewards + g * values[1:] - values[:-1]
    torch.testing.assert_close(found[0, 0], sum(w**k * delta[k, 0] for k in range(4)))
    torch.testing.assert_close(found[0, 1], delta[0, 1] + w * (rewards[1, 1] - values[1, 1]))
    torch.testing.assert_close(found[0, 2], delta[0, 2] + w * delta[1, 2])


def test_a_rollout_leaves_out_the_steps_that_only_reset(example: ModuleType) -> None:
    torch.manual_seed(0)
    poles, loss = example.Poles(0), example.CategoricalActorCritic()
    batch = poles.rollout(example.build_model(), loss)
    played = example.ENVS * example.HORIZON
    resets = len(poles.returns) - int(poles.over.sum())
    assert resets > 0 and len(batch.states) == len(batch.goal) == played - resets
    assert sum(poles.returns) + float(poles.running[~poles.over].sum()) == played - resets


@pytest.mark.parametrize("method", ["acktr", "sgd", "adam"])
def test_a_short_run_is_decided_by_its_seed(example: ModuleType, method: str) -> None:
    first, again, other = (example.train(method, updates=3, seed=seed) for seed in (0, 0, 1))
    assert first == again != other and len(first) == 3


def test_main_reports_every_method(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    final = example.main(updates=6, methods=("acktr", "adam"))
    assert set(final) == {"acktr", "adam"} and all(score > 5 for score in final.values())
    assert capsys.readouterr().out.count("mean return") == 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_acktr_learns_to_balance(example: ModuleType, seed: int) -> None:
    assert example.train("acktr", seed=seed)[-1] > 400
