"""Actor and critic in one network: a policy gradient with its value function, and the Fisher of both heads together.

The outputs of one state are [policy parameters | value], and the heads count as independent given the state (Wu et al.
2017): p(a, v | s) = pi(a | s) N(v; V(s), 1). What these objects call curvature is the Fisher of that distribution, the
curvature of a KL divergence: it is no Hessian of the loss itself, whose advantages may have any sign, and needs no
targets. A draw of it back-propagates -log pi(a~ | s) for an action a~ of the policy together with -log N(v~; V(s), 1).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, Normal

from fxcurv import sampling
from fxcurv.errors import FxcurvError
from fxcurv.losses.base import Loss, expand_mask, weight_tensor, wide
from fxcurv.losses.cross_entropy import CrossEntropy

_LOGITS = CrossEntropy()  # moments, columns and draws of a categorical policy are those of cross-entropy


@dataclass(frozen=True, eq=False)
class _ActorCritic(Loss):
    """Abstract: outputs (..., policy parameters, 1), the value last; a term is one state.

    The scalar is the mean (or sum) over states of

        -advantage log pi(action) - ent_coef entropy(pi) + vf_coef (V - return)^2.

    vf_coef, ent_coef: weights in the scalar. vf_fisher_coef: weight of the critic in the Fisher: 1 is a unit-variance
    Gaussian, 0 leaves the value head without curvature. Masks have the outputs' shape without the last axis.
    """

    vf_coef: float = 0.5
    ent_coef: float = 0.01
    vf_fisher_coef: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vf_coef", "ent_coef", "vf_fisher_coef"):
            if not getattr(self, name) >= 0:
                raise FxcurvError(f"{type(self).__name__}({name}={getattr(self, name)}) must not be negative.")

    @property
    def link(self) -> str:
        return ""

    @property
    def needs_targets(self) -> bool:
        return False

    @abstractmethod
    def policy(self, outputs: Tensor) -> Distribution:
        """The policy of every state, in the wide dtype; ``policy(outputs).sample()`` are actions."""

    @abstractmethod
    def _actions(self, parts: Tensor) -> Tensor:
        """Actions as the policy reads them, from their columns in the targets."""

    def values(self, outputs: Tensor) -> Tensor:
        """V(s), the outputs' shape without the last axis."""
        return outputs[..., -1]

    def targets(self, actions: Tensor, advantages: Tensor, returns: Tensor) -> Tensor:
        """One target tensor [actions | advantage | return] (..., columns) for :meth:`value`; no gradient passes.

        actions: as sampled from the policy; advantages, returns: one number a state. Raises :class:`FxcurvError` where
        their shapes do not fit.
        """
        if advantages.shape != returns.shape or actions.shape[: advantages.dim()] != advantages.shape:
            raise FxcurvError(
                f"{type(self).__name__} needs an advantage and a return for every action; got shapes "
                f"{tuple(actions.shape)}, {tuple(advantages.shape)} and {tuple(returns.shape)}."
            )
        dtype = wide(advantages.dtype)
        columns = actions.detach().to(dtype).reshape(*advantages.shape, -1)
        rest = (part.detach().to(dtype).unsqueeze(-1) for part in (advantages, returns))
        return torch.cat([columns, *rest], -1)

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self._sizes(outputs)
        if targets.shape[:-1] != outputs.shape[:-1]:
            raise FxcurvError(
                f"{type(self).__name__} targets have shape {tuple(targets.shape)} but the outputs have "
                f"{tuple(outputs.shape)}; make them with targets()."
            )
        outputs = outputs.to(wide(outputs.dtype))
        targets = targets.to(outputs.dtype)
        policy, advantage, goal = self.policy(outputs), targets[..., -2], targets[..., -1]
        terms = -advantage * policy.log_prob(self._actions(targets[..., :-2]))
        terms = terms - self.ent_coef * policy.entropy() + self.vf_coef * (self.values(outputs) - goal).square()
        return terms.sum() if self.reduction == "sum" else terms.sum() / self.count(outputs).to(terms.dtype)

    def _count(self, outputs: Tensor, targets: Tensor | None, mask: Tensor | None) -> Tensor:
        self._sizes(outputs)
        return expand_mask(mask, outputs.shape[:-1], outputs).sum()

    def _sizes(self, outputs: Tensor) -> tuple[int, int, int]:
        if outputs.dim() < 2 or outputs.shape[-1] < 2:
            raise FxcurvError(
                f"{type(self).__name__} needs outputs (..., policy parameters and value), got {tuple(outputs.shape)}."
            )
        return outputs.shape[0], math.prod(outputs.shape[1:-1]), outputs.shape[-1]

    def _split(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self._sizes(tensor))

    def _join(self, terms: Tensor, outputs: Tensor) -> Tensor:
        return terms.reshape(outputs.shape).to(outputs.dtype)

    def _weights(self, outputs: Tensor, targets: Tensor | None, mask: Tensor | None) -> Tensor:
        kept = expand_mask(mask, outputs.shape[:-1], outputs)
        return kept.to(wide(outputs.dtype)).reshape(*self._sizes(outputs)[:2], 1)

    def _critic(self, terms: Tensor) -> Tensor:
        """Curvature of the value, (N, P, 1); not a constant: a NaN output must not pass for a good one."""
        return terms[..., -1:] * 0 + self.vf_fisher_coef

    def _draw(self, terms: Tensor, key: Sequence[int], first_row: int) -> Tensor:
        noise = _normal((*key, 1), terms[..., -1:], first_row)
        return torch.cat([self._draw_policy(terms[..., :-1], key, first_row), noise * self._critic(terms).sqrt()], -1)

    @abstractmethod
    def _draw_policy(self, terms: Tensor, key: Sequence[int], first_row: int) -> Tensor:
        """The gradient of -log pi of a sampled action in the policy parameters ``terms``, shaped like them."""


