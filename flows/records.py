"""What a reader of a Run gets: frozen records, free of the database, that screens and reports are made from.

`flows.views` fills them; `flows.present`, `flows.report` and `flows.artifacts` show them. Rewards lie in [0, 1],
differences in [-1, 1], intervals are 95 %, times are timezone-aware UTC.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, JsonValue

from agents.archive import Estimate
from flows.settings import SandboxKind
from tasks.contract import Baseline

HISTOGRAM_BINS = 10
"""Equal bins over [0, 1] of every reward histogram; a reward of exactly 1 falls into the last."""


KILLED = "killed"
"""Shown instead of "running" for a Run whose process is gone without a word; the tables cannot know of it."""


class ArmName(NamedTuple):
    """How an arm of the sealed test is called: `short` in tables, `what` in words."""

    short: str
    what: str


ARMS: Mapping[str, ArmName] = {
    "initial": ArmName("initial", "first scaffold, base weights"),
    "harness_only": ArmName("H", "best harness-only candidate, picked on dev"),
    "winner": ArmName("W+H", "winner of the whole run"),
}
"""The arms of the sealed test, in the order in which they are scored and shown."""


class UnknownRun(Exception):
    """Raised when no Run (or no Episode) has the name that was asked for; the message lists what there is."""


class Record(BaseModel):
    """A frozen record."""

    model_config = ConfigDict(frozen=True)


class BlockView(Record):
    """One Rollout of a Generation on a block of dev problems. `estimate` is None until every Episode is in."""

    slot: str
    episodes: int
    done: int
    estimate: Estimate | None


class TrialView(Record):
    """A draft that was tried out on train problems before a gate was spent."""

    scaffold_id: str
    note: str
    episodes: int
    done: int
    estimate: Estimate | None


class ProbeView(Record):
    """Rewards at temperature 1 on train problems: can an objective learn from them? A group is one problem's
    samples; it is alive if its rewards differ. `histogram` counts groups by their mean reward."""

    groups: int
    samples: int
    alive: int
    mean: float
    histogram: tuple[int, ...]


class EpisodeBrief(Record):
    """Enough of an Episode to decide whether to look at it. `reward` is None without a Score."""

    id: int
    slot: str
    problem_id: str
    cause: str | None
    reward: float | None


class GenerationView(Record):
    """One candidate and how it did. `dev` pools all its dev blocks by problem; what steered the search leans
    upwards for those that were chosen, so only the sealed test is to be believed."""

    number: int
    parent: int | None
    lever: str
    status: str
    accepted: bool | None
    note: str
    objective: str | None
    scaffold_id: str | None
    adapter_id: str | None
    blocks: tuple[BlockView, ...]
    dev: Estimate | None
    histogram: tuple[int, ...]
    causes: Mapping[str, int]
    trials: tuple[TrialView, ...]
    probe: ProbeView | None
    samples: tuple[EpisodeBrief, ...]
    """A few of its dev Episodes, wrong ones first, as an entrance to the trajectories."""


class VerdictView(Record):
    """The gate's word on one candidate against the incumbent, paired by problem."""

    gate: int
    generation: int
    incumbent: int
    slot: str
    accepted: bool
    n: int
    difference: float
    low: float
    high: float
    p_value: float
    alpha: float
    minimum_detectable: float
    text: str


class DecisionView(Record):
    """What was decided after a Generation, on what evidence, and why."""

    after_generation: int
    lever: str
    reasons: tuple[str, ...]
    scaffold_id: str | None
    settings: JsonValue
    evidence: JsonValue


class StepView(Record):
    """One committed iteration of a WeightUpdate; what the trainer did not report is None."""

    iteration: int
    mean_reward: float | None
    groups: int | None
    groups_alive: int | None
    loss: float | None
    kl: float | None
    """Estimated KL from the policy that sampled to the weights of the last pass, nats a token."""
    entropy: float | None
    """Mean -logprob of the sampled tokens, nats: falls towards 0 as the answers collapse to one."""
    skipped: str | None
    """Why this iteration took no step, e.g. because no group's rewards differed."""
    wall_s: float
    report: JsonValue


class WeightUpdateView(Record):
    """One pull of the weight lever. `iterations` is what was planned, `steps` what is done."""

    generation: int
    objective: str
    status: str
    settings: JsonValue
    iterations: int | None
    start_adapter_id: str | None
    adapter_id: str | None
    steps: tuple[StepView, ...]


class TestArm(Record):
    """One arm of the sealed test. n is fixed when the rollout is made: a missing answer counts 0."""

    arm: str
    words: str
    generation: int
    rollout_id: int
    n: int
    mean: float
    low: float
    high: float
    method: str


