"""Reading a Run: read-only queries that turn tables into the records of `flows.records`.

    view = run_view(db, "chain-sum-1")      # everything about one Run, in a fixed number of queries
    list_runs(db)                           # a line for each Run
    episode_view(db, 4711)                  # one Trajectory

What the numbers guarantee:
- denominators are fixed: a Rollout's n is what was intended, and once it is done an Episode without a Score counts 0;
- nothing is estimated from an unfinished Rollout, where the quick Episodes are in and the slow ones are not;
- several samples of a Problem are averaged first, so that n counts Problems, which are independent, not samples;
- test differences are paired by Problem.
What they do not: dev estimates steered the search, so those of accepted candidates lean upwards.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from pydantic import JsonValue
from sqlalchemy import case, func
from sqlmodel import Session, col, select

from agents.archive import Lever
from flows.measured import (
    Measured,
    difference,
    estimate_rewards,
    histogram,
    interval_method,
    pool,
    probe_view,
    read_rollouts,
)
from flows.records import (
    BlockView,
    CallView,
    DecisionView,
    Difference,
    EpisodeView,
    EvaluationView,
    GenerationView,
    OpenWork,
    PhaseSpending,
    RunSummary,
    RunView,
    Spending,
    StepView,
    TestArm,
    TrialView,
    VerdictView,
    WeightUpdateView,
)
from flows.settings import SandboxKind
from flows.state.database import Database
from flows.state.tables import (
    DecisionRow,
    EpisodeRow,
    GateVerdictRow,
    GenerationRow,
    ModelCallRow,
    RolloutRow,
    RunRow,
    ScaffoldRow,
    ScoreRow,
    SpendingRow,
    TestReadRow,
    TrainingStepRow,
    WeightUpdateRow,
    WorkStatus,
)
from tasks.contract import Baseline, TaskError
from tasks.loader import find_folder, load_spec

ARMS: Mapping[str, str] = {
    "initial": "first scaffold, base weights",
    "harness_only": "best harness-only candidate, picked on dev",
    "winner": "winner of the whole run",
}
"""The arms of the sealed test in the order of the table, and what each is in words."""

CONTRASTS = (("harness_only", "initial"), ("winner", "harness_only"), ("winner", "initial"))
"""The paired differences that are reported: (left, right) means left - right."""

PHASES: Mapping[str, str] = {
    "dev": "gates on dev",
    "trial": "drafts tried out on train",
    "probe": "probes at temperature 1",
    "train": "training rollouts",
    "test": "sealed test",
    "eval": "evaluations",
}
"""First part of a Rollout's slot -> what it was for, in the order of the spending table."""


class UnknownRun(Exception):
    """Raised when no Run (or no Episode) has the name that was asked for; the message lists what there is."""


def list_runs(db: Database) -> list[RunSummary]:
    """All Runs, the newest first."""
    with db.session() as session:
        runs = session.exec(select(RunRow).order_by(col(RunRow.created_at).desc(), col(RunRow.id))).all()
        counts = {
            run_id: (made, accepted)
            for run_id, made, accepted in session.exec(
                select(
                    GenerationRow.run_id,
                    func.count(),
                    func.sum(case((col(GenerationRow.accepted).is_(True), 1), else_=0)),
                ).group_by(GenerationRow.run_id)
            )
        }
        winners = {
            run_id: float(total or 0.0) / episodes
            for run_id, episodes, total in session.exec(
                select(TestReadRow.run_id, RolloutRow.episodes, func.sum(ScoreRow.reward))
                .join(RolloutRow, col(RolloutRow.id) == TestReadRow.rollout_id)
                .join(EpisodeRow, col(EpisodeRow.rollout_id) == RolloutRow.id)
                .join(ScoreRow, col(ScoreRow.episode_id) == EpisodeRow.id, isouter=True)
                .where(TestReadRow.arm == "winner", RolloutRow.status == WorkStatus.DONE)
                .group_by(TestReadRow.run_id, col(RolloutRow.episodes))
            )
            if episodes
        }
    return [
        RunSummary(
            id=run.id,
            task=run.task,
            profile=run.profile,
            seed=run.seed,
            status=run.status,
            sandbox=_sandbox(run.settings),
            generations=counts.get(run.id, (0, 0))[0],
            accepted=int(counts.get(run.id, (0, 0))[1] or 0),
            winner=winners.get(run.id),
            created_at=_utc(run.created_at),
            active_s=run.active_s,
        )
        for run in runs
    ]


