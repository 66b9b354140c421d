"""Reward summaries and the preconditions of all six Objectives, case by case."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.archive import Attempt, Lever, Objective
from agents.decision import Evidence, RewardProbe
from agents.evidence import IMPLEMENTED_TODAY, EvidenceRules, preconditions, reward_summary
from tasks.contract import AnswerKind, EpisodeLimits, Split, TaskKind, TaskSpec

TASK = TaskSpec(
    name="t",
    title="T",
    kind=TaskKind.SOLVE,
    answer=AnswerKind.INTEGER,
    dev_block=10,
    sizes={Split.TRAIN: 10, Split.DEV: 10, Split.TEST: 10},
)
FIRST = Attempt(1, Lever.FIRST, None, "s", None, None, None, True)

Groups = tuple[tuple[float, ...], ...]
rewards = st.floats(0, 1)
probes = st.lists(st.lists(rewards, max_size=6).map(tuple), max_size=8).map(lambda g: RewardProbe(tuple(g)))


def evidence(groups: Groups | None, trainable: str | None = None, max_tokens: int = 64) -> Evidence:
    task = TASK.model_copy(update={"limits": EpisodeLimits(max_tokens_per_call=max_tokens)})
    return Evidence(task, [FIRST], 1, 5, trainable, None if groups is None else RewardProbe(groups))


def able(groups: Groups | None, trainable: str | None = None, max_tokens: int = 64) -> set[str]:
    return {o.value for o, why in preconditions(evidence(groups, trainable, max_tokens)).items() if why is None}


def test_a_summary_counts_groups_alive_and_bins() -> None:
    s = reward_summary(
        RewardProbe(((0.0, 0.0, 0.0, 1.0), (1.0, 1.0, 1.0, 1.0), (0.0, 0.0, 0.0, 0.0), (0.05, 0.5, 0, 0)))
    )
    assert (s.groups, s.smallest_group, s.rollouts, s.groups_alive, s.share_alive) == (4, 4, 16, 2, 0.5)
    assert s.mean == pytest.approx(5.55 / 16)
    assert s.histogram == (10, 0, 0, 0, 0, 1, 0, 0, 0, 5)
    assert s.best == 1.0


def test_skew_has_its_known_value_and_sign() -> None:
    # A Bernoulli variable of mean 1/4 has skewness (1 - 2p) / sqrt(p (1 - p)) = 1.154701.
    assert reward_summary(RewardProbe(((0, 0, 0, 1),))).skew == pytest.approx(1.154700538)
    assert reward_summary(RewardProbe(((1, 1, 1, 0),))).skew == pytest.approx(-1.154700538)
    assert reward_summary(RewardProbe(((0.5, 0.5),))).skew == 0


def test_an_empty_probe_is_a_summary_of_nothing() -> None:
    s = reward_summary(RewardProbe(()))
    assert (s.groups, s.rollouts, s.mean, s.share_alive, s.skew) == (0, 0, 0.0, 0.0, 0.0)


@given(probes)
def test_a_summary_is_consistent(probe: RewardProbe) -> None:
    s = reward_summary(probe)
    assert sum(s.histogram) == s.rollouts == sum(map(len, probe.groups))
    assert 0 <= s.groups_alive <= s.groups
    assert 0 <= s.mean <= s.best + 1e-12 or s.rollouts == 0
    assert reward_summary(RewardProbe(tuple(reversed(probe.groups)))).groups_alive == s.groups_alive


ALIVE: Groups = ((0.0, 1.0, 0.0, 0.0),) * 8
DEAD_ZERO: Groups = ((0.0,) * 4,) * 8
DEAD_ONE: Groups = ((1.0,) * 4,) * 8
RARE: Groups = ((0.0,) * 4,) * 7 + ((0.0, 0.0, 1.0, 0.0),)
PAIRS: Groups = ((0.0, 1.0),) * 16
SETTLED: Groups = ((0.0,) * 4, (1.0,) * 4) * 4


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (ALIVE, {"ppo", "grpo", "entropic", "reinforce_kl", "best_of_n", "dpo"}),
        (DEAD_ZERO, set()),
        (DEAD_ONE, {"reinforce_kl", "best_of_n"}),
        (RARE, {"ppo", "entropic", "reinforce_kl", "best_of_n", "dpo"}),
        (PAIRS, {"ppo", "grpo", "reinforce_kl", "best_of_n", "dpo"}),
        (SETTLED, {"ppo", "reinforce_kl", "best_of_n"}),
        (((0.0, 1.0, 0.0),), {"grpo", "entropic", "reinforce_kl", "best_of_n", "dpo"}),
        (None, set()),
        ((), set()),
        (((), ()), set()),
    ],
)
def test_which_objectives_could_learn(groups: Groups | None, expected: set[str]) -> None:
    assert able(groups) == expected


def test_single_token_actions_rule_ppo_out() -> None:
    assert "ppo" not in able(ALIVE, max_tokens=1)


def test_a_model_that_cannot_be_trained_refuses_all_and_quotes_why() -> None:
    refusals = preconditions(evidence(ALIVE, trainable="the endpoint has no weights"))
    assert set(refusals) == set(Objective)
    assert all(why is not None and "the endpoint has no weights" in why for why in refusals.values())


@pytest.mark.parametrize("groups", [ALIVE, DEAD_ZERO, DEAD_ONE, RARE, PAIRS, SETTLED, None])
def test_every_objective_has_a_verdict_and_no_reason_is_empty(groups: Groups | None) -> None:
    refusals = preconditions(evidence(groups))
    assert set(refusals) == set(Objective)
    assert all(why is None or why.strip() for why in refusals.values())


def test_refusals_quote_the_numbers() -> None:
    refusals = preconditions(evidence(RARE))
    assert "1 of 8 groups" in (refusals[Objective.GRPO] or "")
    assert "32 rollouts" in (preconditions(evidence(DEAD_ZERO))[Objective.BEST_OF_N] or "")


def test_thresholds_are_the_callers() -> None:
    assert preconditions(evidence(RARE), EvidenceRules(min_groups_alive=0.1))[Objective.GRPO] is None
    half = ((0.4, 0.4),) * 4
    assert preconditions(evidence(half), EvidenceRules(floor=0.5))[Objective.BEST_OF_N] is not None


@given(probes, st.text(min_size=1))
def test_nothing_learns_without_a_trainable_model_or_from_all_zero(probe: RewardProbe, why: str) -> None:
    assert able(probe.groups, trainable=why) == set()
    assert able(tuple(tuple(0.0 for _ in g) for g in probe.groups)) == set()


def test_what_is_available_is_two_of_the_six() -> None:
    assert set(IMPLEMENTED_TODAY) == {Objective.GRPO, Objective.BEST_OF_N}
