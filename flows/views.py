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

from sqlalchemy import case, func
from sqlmodel import Session, col, select

from agents.archive import Lever
from flows.columns import mapping, number_or_none, sandbox_of, utc, whole_or_none
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
    ARMS,
    BlockView,
    DecisionView,
    Difference,
    EvaluationView,
    GenerationView,
    OpenWork,
    RunSummary,
    RunView,
    StepView,
    TestArm,
    TrialView,
    UnknownRun,
    VerdictView,
    WeightUpdateView,
)
from flows.spending import spending
from flows.state.database import Database
from flows.state.tables import (
    DecisionRow,
    EpisodeRow,
    GateVerdictRow,
    GenerationRow,
    RolloutRow,
    RunRow,
    ScaffoldRow,
    ScoreRow,
    TestReadRow,
    TrainingStepRow,
    WeightUpdateRow,
    WorkStatus,
)
from flows.trajectories import episode_view
from tasks.contract import Baseline, TaskError
from tasks.loader import find_folder, load_spec

__all__ = ["CONTRASTS", "UnknownRun", "episode_view", "list_runs", "run_view"]

CONTRASTS = (("harness_only", "initial"), ("winner", "harness_only"), ("winner", "initial"))
"""The paired differences that are reported: (left, right) means left - right."""


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
            sandbox=sandbox_of(run.settings),
            generations=counts.get(run.id, (0, 0))[0],
            accepted=int(counts.get(run.id, (0, 0))[1] or 0),
            winner=winners.get(run.id),
            created_at=utc(run.created_at),
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
            sandbox=sandbox_of(run.settings),
            deterministic=mapping(run.settings).get("deterministic") is True,
            status=run.status,
            error=run.error,
            created_at=utc(run.created_at),
            finished_at=None if run.finished_at is None else utc(run.finished_at),
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
            spending=spending(session, run, rollouts, updates),
            open_work=_open_work(generations, rollouts, updates),
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
        report = mapping(step.report)
        steps[step.weight_update_id].append(
            StepView(
                iteration=step.iteration,
                mean_reward=number_or_none(report.get("mean_reward")),
                groups=whole_or_none(report.get("groups")),
                groups_alive=whole_or_none(report.get("groups_alive")),
                loss=number_or_none(report.get("loss")),
                kl=number_or_none(report.get("kl")),
                entropy=number_or_none(report.get("entropy")),
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
            iterations=whole_or_none(mapping(row.settings).get("iterations")),
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
    for arm, name in ARMS.items():
        words = name.what
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
            what=f"rollout {r.row.slot} of scaffold {r.row.scaffold_id[:10]}, episodes",
            done=r.done,
            total=r.row.episodes,
            accuracy=r.accuracy,
        )
        for r in rollouts
        if not r.complete
    ]
    return tuple(work)


def _task_words(task: str) -> tuple[str, str, tuple[Baseline, ...]]:
    """Title, metric and baselines of the task; a Run stays readable when its task's folder is gone."""
    try:
        spec = load_spec(find_folder(task))
    except TaskError:
        return task, "mean reward", ()
    return spec.title, spec.metric, spec.baselines