class Difference(Record):
    """Mean of (left - right) over the same test problems. `same` if both arms are one and the same candidate."""

    left: str
    right: str
    n: int
    mean: float
    low: float
    high: float
    method: str
    same: bool

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval leaves 0 out."""
        return not self.same and (self.low > 0 or self.high < 0)


class EvaluationView(Record):
    """A Rollout asked for by `sia eval`: one Scaffold (and Adapter) on one split, nothing else."""

    slot: str
    split: str
    scaffold_id: str
    adapter_id: str | None
    episodes: int
    done: int
    estimate: Estimate | None


class PhaseSpending(Record):
    """What one kind of rollout cost, from the recorded Episodes and ModelCalls."""

    phase: str
    episodes: int
    calls: int
    prompt_tokens: int
    completion_tokens: int
    resent: int
    """Calls sent once more after a kill or a failure: paid twice, booked so."""


class Spending(Record):
    """What the Run cost. Tokens come from the recorded calls, seconds and money from the booked steps."""

    phases: tuple[PhaseSpending, ...]
    episodes: int
    calls: int
    prompt_tokens: int
    completion_tokens: int
    resent: int
    sandbox_s: float
    train_s: float
    wall_s: float
    usd: float
    by_generation: Mapping[int, Mapping[str, float]]
    """Generation -> kind -> amount, as booked."""


class OpenWork(Record):
    """Work that was intended and is not done: what a resumed Run goes on with."""

    what: str
    done: int
    total: int | None
    accuracy: float | None = None
    """Mean reward so far, for rollouts."""


class RunView(Record):
    """Everything that screens and reports say about one Run."""

    id: str
    task: str
    title: str
    metric: str
    profile: str
    seed: int
    sandbox: SandboxKind
    deterministic: bool
    status: str
    error: str | None
    created_at: datetime
    finished_at: datetime | None
    active_s: float
    settings: JsonValue
    flow_run_id: str | None
    generations: tuple[GenerationView, ...]
    verdicts: tuple[VerdictView, ...]
    decisions: tuple[DecisionView, ...]
    weight_updates: tuple[WeightUpdateView, ...]
    test: tuple[TestArm, ...]
    test_differences: tuple[Difference, ...]
    evaluations: tuple[EvaluationView, ...]
    baselines: tuple[Baseline, ...]
    """`score` of a Baseline is in percent, as papers print it."""
    spending: Spending
    open_work: tuple[OpenWork, ...]

    def generation(self, number: int) -> GenerationView | None:
        """The Generation of that number, or None."""
        return next((g for g in self.generations if g.number == number), None)

    def verdict_on(self, number: int) -> VerdictView | None:
        """The gate's last word on a Generation, or None where it was not asked."""
        return next((v for v in reversed(self.verdicts) if v.generation == number), None)

    def arm(self, name: str) -> TestArm | None:
        """An arm of the sealed test, or None while it is not scored."""
        return next((a for a in self.test if a.arm == name), None)

    @property
    def incumbent(self) -> int | None:
        """Number of the last accepted Generation."""
        return max((g.number for g in self.generations if g.accepted), default=None)


class RunSummary(Record):
    """One line of `sia list`."""

    id: str
    task: str
    profile: str
    seed: int
    status: str
    sandbox: SandboxKind
    generations: int
    accepted: int
    winner: float | None
    """Mean reward of the winner on the sealed test, once scored."""
    created_at: datetime
    active_s: float


class CallView(Record):
    """One ModelCall of an Episode: as asked by the Scaffold, as sent, as sampled."""

    id: int
    status: str
    sends: int
    problem_id: str | None
    asked: JsonValue
    effective: JsonValue
    messages: tuple[tuple[str, str], ...]
    """(role, content) of each chat turn; empty for a raw prompt."""
    prompt: str | None
    adapter_id: str | None
    text: str | None
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    wall_s: float
    error: str | None


class EpisodeView(Record):
    """A Trajectory: one Episode with its ModelCalls, events, answer and Score. No gold answer is in the tables."""

    id: int
    run_id: str
    sandbox: SandboxKind
    slot: str
    split: str
    generation: int
    train_policy: bool
    scaffold_id: str
    adapter_id: str | None
    problem_id: str
    sample: int
    seed: int
    status: str
    cause: str | None
    answer: JsonValue
    detail: str
    reward: float | None
    reason: str | None
    events: tuple[JsonValue, ...]
    wall_s: float
    infrastructure_failures: int
    calls: tuple[CallView, ...]
