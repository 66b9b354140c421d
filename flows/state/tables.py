"""The tables: what a Run did, row by row, so that it can be resumed, shown and audited.

Rows are written in one place each (`flows.state.store` and `flows.state.calls`); everything else reads records. Status
columns are plain strings (an SQL enum would store member names in a fixed width); times are timezone-aware UTC;
JSON columns are reassigned, never edited in place.

Every piece of work has a row before it is done (its intent) and is found again by its key:

    Generation    (run, number)
    Rollout       (run, slot, scaffold, adapter)      slot: "dev/03", "train/gen-05/iter-02", "test", ...
    Episode       (rollout, problem, sample)
    ModelCall     (episode, request digest, occurrence)
    TrainingStep  (weight update, iteration)
    GateVerdict   (run, gate)
    Decision      (run, after generation)
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum

from pydantic import JsonValue
from sqlalchemy import JSON, BigInteger, Column, DateTime, LargeBinary, UniqueConstraint
from sqlmodel import Field, SQLModel


def now() -> datetime:
    """The present moment, timezone-aware."""
    return datetime.now(UTC)


def _json(nullable: bool = True) -> Column[JsonValue]:
    return Column(JSON, nullable=nullable)


def _time(nullable: bool = False) -> Column[datetime]:
    return Column(DateTime(timezone=True), nullable=nullable)


class RunStatus(StrEnum):
    """Where a Run stands. Only RUNNING has an owner; INTERRUPTED and FAILED can be resumed."""

    CREATED = "created"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    FINISHED = "finished"


class WorkStatus(StrEnum):
    """Where a piece of work stands: intended, or durably done."""

    INTENDED = "intended"
    DONE = "done"
    FAILED = "failed"


class RunRow(SQLModel, table=True):
    """One `sia run`: a task, a profile, a seed and the settings frozen with them."""

    __tablename__ = "runs"
    id: str = Field(primary_key=True, description="The name given by --name, or made from task and number.")
    task: str = Field(description="Name of a built-in task or path of a task folder.")
    task_digest: str = Field(description="sha256 over the task folder, so that a moved level is noticed.")
    profile: str
    seed: int
    settings: JsonValue = Field(sa_column=_json(False))
    status: str = RunStatus.CREATED
    flow_run_id: str | None = None
    owner: str | None = Field(default=None, description="host:pid of the process that works on it.")
    error: str | None = None
    created_at: datetime = Field(default_factory=now, sa_column=_time())
    finished_at: datetime | None = Field(default=None, sa_column=_time(True))
    active_s: float = Field(default=0.0, description="Seconds some process worked on it, kills included roughly.")


class ScaffoldRow(SQLModel, table=True):
    """A Scaffold: a content-addressed folder of files under `scaffolds/`."""

    __tablename__ = "scaffolds"
    id: str = Field(primary_key=True, description="sha256 of its files.")
    kind: str
    note: str
    created_at: datetime = Field(default_factory=now, sa_column=_time())


class AdapterRow(SQLModel, table=True):
    """LoRA weights: a content-addressed PEFT folder under `adapters/`."""

    __tablename__ = "adapters"
    id: str = Field(primary_key=True, description="sha256 of its files.")
    base_model: str
    parent_id: str | None = Field(default=None, foreign_key="adapters.id")
    created_at: datetime = Field(default_factory=now, sa_column=_time())


class GenerationRow(SQLModel, table=True):
    """One candidate: Scaffold + Adapter, with its parent. `accepted` is None until the gate has spoken."""

    __tablename__ = "generations"
    __table_args__ = (UniqueConstraint("run_id", "number"),)
    id: int | None = Field(default=None, primary_key=True)
    run_id: str = Field(foreign_key="runs.id", index=True)
    number: int
    parent: int | None = None
    lever: str
    status: str = WorkStatus.INTENDED
    scaffold_id: str | None = Field(default=None, foreign_key="scaffolds.id")
    adapter_id: str | None = Field(default=None, foreign_key="adapters.id")
    objective: str | None = None
    accepted: bool | None = None
    note: str = ""
    recipe: JsonValue = Field(
        default=None,
        sa_column=_json(),
        description="The author's record of the scaffold and of the trials that led to it. It belongs to the Run: the "
        "same files may come out of another Run for other reasons.",
    )
    created_at: datetime = Field(default_factory=now, sa_column=_time())


class RolloutRow(SQLModel, table=True):
    """A set of Episodes of one (Scaffold, Adapter) on listed problems, for one purpose."""

    __tablename__ = "rollouts"
    __table_args__ = (UniqueConstraint("run_id", "slot", "scaffold_id", "adapter_key"),)
    id: int | None = Field(default=None, primary_key=True)
    run_id: str = Field(foreign_key="runs.id", index=True)
    slot: str = Field(description="What it is for and which block: dev/03, trial/gen-04, train/gen-05/iter-02, test.")
    scaffold_id: str = Field(foreign_key="scaffolds.id")
    adapter_key: str = Field(default="", description="Adapter id, or empty for the base model.")
    generation: int = Field(description="The Generation that caused it.")
    split: str
    train_policy: bool = Field(default=False, description="Temperature 1 and top-p 1 forced, for training.")
    episodes: int
    status: str = WorkStatus.INTENDED
    created_at: datetime = Field(default_factory=now, sa_column=_time())
    finished_at: datetime | None = Field(default=None, sa_column=_time(True))


class EpisodeRow(SQLModel, table=True):
    """One attempt at one Problem. Done once its ending is a measurement; infrastructure failures only count up."""

    __tablename__ = "episodes"
    __table_args__ = (UniqueConstraint("rollout_id", "problem_id", "sample"),)
    id: int | None = Field(default=None, primary_key=True)
    rollout_id: int = Field(foreign_key="rollouts.id", index=True)
    problem_id: str
    sample: int
    shard: int
    seed: int = Field(sa_column=Column(BigInteger, nullable=False), description="Keys all its draws; below 2**53.")
    status: str = WorkStatus.INTENDED
    cause: str | None = None
    answer: JsonValue = Field(default=None, sa_column=_json())
    events: JsonValue = Field(default=None, sa_column=_json())
    detail: str = ""
    wall_s: float = 0.0
    infrastructure_failures: int = 0
    finished_at: datetime | None = Field(default=None, sa_column=_time(True))


class ModelCallRow(SQLModel, table=True):
    """One call of an Episode: as asked, as sent, as sampled."""

    __tablename__ = "model_calls"
    __table_args__ = (UniqueConstraint("episode_id", "digest", "occurrence"),)
    id: int | None = Field(default=None, primary_key=True)
    episode_id: int = Field(foreign_key="episodes.id", index=True)
    problem_id: str | None = Field(default=None, description="None: not attributed, so never trained on.")
    digest: str
    occurrence: int
    status: str = WorkStatus.INTENDED
    sends: int = Field(default=1, description="How often it was sent; above 1 only after a kill or a failure.")
    asked: JsonValue = Field(default=None, sa_column=_json())
    effective: JsonValue = Field(default=None, sa_column=_json())
    request: JsonValue = Field(default=None, sa_column=_json())
    adapter_id: str | None = None
    text: str | None = None
    finish_reason: str | None = None
    prompt_ids: bytes | None = Field(default=None, sa_column=Column(LargeBinary))
    completion_ids: bytes | None = Field(default=None, sa_column=Column(LargeBinary))
    logprobs: bytes | None = Field(default=None, sa_column=Column(LargeBinary))
    prompt_tokens: int = 0
    completion_tokens: int = 0
    wall_s: float = 0.0
    error: str | None = None
    created_at: datetime = Field(default_factory=now, sa_column=_time())


class ScoreRow(SQLModel, table=True):
    """The verifier's word on one Episode."""

    __tablename__ = "scores"
    episode_id: int = Field(primary_key=True, foreign_key="episodes.id")
    reward: float
    reason: str


