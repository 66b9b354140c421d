"""The lever rule, one row a case, and properties over arbitrary archives."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.archive import Attempt, Lever, Objective
from agents.decision import Evidence, RewardProbe
from agents.levers import LeverRules, choose_lever, streak, weights_due
from tasks.contract import AnswerKind, Split, TaskKind, TaskSpec

TASK = TaskSpec(
    name="t",
    title="T",
    kind=TaskKind.SOLVE,
    answer=AnswerKind.INTEGER,
    dev_block=10,
    sizes={Split.TRAIN: 10, Split.DEV: 10, Split.TEST: 10},
)

ALIVE = RewardProbe(((0.0, 1.0, 0.0, 0.0),) * 4 + ((0.0,) * 4,) * 4)
RARE = RewardProbe(((0.0,) * 8,) * 15 + ((0.0,) * 7 + (1.0,),))
NEVER = RewardProbe(((0.0,) * 4,) * 8)
SETTLED = RewardProbe(((0.0,) * 4, (1.0,) * 4) * 4)


def archive(words: str) -> list[Attempt]:
    """`h+ h- w+ w-`: harness or weights, accepted or not; `h?` undecided. The first Generation comes before."""
    attempts = [Attempt(1, Lever.FIRST, None, "s1", None, None, None, True)]
    for number, word in enumerate(words.split(), start=2):
        lever = Lever.HARNESS if word[0] == "h" else Lever.WEIGHTS
        accepted = {"+": True, "-": False, "?": None}[word[1]]
        attempts.append(Attempt(number, lever, 1, f"s{number}", None, None, None, accepted))
    return attempts


def evidence(words: str, probe: RewardProbe | None = ALIVE, left: int = 8, trainable: str | None = None) -> Evidence:
    return Evidence(TASK, archive(words), 1, left, trainable, probe)


@pytest.mark.parametrize(
    ("words", "left", "lever"),
    [
        ("", 8, Lever.HARNESS),
        ("", 2, Lever.HARNESS),
        ("", 1, Lever.HARNESS),
        ("h+", 8, Lever.HARNESS),
        ("h-", 8, Lever.HARNESS),
        ("h- h-", 8, Lever.WEIGHTS),
        ("h- h+", 8, Lever.HARNESS),
        ("h- h+ h-", 8, Lever.HARNESS),
        ("h+ h- h-", 8, Lever.WEIGHTS),
        ("h- h?", 8, Lever.HARNESS),
        ("h- h- w+", 8, Lever.HARNESS),
        ("h- h- w+ h-", 8, Lever.HARNESS),
        ("h- h- w+ h- h-", 8, Lever.WEIGHTS),
        ("h- h- w-", 8, Lever.HARNESS),
        ("h- h- w- h-", 8, Lever.HARNESS),
        ("h- h- w- h- h-", 8, Lever.WEIGHTS),
        ("h- h- w- h- h+", 8, Lever.HARNESS),
        ("h+", 3, Lever.HARNESS),
        ("h+", 2, Lever.WEIGHTS),
        ("h-", 1, Lever.WEIGHTS),
        ("h+ h- h- w-", 2, Lever.HARNESS),
        ("h+ w+", 1, Lever.HARNESS),
        ("h- h-", 0, Lever.STOP),
        ("", 0, Lever.STOP),
    ],
)
def test_whose_turn_it_is(words: str, left: int, lever: Lever) -> None:
    choice = choose_lever(evidence(words, left=left))
    assert choice.lever is lever
    assert (choice.objective is Objective.GRPO) == (lever is Lever.WEIGHTS)
    assert choice.reasons


@pytest.mark.parametrize(
    ("probe", "lever", "objective", "said"),
    [
        (ALIVE, Lever.WEIGHTS, Objective.GRPO, "4 of 8 groups (50%) have unequal rewards"),
        (RARE, Lever.WEIGHTS, Objective.BEST_OF_N, "1 of 128 rollouts are above 0"),
        (NEVER, Lever.HARNESS, None, "nothing to clone"),
        (SETTLED, Lever.HARNESS, None, "mean reward 0.500 is not sparse"),
        (None, Lever.HARNESS, None, "no reward probe"),
    ],
)
def test_the_objective_follows_the_rewards(
    probe: RewardProbe | None, lever: Lever, objective: Objective | None, said: str
) -> None:
    choice = choose_lever(evidence("h- h-", probe=probe))
    assert (choice.lever, choice.objective) == (lever, objective)
    assert said in " | ".join(choice.reasons)
    assert "the last 2 harness candidates" in choice.reasons[0]


def test_what_could_learn_but_is_not_available_is_named() -> None:
    reasons = " | ".join(choose_lever(evidence("h- h-")).reasons)
    assert "not available in this version: ppo, entropic, reinforce_kl, dpo" in reasons


def test_a_model_without_weights_stays_on_the_harness_and_says_why() -> None:
    choice = choose_lever(evidence("h- h- h-", trainable="an API model has no weights here"))
    assert choice.lever is Lever.HARNESS
    assert "an API model has no weights here" in choice.reasons[0]


def test_a_used_up_harness_search_makes_weights_due_or_stops() -> None:
    assert choose_lever(evidence("h+"), harness_open=False).lever is Lever.WEIGHTS
    assert choose_lever(evidence("h+", probe=NEVER), harness_open=False).lever is Lever.STOP
    assert choose_lever(evidence("h+", trainable="none"), harness_open=False).lever is Lever.STOP


def test_patience_is_a_rule() -> None:
    patient = LeverRules(harness_patience=3)
    assert choose_lever(evidence("h- h-"), patient).lever is Lever.HARNESS
    assert choose_lever(evidence("h- h- h-"), patient).lever is Lever.WEIGHTS


def test_the_streak_ends_at_an_acceptance_or_a_weight_update() -> None:
    assert streak(archive("h- h- h-")).rejected_in_a_row == 3
    assert streak(archive("h- w- h-")).rejected_in_a_row == 1
    assert streak(archive("h- h+")).rejected_in_a_row == 0
    assert streak(list(reversed(archive("h+ h- h-")))).rejected_in_a_row == 2


words = st.lists(st.sampled_from(["h+", "h-", "h?", "w+", "w-"]), max_size=8).map(" ".join)
groups: st.SearchStrategy[Sequence[tuple[float, ...]]] = st.lists(
    st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=4).map(tuple), max_size=6
)
any_probe = st.none() | groups.map(lambda g: RewardProbe(tuple(g)))
any_evidence = st.builds(evidence, words, any_probe, st.integers(0, 10), st.none() | st.just("no weights to train"))


@given(any_evidence, st.booleans())
def test_properties_of_every_choice(seen: Evidence, harness_open: bool) -> None:
    choice = choose_lever(seen, harness_open=harness_open)
    assert choice.lever in (Lever.HARNESS, Lever.WEIGHTS, Lever.STOP)
    assert (choice.lever is Lever.WEIGHTS) == (choice.objective is not None)
    assert choice.reasons
    assert all(reason.strip() for reason in choice.reasons)
    if seen.trainable is not None or seen.probe is None:
        assert choice.lever is not Lever.WEIGHTS
    if seen.generations_left == 0:
        assert choice.lever is Lever.STOP
    elif harness_open:
        assert choice.lever is not Lever.STOP
    if choice.lever is Lever.WEIGHTS:
        assert weights_due(seen, LeverRules(), harness_open) is not None
    if not harness_open:
        assert choice.lever is not Lever.HARNESS
    assert choose_lever(seen, harness_open=harness_open) == choice