def run_view(db: Database, run_id: str) -> RunView:
    """Everything about one Run; the number of queries does not grow with its Episodes.

    Raises:
        UnknownRun: no Run of that name; the message lists those that there are.
    """
    with db.session() as session:
        run = session.get(RunRow, run_id)
        if run is None:
            raise UnknownRun(_no_such_run(session, run_id))
        rollouts = read_rollouts(session, run_id)
        updates = _weight_updates(session, run_id)
        title, metric, baselines = _task_words(run.task)
        generations = _generations(session, run_id, rollouts)
        arms, reading = _test_arms(session, run_id, rollouts, generations)
        return RunView(
            id=run.id,
            task=run.task,
            title=title,
            metric=metric,
            profile=run.profile,
            seed=run.seed,
            sandbox=_sandbox(run.settings),
            deterministic=_mapping(run.settings).get("deterministic") is True,
            status=run.status,
            error=run.error,
            created_at=_utc(run.created_at),
            finished_at=None if run.finished_at is None else _utc(run.finished_at),
            active_s=run.active_s,
            settings=run.settings,
            flow_run_id=run.flow_run_id,
            generations=generations,
            verdicts=_verdicts(session, run_id),
            decisions=_decisions(session, run_id),
            weight_updates=updates,
            test=arms,
            test_differences=_differences(reading),
            evaluations=_evaluations(rollouts),
            baselines=baselines,
            spending=_spending(session, run, rollouts, updates),
            open_work=_open_work(generations, rollouts, updates),
        )


def episode_view(db: Database, episode_id: int) -> EpisodeView:
    """One Trajectory: the Episode, its ModelCalls in the order in which they were made, and its Score.

    Raises:
        UnknownRun: no Episode has that number.
    """
    with db.session() as session:
        found = session.exec(
            select(EpisodeRow, RolloutRow, RunRow, ScoreRow)
            .join(RolloutRow, col(RolloutRow.id) == EpisodeRow.rollout_id)
            .join(RunRow, col(RunRow.id) == RolloutRow.run_id)
            .join(ScoreRow, col(ScoreRow.episode_id) == EpisodeRow.id, isouter=True)
            .where(EpisodeRow.id == episode_id)
        ).first()
        if found is None:
            raise UnknownRun(f"no episode {episode_id}; `sia show RUN --generation N` lists some numbers")
        episode, rollout, run, score = found
        calls = session.exec(
            select(ModelCallRow).where(ModelCallRow.episode_id == episode_id).order_by(col(ModelCallRow.id))
        ).all()
        events = episode.events if isinstance(episode.events, list) else []
        return EpisodeView(
            id=episode_id,
            run_id=run.id,
            sandbox=_sandbox(run.settings),
            slot=rollout.slot,
            split=rollout.split,
            generation=rollout.generation,
            train_policy=rollout.train_policy,
            scaffold_id=rollout.scaffold_id,
            adapter_id=rollout.adapter_key or None,
            problem_id=episode.problem_id,
            sample=episode.sample,
            seed=episode.seed,
            status=episode.status,
            cause=episode.cause,
            answer=episode.answer,
            detail=episode.detail,
            reward=None if score is None else score.reward,
            reason=None if score is None else score.reason,
            events=tuple(events),
            wall_s=episode.wall_s,
            infrastructure_failures=episode.infrastructure_failures,
            calls=tuple(_call(call) for call in calls),
        )


def _no_such_run(session: Session, run_id: str) -> str:
    known = session.exec(select(RunRow.id).order_by(col(RunRow.created_at).desc()).limit(20)).all()
    there = f"there are: {', '.join(known)}" if known else "there is none yet; start one with `sia run TASK`"
    return f"no run '{run_id}'; {there}"