class DecisionRow(SQLModel, table=True):
    """What the Feedback-Agent decided after a Generation, on what evidence, and why."""

    __tablename__ = "decisions"
    __table_args__ = (UniqueConstraint("run_id", "after_generation"),)
    id: int | None = Field(default=None, primary_key=True)
    run_id: str = Field(foreign_key="runs.id", index=True)
    after_generation: int
    lever: str
    reasons: JsonValue = Field(sa_column=_json(False))
    scaffold_id: str | None = Field(default=None, foreign_key="scaffolds.id")
    note: str = ""
    recipe: JsonValue = Field(default=None, sa_column=_json())
    settings: JsonValue = Field(default=None, sa_column=_json())
    evidence: JsonValue = Field(default=None, sa_column=_json())
    created_at: datetime = Field(default_factory=now, sa_column=_time())


class WeightUpdateRow(SQLModel, table=True):
    """One pull of the weight lever: an Objective, its settings, and the Adapter that came of it."""

    __tablename__ = "weight_updates"
    __table_args__ = (UniqueConstraint("run_id", "generation"),)
    id: int | None = Field(default=None, primary_key=True)
    run_id: str = Field(foreign_key="runs.id", index=True)
    generation: int
    objective: str
    settings: JsonValue = Field(sa_column=_json(False))
    start_adapter_id: str | None = Field(default=None, foreign_key="adapters.id")
    adapter_id: str | None = Field(default=None, foreign_key="adapters.id")
    status: str = WorkStatus.INTENDED
    created_at: datetime = Field(default_factory=now, sa_column=_time())


