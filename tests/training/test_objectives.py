"""Known answers and invariances of the objectives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agents.archive import Objective
from agents.decision import TrainSettings
from training.objectives import (
    IMPLEMENTED,
    best_of_n,
    clipped_policy_loss,
    cloning_loss,
    grpo_advantages,
)

REWARDS = st.lists(st.integers(0, 8).map(lambda k: k / 8), min_size=1, max_size=10)


def test_grpo_known_answer() -> None:
    advantages_G = grpo_advantages(torch.tensor([0.0, 0.0, 0.0, 1.0]), eps=0.0)
    assert advantages_G.tolist() == pytest.approx([-0.577350] * 3 + [1.732051], abs=1e-6)


@given(REWARDS)
def test_grpo_is_centred_scaled_and_silent_without_signal(rewards: list[float]) -> None:
    advantages_G = grpo_advantages(torch.tensor(rewards, dtype=torch.float64), eps=1e-6)
    if len(set(rewards)) == 1:
        assert advantages_G.tolist() == [0.0] * len(rewards)
    else:
        assert float(advantages_G.mean()) == pytest.approx(0, abs=1e-9)
        assert float(advantages_G.std(correction=0)) == pytest.approx(1, abs=1e-4)


@given(st.floats(0.01, 1).filter(lambda r: r > 0), st.integers(2, 9))
def test_equal_rewards_give_exactly_zero(reward: float, count: int) -> None:
    assert grpo_advantages(torch.tensor([reward] * count)).tolist() == [0.0] * count


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.5, 1.0, -1.2, 0.0),  # already likelier by more than the clip: no further push up
        (0.5, 1.0, -0.5, -0.5),
        (0.5, -1.0, 0.8, 0.0),  # already unlikelier by more than the clip: no further push down
        (1.5, -1.0, 1.5, 1.5),
    ],
)
def test_clipped_loss_by_hand(ratio: float, advantage: float, loss: float, slope: float) -> None:
    logp_T = torch.tensor([ratio]).log().requires_grad_()
    found_T = clipped_policy_loss(logp_T, torch.zeros(1), torch.tensor(advantage), clip=0.2)
    found_T.sum().backward()  # type: ignore[no-untyped-call]
    assert float(found_T.detach()) == pytest.approx(loss)
    assert logp_T.grad is not None
    assert float(logp_T.grad) == pytest.approx(slope)


def test_clipped_loss_agrees_with_trl() -> None:
    """TRL's formula on the same tensors: coefficients clamped on both sides, the smaller surrogate taken."""
    generator = torch.Generator().manual_seed(0)
    logp_T, old_T, advantage_T = (torch.randn(50, generator=generator) for _ in range(3))
    coef_1 = torch.exp(logp_T - old_T)
    coef_2 = torch.clamp(coef_1, 1 - 0.2, 1 + 0.2)
    expected_T = -torch.min(coef_1 * advantage_T, coef_2 * advantage_T)
    torch.testing.assert_close(clipped_policy_loss(logp_T, old_T, advantage_T, 0.2), expected_T)


def test_best_of_n_takes_the_best_above_the_floor() -> None:
    rewards_G = torch.tensor([0.2, 1.0, 0.0, 1.0, 0.5])
    assert best_of_n(rewards_G, 1) == [1]
    assert best_of_n(rewards_G, 3) == [1, 3, 4]
    assert best_of_n(rewards_G, 9) == [1, 3, 4, 0]
    assert best_of_n(rewards_G, 9, floor=0.5) == [1, 3]
    assert best_of_n(torch.zeros(4), 2) == []


@given(REWARDS, st.integers(1, 5), st.floats(0, 1))
def test_best_of_n_properties(rewards: list[float], top_k: int, floor: float) -> None:
    rewards_G = torch.tensor(rewards, dtype=torch.float64)
    chosen = best_of_n(rewards_G, top_k, floor)
    assert len(chosen) == min(top_k, sum(reward > floor for reward in rewards))
    left = [reward for index, reward in enumerate(rewards) if index not in chosen]
    assert all(rewards[index] > floor for index in chosen)
    assert not chosen or len(chosen) < top_k or max(left, default=-1) <= min(rewards[i] for i in chosen)


def test_cloning_loss_is_cross_entropy() -> None:
    logits_TV = torch.randn(6, 11, generator=torch.Generator().manual_seed(1))
    target_T = torch.arange(6)
    logp_T = torch.log_softmax(logits_TV, -1)[torch.arange(6), target_T]
    expected = torch.nn.functional.cross_entropy(logits_TV, target_T)
    torch.testing.assert_close(cloning_loss(logp_T).mean(), expected)


def test_what_is_implemented_today() -> None:
    """Extend this set together with the table: a lever may only choose what the trainer can run."""
    assert set(IMPLEMENTED) == {Objective.GRPO, Objective.BEST_OF_N}


@pytest.mark.parametrize("objective", IMPLEMENTED)
def test_no_signal_weighs_nothing(objective: Objective) -> None:
    weights = IMPLEMENTED[objective].weigh([0.0, 0.0, 0.0], TrainSettings(objective=objective))
    assert list(weights) == [0.0, 0.0, 0.0]