def _generations(session: Session, run_id: str, rollouts: Sequence[Measured]) -> tuple[GenerationView, ...]:
    """Generations with what was measured of each. Those with the same (Scaffold, Adapter) share dev Rollouts."""
    rows = session.exec(
        select(GenerationRow).where(GenerationRow.run_id == run_id).order_by(col(GenerationRow.number))
    ).all()
    notes = _scaffold_notes(session, run_id)
    dev: dict[tuple[str, str], list[Measured]] = defaultdict(list)
    aside: dict[tuple[str, int], list[Measured]] = defaultdict(list)
    for rollout in rollouts:
        phase, _, rest = rollout.row.slot.partition("/")
        if phase == "dev":
            dev[rollout.row.scaffold_id, rollout.row.adapter_key].append(rollout)
        elif phase in ("trial", "probe"):
            aside[phase, _generation_of(rest, rollout.row.generation)].append(rollout)
    views = []
    for row in rows:
        # Until it is trained, a weight update's candidate has no Adapter and must not pass for its parent.
        made = row.status == WorkStatus.DONE or row.lever != Lever.WEIGHTS
        blocks = dev.get((row.scaffold_id or "", row.adapter_id or ""), []) if made else []
        pooled = pool(block for block in blocks if block.complete)
        causes: dict[str, int] = defaultdict(int)
        for block in blocks:
            for cause, count in block.causes.items():
                causes[cause] += count
        samples = sorted(blocks[-1].briefs if blocks else (), key=lambda brief: brief.reward or 0.0)
        probes = [probe for probe in aside["probe", row.number] if probe.complete]
        views.append(
            GenerationView(
                number=row.number,
                parent=row.parent,
                lever=row.lever,
                status=row.status,
                accepted=row.accepted,
                note=row.note,
                objective=row.objective,
                scaffold_id=row.scaffold_id,
                adapter_id=row.adapter_id,
                blocks=tuple(
                    BlockView(
                        slot=block.row.slot,
                        episodes=block.row.episodes,
                        done=block.done,
                        estimate=block.estimate(),
                    )
                    for block in blocks
                ),
                dev=estimate_rewards(pooled) if pooled else None,
                histogram=histogram(pooled),
                causes=dict(sorted(causes.items(), key=lambda item: -item[1])),
                trials=tuple(
                    TrialView(
                        scaffold_id=trial.row.scaffold_id,
                        note=notes.get(trial.row.scaffold_id, ""),
                        episodes=trial.row.episodes,
                        done=trial.done,
                        estimate=trial.estimate(),
                    )
                    for trial in aside["trial", row.number]
                ),
                probe=probe_view(probes[-1]) if probes else None,
                samples=tuple(samples),
            )
        )
    return tuple(views)


def _scaffold_notes(session: Session, run_id: str) -> dict[str, str]:
    """Scaffold id -> its author's note, for the Scaffolds that the Run rolled out."""
    used = select(RolloutRow.scaffold_id).where(RolloutRow.run_id == run_id).distinct()
    rows = session.exec(select(ScaffoldRow.id, ScaffoldRow.note).where(col(ScaffoldRow.id).in_(used)))
    return dict(iter(rows))


def _generation_of(rest: str, fallback: int) -> int:
    """7 of "gen-07/iter-02"; the Rollout's own generation if the slot does not say."""
    number = rest.partition("/")[0].removeprefix("gen-")
    return int(number) if number.isdecimal() else fallback


def _verdicts(session: Session, run_id: str) -> tuple[VerdictView, ...]:
    rows = session.exec(
        select(GateVerdictRow).where(GateVerdictRow.run_id == run_id).order_by(col(GateVerdictRow.gate))
    )
    return tuple(VerdictView.model_validate(row, from_attributes=True) for row in rows)


def _decisions(session: Session, run_id: str) -> tuple[DecisionView, ...]:
    rows = session.exec(
        select(DecisionRow).where(DecisionRow.run_id == run_id).order_by(col(DecisionRow.after_generation))
    )
    return tuple(
        DecisionView(
            after_generation=row.after_generation,
            lever=row.lever,
            reasons=tuple(str(reason) for reason in row.reasons) if isinstance(row.reasons, list) else (),
            scaffold_id=row.scaffold_id,
            settings=row.settings,
            evidence=row.evidence,
        )
        for row in rows
    )