class TrainingStepRow(SQLModel, table=True):
    """One committed iteration of a WeightUpdate. `adapter_id` is the Adapter after it; the checkpoint is on disk."""

    __tablename__ = "training_steps"
    __table_args__ = (UniqueConstraint("weight_update_id", "iteration"),)
    id: int | None = Field(default=None, primary_key=True)
    weight_update_id: int = Field(foreign_key="weight_updates.id", index=True)
    iteration: int
    rollout_id: int = Field(foreign_key="rollouts.id")
    adapter_id: str = Field(foreign_key="adapters.id")
    report: JsonValue = Field(sa_column=_json(False))
    wall_s: float
    created_at: datetime = Field(default_factory=now, sa_column=_time())


class GateVerdictRow(SQLModel, table=True):
    """The gate's word on one candidate against the incumbent, on the same problems."""

    __tablename__ = "gate_verdicts"
    __table_args__ = (UniqueConstraint("run_id", "gate"),)
    id: int | None = Field(default=None, primary_key=True)
    run_id: str = Field(foreign_key="runs.id", index=True)
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
    minimum_detectable: float = Field(description="1 if so few problems can show no difference at all.")
    text: str
    created_at: datetime = Field(default_factory=now, sa_column=_time())


class TestReadRow(SQLModel, table=True):
    """Every read of the sealed test, recorded before it happens."""

    __tablename__ = "test_reads"
    __table_args__ = (UniqueConstraint("run_id", "arm"),)
    id: int | None = Field(default=None, primary_key=True)
    run_id: str = Field(foreign_key="runs.id", index=True)
    arm: str = Field(description="initial, harness_only or winner.")
    generation: int
    rollout_id: int = Field(foreign_key="rollouts.id")
    created_at: datetime = Field(default_factory=now, sa_column=_time())


class SpendingRow(SQLModel, table=True):
    """What a step cost. One row a (run, step key, kind); amounts are in the kind's own unit."""

    __tablename__ = "spending"
    __table_args__ = (UniqueConstraint("run_id", "step", "kind"),)
    id: int | None = Field(default=None, primary_key=True)
    run_id: str = Field(foreign_key="runs.id", index=True)
    generation: int
    step: str
    kind: str = Field(description="prompt_tokens, completion_tokens, episode_s or train_s.")
    amount: float
    created_at: datetime = Field(default_factory=now, sa_column=_time())
