"""What a Task is: the words every room uses for a benchmark, and the contract a task folder fulfils.

A task folder holds `task.toml` (the `TaskSpec`), `task.md` (the public text an agent may read) and `task.py`
with `open_task(spec, cache, say) -> Task`. Gold answers of dev and test exist only inside `Task.score`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field, JsonValue

Say = Callable[[str], None]
"""A sink for one-line messages to the person at the terminal."""


class TaskError(Exception):
    """Raised when a task folder, its data or a name of a task is wrong; the message says how to mend it."""


class Split(StrEnum):
    """The three disjoint parts of a task. `train` may be learned from, `dev` steers, `test` is sealed."""

    TRAIN = "train"
    DEV = "dev"
    TEST = "test"


class TaskKind(StrEnum):
    """How a Scaffold meets the task: `solve` is called per Problem, `program` runs once over all files."""

    SOLVE = "solve"
    PROGRAM = "program"


class AnswerKind(StrEnum):
    """The form of an answer, which the task states publicly so that scaffolds can extract it."""

    INTEGER = "integer"
    LABEL = "label"
    TEXT = "text"


@dataclass(frozen=True)
class Problem:
    """One item of a task, as an agent may see it: never a gold answer."""

    id: str
    prompt: str
    fields: Mapping[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    """A train problem with its answer. Only `train` has examples."""

    problem: Problem
    answer: str


class Baseline(BaseModel):
    """A published or measured score that a result stands beside."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    score: float
    source: str
    comparable: bool = True


class EpisodeLimits(BaseModel):
    """Bounds on one Episode (`solve`) or one program run (`program`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    wall_s: float = 60.0
    cpu_s: int = 60
    memory_mb: int = 1024
    output_bytes: int = 65536
    max_calls: int = 16
    max_tokens_per_call: int = 256
    processes: int = 64
    file_mb: int = 64


class TaskSpec(BaseModel):
    """`task.toml`, validated. Frozen: a run stores it, and its level never moves while results are compared."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    title: str
    kind: TaskKind
    answer: AnswerKind
    metric: str = "accuracy"
    model_only: bool = Field(
        default=False,
        description="An answer counts only if it occurs in a completion recorded for its Episode.",
    )
    fresh_dev: bool = Field(
        default=False, description="The task can generate dev problems, so each gate draws an unused block."
    )
    dev_block: int = Field(description="Problems in one gate (all of dev when fresh_dev is false).")
    sizes: dict[Split, int] = Field(description="Problems in each split.")
    level: dict[str, JsonValue] = Field(default_factory=dict, description="Generator settings, fixed.")
    limits: EpisodeLimits = EpisodeLimits()
    baselines: tuple[Baseline, ...] = ()
    text: str = Field(default="", description="task.md, filled in by the loader.")


class Task(Protocol):
    """A benchmark opened for use. Pure reading: no method mutates state or draws randomness.

    Raises:
        TaskError: data missing or corrupt (from any method).
    """

    spec: TaskSpec

    def problems(self, split: Split) -> Sequence[Problem]:
        """All problems of a split, in a fixed order, `spec.sizes[split]` of them."""
        ...

    def examples(self) -> Sequence[Example]:
        """The train problems with answers, in the order of `problems(Split.TRAIN)`."""
        ...

    def score(self, problem_id: str, answer: JsonValue) -> float:
        """The reward in [0, 1] of an answer. Any JSON is a legal argument; what is not a right answer is 0."""
        ...

    def asked(self, split: Split) -> Sequence[Problem]:
        """The problems a rollout over `split` asks: all of it, but for a `program` task's `train`, of which a fixed
        part is asked and the rest left to learn from."""
        ...

    def write_dataset(self, split: Split, directory: Path) -> None:
        """`program` tasks: write what a program may read to be asked about `split` (never its gold)."""
        ...

    def read_answers(self, working_dir: Path) -> dict[str, JsonValue]:
        """`program` tasks: problem id -> answer from what the program left; ids unknown or repeated are dropped."""
        ...