def _weight_updates(session: Session, run_id: str) -> tuple[WeightUpdateView, ...]:
    steps: dict[int, list[StepView]] = defaultdict(list)
    for step in session.exec(
        select(TrainingStepRow)
        .join(WeightUpdateRow, col(WeightUpdateRow.id) == TrainingStepRow.weight_update_id)
        .where(WeightUpdateRow.run_id == run_id)
        .order_by(col(TrainingStepRow.iteration))
    ):
        report = _mapping(step.report)
        steps[step.weight_update_id].append(
            StepView(
                iteration=step.iteration,
                mean_reward=_number(report.get("mean_reward")),
                groups=_whole(report.get("groups")),
                groups_alive=_whole(report.get("groups_alive")),
                loss=_number(report.get("loss")),
                kl=_number(report.get("kl")),
                entropy=_number(report.get("entropy")),
                skipped=None if report.get("skipped") is None else str(report["skipped"]),
                wall_s=step.wall_s,
                report=step.report,
            )
        )
    rows = session.exec(
        select(WeightUpdateRow).where(WeightUpdateRow.run_id == run_id).order_by(col(WeightUpdateRow.generation))
    )
    return tuple(
        WeightUpdateView(
            generation=row.generation,
            objective=row.objective,
            status=row.status,
            settings=row.settings,
            iterations=_whole(_mapping(row.settings).get("iterations")),
            start_adapter_id=row.start_adapter_id,
            adapter_id=row.adapter_id,
            steps=tuple(steps[row.id or 0]),
        )
        for row in rows
    )


def _test_arms(
    session: Session, run_id: str, rollouts: Sequence[Measured], generations: Sequence[GenerationView]
) -> tuple[tuple[TestArm, ...], dict[str, Measured]]:
    """The finished arms in the order of ARMS, and their Rollouts; two arms may share one."""
    weighted = {generation.number for generation in generations if generation.adapter_id}
    by_id = {rollout.row.id: rollout for rollout in rollouts}
    reads = {read.arm: read for read in session.exec(select(TestReadRow).where(TestReadRow.run_id == run_id))}
    arms: list[TestArm] = []
    finished: dict[str, Measured] = {}
    for arm, what in ARMS.items():
        words = what
        read = reads.get(arm)
        rollout = by_id.get(read.rollout_id) if read else None
        estimate = rollout.estimate() if rollout else None
        if read is None or rollout is None or estimate is None:
            continue
        if arm == "winner" and read.generation not in weighted:
            kept = "harness_only" in finished and finished["harness_only"] is rollout
            words += ": H itself" if kept else " (base weights)"
        finished[arm] = rollout
        arms.append(
            TestArm(
                arm=arm,
                words=words,
                generation=read.generation,
                rollout_id=read.rollout_id,
                n=estimate.n,
                mean=estimate.mean,
                low=estimate.low,
                high=estimate.high,
                method=interval_method(rollout.rewards().values()),
            )
        )
    return tuple(arms), finished


def _differences(arms: Mapping[str, Measured]) -> tuple[Difference, ...]:
    return tuple(
        difference(left, right, arms[left], arms[right]) for left, right in CONTRASTS if left in arms and right in arms
    )


def _evaluations(rollouts: Sequence[Measured]) -> tuple[EvaluationView, ...]:
    return tuple(
        EvaluationView(
            slot=rollout.row.slot,
            split=rollout.row.split,
            scaffold_id=rollout.row.scaffold_id,
            adapter_id=rollout.row.adapter_key or None,
            episodes=rollout.row.episodes,
            done=rollout.done,
            estimate=rollout.estimate(),
        )
        for rollout in rollouts
        if rollout.row.slot.startswith("eval/")
    )


