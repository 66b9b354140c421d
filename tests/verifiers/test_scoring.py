"""Rewards from records: the model-only rule, infrastructure failures, fixed denominators."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue

from tasks.contract import AnswerKind, Split, Task, TaskError, TaskSpec
from tasks.loader import cache_root, load_task
from verifiers.scoring import (
    Reason,
    ScoreRecord,
    complete_rewards,
    integers_in,
    mean_reward,
    occurs_in_completions,
    score_episode,
)


@pytest.fixture(scope="module")
def chain_sum() -> Task:
    return load_task("chain-sum", cache_root(), print)


def gold_of(task: Task) -> dict[str, int]:
    return task._gold  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("28", {28}),
        ("The answer is 28.", {28}),
        ("15 - 43 = -28", {15, 43, -28}),
        ("15-43=-28", {15, 43, -28}),
        ("\u221228", {-28}),
        ("+28", {28}),
        ("128, 281 and 0028", {128, 281, 28}),
        ("28.5 or 2.28", set()),
        ("3.", {3}),
        ("1,280 people", {1280}),
        ("12,80", set()),
        ("x28 28x 28_ _28", set()),
        ("答案是28。", {28}),
        ("**28**", {28}),
        ("$28", {28}),
        ("(28)", {28}),
        ("28/2", {28, 2}),
        ("no number", set()),
        ("9" * 5000, set()),
    ],
)
def test_whole_integers_of_a_text(text: str, numbers: set[int]) -> None:
    assert integers_in(text) == numbers


@given(st.integers(-10_000, 10_000), st.integers(-10_000, 10_000))
def test_a_number_occurs_in_its_own_sentence_and_no_other_does(number: int, other: int) -> None:
    text = f"So the result is {number}."
    assert integers_in(text) == {number}
    assert occurs_in_completions(other, AnswerKind.INTEGER, [text]) == (other == number)


@given(st.text(max_size=200))
def test_any_completion_can_be_searched(text: str) -> None:
    assert all(isinstance(number, int) for number in integers_in(text))


@pytest.mark.parametrize(
    ("answer", "text", "occurs"),
    [
        ("盗窃", "罪名是盗窃罪", True),
        ("[生产、销售]假药", "answer: [生产、销售]假药", True),
        ("theft", "It is theft.", True),
        ("theft", "thefts", False),
        ("", "anything", False),
        ("  ", "anything  ", False),
        (3, "3", False),
        (None, "None", False),
    ],
)
def test_labels_occur_as_whole_tokens(answer: JsonValue, text: str, occurs: bool) -> None:
    assert occurs_in_completions(answer, AnswerKind.LABEL, ["", text]) is occurs


def test_a_right_answer_counts_only_with_its_completion(chain_sum: Task) -> None:
    gold = gold_of(chain_sum)["dev-0"]
    right = f"The result is {gold}."
    assert score_episode(chain_sum, "dev-0", gold, [right]) == ScoreRecord(1.0, Reason.RIGHT)
    assert score_episode(chain_sum, "dev-0", str(gold), ["?", right]).reward == 1.0
    for completions in ([], [f"{gold}1"], [f"{gold}.5"], [str(-gold - 1)]):
        record = score_episode(chain_sum, "dev-0", gold, completions)
        assert record == ScoreRecord(0.0, Reason.NOT_IN_COMPLETION)
    wrong = gold + 1
    assert score_episode(chain_sum, "dev-0", wrong, [str(wrong)]) == ScoreRecord(0.0, Reason.WRONG)


def test_a_scaffold_that_computes_the_answer_itself_scores_0(chain_sum: Task) -> None:
    asked = [p.id for p in chain_sum.problems(Split.DEV)[:256]]
    gold = gold_of(chain_sum)
    agents = {
        "oracle": {i: (gold[i], [f"= {gold[i]}"]) for i in asked},
        "computes": {i: (gold[i], [f"I am a small model, {gold[i]}0"]) for i in asked},
        "never asks": {i: (gold[i], list[str]()) for i in asked},
        "nothing": {i: (None, ["-28"]) for i in asked},
    }
    means = {}
    for name, record in agents.items():
        scores = {i: score_episode(chain_sum, i, *record[i]).reward for i in asked}
        means[name] = mean_reward(asked, scores).mean
    # "{gold}0" is the gold itself where that is 0 ("00"), and there the model did say it.
    assert means == {"oracle": 1.0, "computes": pytest.approx(0, abs=0.05), "never asks": 0.0, "nothing": 0.0}


def test_no_answer_is_wrong_whatever_the_model_said(chain_sum: Task) -> None:
    assert score_episode(chain_sum, "dev-0", None, ["28"]) == ScoreRecord(0.0, Reason.NO_ANSWER)


@dataclass
class Odd:
    """A task whose verifier gives whatever it is told to."""

    spec: TaskSpec
    reward: float

    def score(self, problem_id: str, answer: JsonValue) -> float:
        return self.reward

    problems = examples = write_dataset = read_answers = None


@pytest.mark.parametrize("reward", [1.5, -0.1, float("nan")])
def test_a_verifier_out_of_range_is_an_error_not_a_reward(lawbench_spec: TaskSpec, reward: float) -> None:
    with pytest.raises(TaskError, match=r"outside \[0, 1\]"):
        score_episode(Odd(lawbench_spec, reward), "dev-0", "x", [])  # type: ignore[arg-type]
    assert score_episode(Odd(lawbench_spec, 0.5), "d", "x", []).counted_reason is Reason.PARTLY_RIGHT  # type: ignore[arg-type]


@pytest.fixture
def lawbench_spec() -> TaskSpec:
    from tasks.loader import BUILT_IN, load_spec

    return load_spec(Path(BUILT_IN) / "lawbench")


def test_denominators_are_fixed() -> None:
    ids = ["a", "b", "c", "d"]
    one = mean_reward(ids, {"a": 1.0})
    assert (one.n, one.answered, one.mean) == (4, 1, 0.25)
    assert complete_rewards(ids, {"d": 0.5}) == {"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.5}
    with pytest.raises(ValueError, match="none of the 4 expected"):
        mean_reward(ids, {"z": 1.0})
    with pytest.raises(ValueError, match="twice"):
        mean_reward(["a", "a"], {})
    with pytest.raises(ValueError, match="outside"):
        mean_reward(ids, {"a": float("nan")})
    with pytest.raises(ValueError, match="no problems"):
        mean_reward([], {})
