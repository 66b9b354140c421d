"""The objectives of a weight update: what each learns from a group of rewards, and the loss of a token.

Pure functions of tensors, shapes in the names: G episodes of one problem, T tokens. Which objective fits the evidence
is decided in `agents.levers`; here an objective says which episodes carry signal (`weigh`) and what their tokens cost
(`loss`). Adding one is such a pair of functions and a row in `IMPLEMENTED`.

Sources: GRPO from DeepSeekMath (arXiv 2402.03300), its clip from PPO (arXiv 1707.06347); best-of-N cloning as in
arXiv 2605.27276, section 7.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from agents.archive import Objective
from agents.decision import TrainSettings


class NothingToLearn(Exception):
    """Raised when a batch holds no signal for its objective: a step on it would be noise. Weights stay as they are."""


def grpo_advantages(rewards_G: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """`(r - mean) / (std + eps)` within one group, with the population's standard deviation.

    Exactly zero where all rewards are equal. [0, 0, 0, 1] gives -0.577350 three times and 1.732051 (for eps 0). TRL
    divides by the sample's standard deviation instead, which makes groups of different size weigh differently.
    """
    deviations_G = rewards_G - rewards_G.mean()
    std = rewards_G.std(correction=0)
    if bool((rewards_G == rewards_G[0]).all()):
        return torch.zeros_like(rewards_G)
    return deviations_G / (std + eps)


def clipped_policy_loss(
    logp_T: torch.Tensor, old_logp_T: torch.Tensor, advantage_T: torch.Tensor, clip: float
) -> torch.Tensor:
    """PPO's pessimistic surrogate for each token, `-min(ratio A, clip(ratio, 1 - clip, 1 + clip) A)`.

    Args:
        logp_T: log-probabilities under the weights being trained (nats), with gradient.
        old_logp_T: those recorded when the tokens were sampled.
        advantage_T: of each token, or a scalar tensor for all.
    """
    ratio_T = torch.exp(logp_T - old_logp_T)
    clipped_T = ratio_T.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T)


def best_of_n(rewards_G: torch.Tensor, top_k: int = 1, floor: float = 0.0) -> list[int]:
    """Indices of the episodes to clone: the `top_k` best of a group, those strictly above `floor` only.

    Ties go to the earlier sample, so the choice depends on the rewards and nothing else.
    """
    order = sorted(range(len(rewards_G)), key=lambda index: (-float(rewards_G[index]), index))
    return [index for index in order[:top_k] if float(rewards_G[index]) > floor]


def cloning_loss(logp_T: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each cloned token (nats)."""
    return -logp_T


Weigh = Callable[[Sequence[float], TrainSettings], Sequence[float]]
"""Rewards of one group -> weight of each episode (an advantage, or 1 for cloned ones). 0 leaves the episode out."""
TokenLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, TrainSettings], torch.Tensor]
"""(logp_T, old_logp_T, weight_T, settings) -> loss_T."""


@dataclass(frozen=True)
class Implementation:
    """An objective in code. `over_kept`: the loss is the mean over episodes of weight other than 0, not over all.

    GRPO averages over all, so that a batch with little signal moves the weights little; for cloning the episodes that
    are not cloned are no part of the data.
    """

    weigh: Weigh
    loss: TokenLoss
    over_kept: bool


def _weigh_grpo(rewards: Sequence[float], settings: TrainSettings) -> Sequence[float]:
    return [float(a) for a in grpo_advantages(torch.tensor(rewards, dtype=torch.float64))]


def _loss_grpo(
    logp_T: torch.Tensor, old_logp_T: torch.Tensor, weight_T: torch.Tensor, settings: TrainSettings
) -> torch.Tensor:
    return clipped_policy_loss(logp_T, old_logp_T, weight_T, settings.clip)


def _weigh_best_of_n(rewards: Sequence[float], settings: TrainSettings) -> Sequence[float]:
    cloned = set(best_of_n(torch.tensor(rewards, dtype=torch.float64), settings.top_k))
    return [1.0 if index in cloned else 0.0 for index in range(len(rewards))]


def _loss_best_of_n(
    logp_T: torch.Tensor, old_logp_T: torch.Tensor, weight_T: torch.Tensor, settings: TrainSettings
) -> torch.Tensor:
    return weight_T * cloning_loss(logp_T)


IMPLEMENTED: Mapping[Objective, Implementation] = {
    Objective.GRPO: Implementation(_weigh_grpo, _loss_grpo, over_kept=False),
    Objective.BEST_OF_N: Implementation(_weigh_best_of_n, _loss_best_of_n, over_kept=True),
}
"""The objectives that the trainer can run today."""