def _spending(
    session: Session, run: RunRow, rollouts: Sequence[Measured], updates: Sequence[WeightUpdateView]
) -> Spending:
    calls = {
        rollout_id: (int(count), int(prompt or 0), int(completion or 0), int(sends or 0) - int(count))
        for rollout_id, count, prompt, completion, sends in session.execute(
            select(  # type: ignore[call-overload]
                EpisodeRow.rollout_id,
                func.count(),
                func.sum(ModelCallRow.prompt_tokens),
                func.sum(ModelCallRow.completion_tokens),
                func.sum(ModelCallRow.sends),
            )
            .join(EpisodeRow, col(EpisodeRow.id) == ModelCallRow.episode_id)
            .join(RolloutRow, col(RolloutRow.id) == EpisodeRow.rollout_id)
            .where(RolloutRow.run_id == run.id)
            .group_by(EpisodeRow.rollout_id)
        )
    }
    phases = []
    for phase, words in PHASES.items():
        of_phase = [rollout for rollout in rollouts if rollout.row.slot.partition("/")[0] == phase]
        if not of_phase:
            continue
        sums = [sum(column) for column in zip(*(calls.get(r.row.id, (0, 0, 0, 0)) for r in of_phase), strict=True)]
        phases.append(
            PhaseSpending(
                phase=words,
                episodes=sum(rollout.done for rollout in of_phase),
                calls=sums[0],
                prompt_tokens=sums[1],
                completion_tokens=sums[2],
                resent=sums[3],
            )
        )
    booked: dict[str, float] = defaultdict(float)
    by_generation: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for row in session.exec(select(SpendingRow).where(SpendingRow.run_id == run.id)):
        booked[row.kind] += row.amount
        by_generation[row.generation][row.kind] += row.amount
    stepped_s = sum(step.wall_s for update in updates for step in update.steps)
    return Spending(
        phases=tuple(phases),
        episodes=sum(phase.episodes for phase in phases),
        calls=sum(phase.calls for phase in phases),
        prompt_tokens=sum(phase.prompt_tokens for phase in phases),
        completion_tokens=sum(phase.completion_tokens for phase in phases),
        resent=sum(phase.resent for phase in phases),
        sandbox_s=booked["sandbox_s"] + booked["episode_s"],
        train_s=booked["train_s"] or stepped_s,
        wall_s=run.active_s,
        usd=booked["usd"],
        by_generation={number: dict(kinds) for number, kinds in sorted(by_generation.items())},
    )


def _open_work(
    generations: Sequence[GenerationView],
    rollouts: Sequence[Measured],
    updates: Sequence[WeightUpdateView],
) -> tuple[OpenWork, ...]:
    work = [
        OpenWork(what=f"generation {g.number} ({g.lever})", done=0, total=None)
        for g in generations
        if g.status == WorkStatus.INTENDED
    ]
    work += [
        OpenWork(
            what=f"weight update of generation {u.generation} ({u.objective}), iterations",
            done=len(u.steps),
            total=u.iterations,
        )
        for u in updates
        if u.status == WorkStatus.INTENDED
    ]
    work += [
        OpenWork(
            what=f"rollout {r.row.slot}, episodes",
            done=r.done,
            total=r.row.episodes,
            accuracy=r.accuracy,
        )
        for r in rollouts
        if not r.complete
    ]
    return tuple(work)


def _call(row: ModelCallRow) -> CallView:
    request = _mapping(row.request)
    messages = request.get("messages")
    prompt = request.get("prompt")
    return CallView(
        id=row.id or 0,
        status=row.status,
        sends=row.sends,
        problem_id=row.problem_id,
        asked=row.asked,
        effective=row.effective,
        messages=tuple(
            (str(message.get("role", "")), str(message.get("content", "")))
            for message in (messages if isinstance(messages, list) else [])
            if isinstance(message, dict)
        ),
        prompt=prompt if isinstance(prompt, str) else None,
        adapter_id=row.adapter_id,
        text=row.text,
        finish_reason=row.finish_reason,
        prompt_tokens=row.prompt_tokens,
        completion_tokens=row.completion_tokens,
        wall_s=row.wall_s,
        error=row.error,
    )


def _task_words(task: str) -> tuple[str, str, tuple[Baseline, ...]]:
    """Title, metric and baselines of the task; a Run stays readable when its task's folder is gone."""
    try:
        spec = load_spec(find_folder(task))
    except TaskError:
        return task, "mean reward", ()
    return spec.title, spec.metric, spec.baselines


def _sandbox(settings: JsonValue) -> SandboxKind:
    """How scaffold code was confined; what does not say so was not."""
    value = _mapping(settings).get("sandbox")
    return SandboxKind(value) if value in list(SandboxKind) else SandboxKind.NONE


def _mapping(value: JsonValue) -> Mapping[str, JsonValue]:
    return value if isinstance(value, dict) else {}


def _number(value: JsonValue) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _whole(value: JsonValue) -> int | None:
    number = _number(value)
    return None if number is None else round(number)


def _utc(moment: datetime) -> datetime:
    """SQLite forgets the time zone; the tables hold UTC."""
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
