"""Evidence in, Decision out: the records between a Generation's scores and the lever pulled next.

Pure data; the rules stand in `agents.levers`, the offline search in `agents.feedback_agent`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from agents.archive import Attempt, Lever, Objective
from agents.episode import Cause
from tasks.contract import Example, TaskSpec


class TrainSettings(BaseModel):
    """Settings of one WeightUpdate. Defaults are the small-model ones of the chain-sum pilot."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    objective: Objective
    iterations: int = Field(default=10, ge=1, description="Roll out, score, step: this many times.")
    problems: int = Field(default=32, ge=1, description="Train problems an iteration.")
    samples: int = Field(default=8, ge=1, description="Episodes a problem (the group size G).")
    learning_rate: float = 1e-4
    rank: int = 16
    alpha: int = 32
    clip: float = Field(default=0.2, description="PPO-style ratio clip of GRPO.")
    max_grad_norm: float = 1.0
    top_k: int = Field(default=1, description="best_of_n: episodes cloned a problem, those above the floor only.")
    epochs: int = Field(default=1, description="Passes over one iteration's rollouts.")


@dataclass(frozen=True)
class RewardProbe:
    """Rewards of the incumbent on train problems at temperature 1: `groups[p][g]` in [0, 1]."""

    groups: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Evidence:
    """All that a Feedback-Agent may see when it decides. Never a gold answer of dev or test, never a test problem."""

    task: TaskSpec
    archive: Sequence[Attempt]
    incumbent: int
    """Generation number of the incumbent."""
    generations_left: int
    """How many more candidates may be made."""
    trainable: str | None
    """None if weights can be updated, else the reason why not."""
    probe: RewardProbe | None = None
    causes: Mapping[Cause, int] = field(default_factory=dict)
    """How the last candidate's dev episodes ended."""


class ScaffoldDraft(BaseModel):
    """A Scaffold that somebody wrote: relative path -> text. `recipe` is the author's own record of its choices."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    files: dict[str, str]
    note: str
    recipe: dict[str, JsonValue] | None = None


class Decision(BaseModel):
    """What happens next and why. `draft` for HARNESS, `settings` for WEIGHTS, neither for STOP."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    lever: Lever
    reasons: tuple[str, ...]
    draft: ScaffoldDraft | None = None
    settings: TrainSettings | None = None


SHOT_POOL = 64
"""The first so many train examples are the ones that Scaffolds may show as few-shot examples. Trials, probes and weight
updates draw from the rest, so that nothing is asked that stands in the prompt."""


@dataclass(frozen=True)
class TrialResult:
    """How a draft did on a few train problems: rewards in the problems' order, and how its Episodes ended."""

    rewards: tuple[float, ...]
    causes: Mapping[Cause, int]


class TryOut(Protocol):
    """Runs drafts on the same `problems` train problems (in the sandbox, recorded, under the incumbent's weights)
    and returns a result for each. Costs no gate: train may be learned from."""

    def __call__(self, drafts: Sequence[ScaffoldDraft], problems: int) -> Sequence[TrialResult]: ...


class MetaAgent(Protocol):
    """Writes the first Scaffold of a run from the task's public text and train examples."""

    def first_scaffold(self, task: TaskSpec, examples: Sequence[Example], seed: int) -> ScaffoldDraft: ...


class FeedbackAgent(Protocol):
    """Decides from evidence. Deterministic in (evidence, seed): a resumed run decides the same again."""

    def needs_probe(self, evidence: Evidence) -> bool:
        """True if the decision depends on how rewards vary at temperature 1; the loop then fills `probe` in."""
        ...

    def decide(self, evidence: Evidence, examples: Sequence[Example], seed: int, try_out: TryOut) -> Decision: ...
