"""An Episode: one attempt at one Problem, how it can end, and what each ending means.

`CAUSES` is the one table that says, for each ending, whether the attempt is repeated and whether it counts as a
measurement. An infrastructure failure is repeated and never counted as a reward of 0; a Scaffold's own failure is
a measurement: it scores 0 and stays in the denominator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from pydantic import JsonValue

from tasks.contract import Problem


class Cause(StrEnum):
    """Why an Episode ended."""

    FINISHED = "finished"
    NO_ANSWER = "no_answer"
    BAD_ANSWER = "bad_answer"
    CRASHED = "crashed"
    TIMED_OUT = "timed_out"
    CPU_LIMIT = "cpu_limit"
    MEMORY_LIMIT = "memory_limit"
    OUTPUT_LIMIT = "output_limit"
    CALL_LIMIT = "call_limit"
    SANDBOX_LOST = "sandbox_lost"
    ENGINE_FAILED = "engine_failed"


class Meaning(NamedTuple):
    """What a Cause entails: whether it `measures` the Scaffold; else infrastructure failed, and it is tried again."""

    measures: bool
    text: str


CAUSES: Mapping[Cause, Meaning] = {
    Cause.FINISHED: Meaning(True, "returned a JSON answer"),
    Cause.NO_ANSWER: Meaning(True, "returned None or left the problem unanswered"),
    Cause.BAD_ANSWER: Meaning(True, "returned something that is not a JSON value"),
    Cause.CRASHED: Meaning(True, "raised or exited before answering"),
    Cause.TIMED_OUT: Meaning(True, "passed its wall-clock limit and was killed"),
    Cause.CPU_LIMIT: Meaning(True, "used up its CPU time and was killed"),
    Cause.MEMORY_LIMIT: Meaning(True, "asked for more memory than its limit"),
    Cause.OUTPUT_LIMIT: Meaning(True, "wrote more than its output limit"),
    Cause.CALL_LIMIT: Meaning(True, "asked the model more often than its limit"),
    Cause.SANDBOX_LOST: Meaning(False, "the sandbox died under it"),
    Cause.ENGINE_FAILED: Meaning(False, "the model failed to answer"),
}


@dataclass(frozen=True)
class EpisodeSpec:
    """One attempt to make. `episode_id` is the row's id; `seed` keys every random draw of the attempt."""

    episode_id: int
    problem: Problem
    sample: int
    seed: int


@dataclass(frozen=True)
class EpisodeResult:
    """What came of an attempt. `answer` is None unless the cause is FINISHED."""

    episode_id: int
    cause: Cause
    answer: JsonValue
    wall_s: float
    events: tuple[JsonValue, ...] = ()
    detail: str = ""
    """A crash's traceback or the limit that was hit, at most 4,000 characters."""