@final
@dataclass(frozen=True, eq=False)
class CategoricalActorCritic(_ActorCritic):
    """A choice between actions: outputs [logits | value].

    loss = CategoricalActorCritic()
    actions = loss.policy(outputs).sample()
    ...
    model.backward(loss.value(outputs, loss.targets(actions, advantages, returns)), outputs)
    """

    def policy(self, outputs: Tensor) -> Categorical:
        return Categorical(logits=outputs[..., :-1].to(wide(outputs.dtype)), validate_args=False)

    def _actions(self, parts: Tensor) -> Tensor:
        return parts.squeeze(-1).long()

    def _moments(self, terms: Tensor) -> Tensor:
        return torch.cat([_LOGITS._moments(terms[..., :-1]), self._critic(terms)], -1)

    def _product(self, moments: Tensor, vector: Tensor) -> Tensor:
        policy = _LOGITS._product(moments[..., :-1], vector[..., :-1])
        return torch.cat([policy, moments[..., -1:] * vector[..., -1:]], -1)

    def _column(self, moments: Tensor, index: int) -> Tensor:
        probabilities, critic = moments[..., :-1], moments[..., -1:]
        if index == probabilities.shape[-1]:
            return torch.cat([probabilities * 0, critic.sqrt()], -1)
        return torch.cat([_LOGITS._column(probabilities, index), critic * 0], -1)

    def _draw_policy(self, terms: Tensor, key: Sequence[int], first_row: int) -> Tensor:
        return _LOGITS._draw(terms, key, first_row)


@final
@dataclass(frozen=True, eq=False)
class GaussianActorCritic(_ActorCritic):
    """Continuous actions of d independent numbers: outputs [means | value], or [means | log std | value].

    std: standard deviation of the actions, a number or one for each of the d; ``None`` reads its logarithm from the
    outputs, where a network may put a parameter that knows no state.
    """

    std: Tensor | float | None = field(default=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        std = weight_tensor("GaussianActorCritic", "std", self.std)
        if std is not None and not bool((std > 0).all()):
            raise FxcurvError("GaussianActorCritic(std=...) must be positive; a policy without noise has no density.")
        object.__setattr__(self, "std", std)

    def policy(self, outputs: Tensor) -> Independent:
        means, log_std = self._parameters(outputs.to(wide(outputs.dtype))[..., :-1])
        return Independent(Normal(means, log_std.exp(), validate_args=False), 1, validate_args=False)

    def _parameters(self, terms: Tensor) -> tuple[Tensor, Tensor]:
        """(means, log std), each (..., d)."""
        if self.std is None:
            if terms.shape[-1] % 2:
                raise FxcurvError(
                    "GaussianActorCritic(std=None) needs outputs [means | log std | value], an odd number of them; got "
                    f"{terms.shape[-1] + 1}."
                )
            means, log_std = terms.chunk(2, -1)
            return means, log_std
        assert isinstance(self.std, Tensor)
        if self.std.dim() and self.std.shape != terms.shape[-1:]:
            raise FxcurvError(
                f"GaussianActorCritic(std=...) has {self.std.numel()} numbers for {terms.shape[-1]} actions."
            )
        return terms, self.std.to(terms.device, terms.dtype).log().expand(terms.shape)

    def _actions(self, parts: Tensor) -> Tensor:
        return parts

    def _moments(self, terms: Tensor) -> Tensor:
        means, log_std = self._parameters(terms[..., :-1])
        parts = [means * 0 + (-2 * log_std).exp(), self._critic(terms)]
        if self.std is None:
            parts.insert(1, log_std * 0 + 2)
        return torch.cat(parts, -1)

    def _product(self, moments: Tensor, vector: Tensor) -> Tensor:
        return moments * vector

    def _column(self, moments: Tensor, index: int) -> Tensor:
        column = torch.zeros_like(moments)
        column[..., index] = moments[..., index].sqrt()
        return column

    def _draw_policy(self, terms: Tensor, key: Sequence[int], first_row: int) -> Tensor:
        means, log_std = self._parameters(terms)
        noise = _normal(key, means, first_row)
        scores = [means * 0 - noise / log_std.exp()]
        if self.std is None:
            scores.append(log_std * 0 + 1 - noise.square())
        return torch.cat(scores, -1)


def _normal(key: Sequence[int], like: Tensor, first_row: int) -> Tensor:
    """Standard normal numbers, (N, P, d) as ``like``."""
    rows, places, features = like.shape
    noise = sampling.normal(key, rows, places * features, first_row=first_row, device=like.device, dtype=like.dtype)
    return noise.reshape(like.shape)
