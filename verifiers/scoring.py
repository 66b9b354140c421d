"""Score recorded answers. Pure: the same record gives the same reward, today and on resume.

Rewards come from the recorded answer alone (and, in a model-only task, the completions recorded for the
Episode), never from anything that a Scaffold says about itself. A missing answer is wrong and denominators are
fixed by the split: leaving problems out cannot raise a mean.

The model-only rule: an answer counts only if it occurs, as a whole token, in a completion recorded for its
Episode. A number occurs if it stands in the text as that whole number with that sign: 28 does not occur in
"128", "2.28", "-28" or "x28". This catches a Scaffold that computes the answer itself and a Scaffold that never asks.

What the rule does not catch, and how the record would show it:
- Echo: the Scaffold computes the answer and has the model repeat it ("say 28"). The number then stands in the
  recorded request although it stands neither in the problem nor in the examples.
- Enumeration: the model is made to list many numbers and the Scaffold picks. The completions then hold many
  more numbers than answers are needed.
- Selection by computing: many samples are drawn and the Scaffold keeps the one that it knows to be right. The
  accuracy then equals pass@k, not that of a vote, at a high number of calls.
Whoever reads a suspiciously good Episode finds all three in its Trajectory; no reward changes for them here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from pydantic import JsonValue

from tasks.answers import as_integer
from tasks.contract import AnswerKind, Task, TaskError


class Reason(StrEnum):
    """Why an Episode has the reward it has."""

    RIGHT = "right"
    PARTLY_RIGHT = "partly_right"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    NOT_IN_COMPLETION = "not_in_completion"


@dataclass(frozen=True)
class ScoreRecord:
    """The verifier's word on one Episode that was measured; one under which infrastructure failed is repeated, and
    never comes here."""

    reward: float
    counted_reason: Reason


@dataclass(frozen=True)
class MeanReward:
    """A mean over a fixed set of problems: `answered` of the `n` have a reward on record, the others count 0."""

    n: int
    answered: int
    mean: float


def score_episode(task: Task, problem_id: str, answer: JsonValue, completions: Sequence[str]) -> ScoreRecord:
    """Score one Episode from its record.

    Args:
        task: holds the gold answer and says whether the model-only rule applies.
        problem_id: the Problem that was asked.
        answer: as recorded; None is no answer.
        completions: the texts of all completions recorded for this Episode (used in model-only tasks).

    Raises:
        TaskError: the problem is unknown, or the task's verifier returned something outside [0, 1].
    """
    if answer is None:
        return ScoreRecord(0.0, Reason.NO_ANSWER)
    if task.spec.model_only and not occurs_in_completions(answer, task.spec.answer, completions):
        return ScoreRecord(0.0, Reason.NOT_IN_COMPLETION)
    reward = task.score(problem_id, answer)
    if not 0.0 <= reward <= 1.0:  # false for NaN too
        raise TaskError(f"{task.spec.name}: the verifier gave {reward} for {problem_id}, outside [0, 1]")
    if reward == 1.0:
        return ScoreRecord(1.0, Reason.RIGHT)
    return ScoreRecord(reward, Reason.PARTLY_RIGHT if reward > 0.0 else Reason.WRONG)


def occurs_in_completions(answer: JsonValue, kind: AnswerKind, completions: Iterable[str]) -> bool:
    """True if the answer stands as a whole token in at least one of the completions.

    An integer is compared as a number (so "+28", "028" and "1,280" are 28, 28 and 1280), any other answer as
    exact text that no ASCII letter, digit or underscore touches. An answer that is not of the task's kind
    occurs nowhere.
    """
    if kind is AnswerKind.INTEGER:
        number = as_integer(answer)
        return number is not None and any(number in integers_in(text) for text in completions)
    if not isinstance(answer, str) or not answer.strip():
        return False
    token = re.compile(rf"(?<![0-9A-Za-z_]){re.escape(answer.strip())}(?![0-9A-Za-z_])")
    return any(token.search(text) for text in completions)


_NUMBER = re.compile(
    r"""(?<![0-9A-Za-z_]) (?<![0-9][.,])      # not inside a word, nor the decimals of a number
        ([-+\u2212]?)                         # a sign that touches the digits; \u2212 is the long minus
        ([0-9]{1,3}(?:,[0-9]{3})+ | [0-9]+)   # with or without separators of thousands
        (?![0-9A-Za-z_]) (?![.,][0-9])        # whole, and no decimals after it""",
    re.VERBOSE,
)


def integers_in(text: str) -> set[int]:
    """The whole integers in a text, with their signs: "15-28" and "15 - 28" hold 15 and 28, "= -28" holds -28."""
    found: set[int] = set()
    for sign, digits in _NUMBER.findall(text):
        number = as_integer(digits.replace(",", ""))
        if number is not None:
            found.add(number if sign in ("", "+") else -number)
    return found


def complete_rewards(expected_ids: Sequence[str], rewards: Mapping[str, float]) -> dict[str, float]:
    """Exactly one reward for each expected problem, in their order; what has none on record is 0.

    Raises:
        ValueError: an expected id occurs twice, a reward belongs to no expected problem, or is not in [0, 1].
    """
    expected = dict.fromkeys(expected_ids, 0.0)
    if len(expected) != len(expected_ids):
        raise ValueError("a problem is expected twice; a mean needs each problem once")
    for problem_id, reward in rewards.items():
        if problem_id not in expected:
            raise ValueError(f"a reward for {problem_id!r}, none of the {len(expected)} expected problems")
        if not 0.0 <= reward <= 1.0:
            raise ValueError(f"the reward of {problem_id!r} is {reward}, outside [0, 1]")
        expected[problem_id] = reward
    return expected


def mean_reward(expected_ids: Sequence[str], rewards: Mapping[str, float]) -> MeanReward:
    """The mean over all expected problems: the denominator is their number, whatever was answered.

    Raises:
        ValueError: no problem is expected, or as in `complete_rewards`.
    """
    if not expected_ids:
        raise ValueError("the mean of no problems; expected_ids is empty")
    complete = complete_rewards(expected_ids, rewards)
    return MeanReward(len(complete), len(rewards), math.fsum(complete.values()) / len(complete))
