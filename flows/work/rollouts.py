"""Rolling out and scoring: Episodes made shard by shard in the sandbox, then the verifier's word on each."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from agents.calls import CallPolicy
from agents.episode import CAUSES, Cause, EpisodeResult, EpisodeSpec
from agents.rollout import roll_out, run_program
from flows.keys import keyed_seed
from flows.state.rollout_rows import RolloutPlan
from flows.state.tables import EpisodeRow, RolloutRow, WorkStatus
from flows.workshop import Workshop
from tasks.contract import Split, TaskKind
from verifiers.scoring import score_episode


class ShardIncomplete(Exception):
    """Raised when infrastructure failed under Episodes of a shard; what was recorded stays, the rest is made again."""


def plan_rollout(shop: Workshop, plan: RolloutPlan) -> int:
    """Write a rollout's intent, or find it; returns its id."""
    key = (shop.settings.seed, plan.slot, plan.scaffold_id)
    seeds = [keyed_seed(*key, problem_id, sample) for problem_id, sample in plan.items]
    whole = shop.spec.kind is TaskKind.PROGRAM
    return shop.store.open_rollout(plan, seeds, len(plan.items) if whole else shop.settings.shard_episodes)


def run_shard(shop: Workshop, rollout_id: int, shard: int) -> None:
    """Make the Episodes of a shard that are still to be made.

    Raises:
        ShardIncomplete: some could not be measured (sandbox lost, engine failed); call again.
    """
    shop.check()
    rollout = shop.store.rollout(rollout_id)
    rows = shop.store.unfinished_episodes(rollout_id, shard)
    if not rows:
        return
    if shop.spec.kind is TaskKind.PROGRAM:
        _run_program(shop, rollout, rows)
    else:
        _run_solve(shop, rollout, rows)
    left = shop.store.unfinished_episodes(rollout_id, shard)
    if left:
        why = {row.cause or "not reached": row.detail for row in left}
        text = "; ".join(f"{cause}: {detail}" if detail else cause for cause, detail in why.items())
        raise ShardIncomplete(f"{len(left)} of {len(rows)} episodes of {rollout.slot} were not measured ({text})")


def _policy(shop: Workshop, rollout: RolloutRow) -> CallPolicy:
    limits = shop.spec.limits
    return CallPolicy(
        adapter=rollout.adapter_key or None,
        train=rollout.train_policy,
        max_calls=limits.max_calls,
        max_tokens_per_call=limits.max_tokens_per_call,
    )


def _run_solve(shop: Workshop, rollout: RolloutRow, rows: list[EpisodeRow]) -> None:
    split = Split(rollout.split)
    specs = [EpisodeSpec(row.id or 0, shop.problem(split, row.problem_id), row.sample, row.seed) for row in rows]
    problem_of = {row.id: row.problem_id for row in rows}

    def on_result(result: EpisodeResult) -> None:
        shop.store.finish_episodes([result])
        if CAUSES[result.cause].measures:
            shop.count_episode(shop.task.score(problem_of[result.episode_id], result.answer))

    roll_out(
        shop.scaffold(rollout.scaffold_id),
        specs,
        policy=_policy(shop, rollout),
        limits=shop.spec.limits,
        sandbox=shop.sandbox,
        gateway=shop.gateway,
        on_result=on_result,
        concurrency=shop.settings.shard_episodes,
    )


def _run_program(shop: Workshop, rollout: RolloutRow, rows: list[EpisodeRow]) -> None:
    folder = shop.folder / "programs" / str(rollout.id)
    shutil.rmtree(folder, ignore_errors=True)
    dataset, working = folder / "dataset", folder / "working"
    shop.task.write_dataset(Split(rollout.split), dataset)
    working.mkdir(parents=True)
    outcome = run_program(
        shop.scaffold(rollout.scaffold_id),
        dataset,
        working,
        policy=_policy(shop, rollout),
        limits=shop.spec.limits,
        sandbox=shop.sandbox,
        gateway=shop.gateway,
        episode_id=rows[0].id or 0,
        seed=rows[0].seed,
    )
    answers = shop.task.read_answers(working) if CAUSES[outcome.cause].measures else {}
    missing = Cause.NO_ANSWER if outcome.cause is Cause.FINISHED else outcome.cause
    results = [
        EpisodeResult(
            episode_id=row.id or 0,
            cause=Cause.FINISHED if row.problem_id in answers else missing,
            answer=answers.get(row.problem_id),
            wall_s=outcome.wall_s / len(rows),
            detail="" if row.problem_id in answers else outcome.log[-4000:],
        )
        for row in rows
    ]
    shop.store.finish_episodes(results)
    for row in rows:
        shop.count_episode(shop.task.score(row.problem_id, answers.get(row.problem_id)))
    _keep_log(folder, outcome.log)


def _keep_log(folder: Path, log: str) -> None:
    (folder / "program.log").write_text(log, encoding="utf-8")
    shutil.rmtree(folder / "dataset", ignore_errors=True)


def score_rollout(shop: Workshop, rollout_id: int) -> None:
    """Score every Episode of a finished rollout by the task's verifier, from recorded answers alone, and close it."""
    store = shop.store
    rollout = store.rollout(rollout_id)
    if rollout.status == WorkStatus.DONE:
        return
    completions = store.completions(rollout_id) if shop.spec.model_only else {}
    scores = []
    wall_s = 0.0
    for row in store.episodes(rollout_id):
        assert row.id is not None, "a recorded episode has an id"
        assert row.status == WorkStatus.DONE, "a rollout is scored once all its episodes are done"
        record = score_episode(shop.task, row.problem_id, row.answer, completions.get(row.id, ()))
        scores.append((row.id, record.reward, record.counted_reason))
        wall_s += row.wall_s
    prompt, completion = store.tokens(rollout_id)
    step = f"{rollout.slot}/{rollout.scaffold_id[:12]}/{rollout.adapter_key[:12] or 'base'}"
    store.spend(rollout.generation, step, prompt_tokens=prompt, completion_tokens=completion, episode_s=wall_s)
    store.save_scores(rollout_id, scores)  # last, since it closes the rollout


def run_all(shop: Workshop, rollout_ids: list[int], attempts: int = 3) -> None:
    """Run and score several rollouts side by side, outside of Prefect: trials inside a decision.

    Raises:
        ShardIncomplete: infrastructure failed `attempts` times in a row.
    """
    for attempt in range(attempts):
        work = [(r, shard) for r in rollout_ids for shard in shop.store.unfinished_shards(r)]
        jobs = [partial(run_shard, shop, rollout_id, shard) for rollout_id, shard in work]
        failures = _side_by_side(jobs, shop.settings.parallel_shards)
        if not failures:
            break
        if attempt == attempts - 1 or not all(isinstance(f, ShardIncomplete) for f in failures):
            raise failures[0]
    for rollout_id in rollout_ids:
        score_rollout(shop, rollout_id)


def _side_by_side(jobs: Sequence[Callable[[], None]], width: int) -> list[BaseException]:
    """Run jobs on at most `width` threads, each of which lives until its jobs are done (a sandbox dies with the
    thread that started it); returns what they raised."""
    failures: list[BaseException] = []
    queue = list(reversed(jobs))
    lock = threading.Lock()

    def worker() -> None:
        while True:
            with lock:
                if not queue:
                    return
                job = queue.pop()
            try:
                job()
            except BaseException as error:
                with lock:
                    failures.append(error)

    threads = [threading.Thread(target=worker, daemon=True) for _ in range(min(width, len(jobs)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures
