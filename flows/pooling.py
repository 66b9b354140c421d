"""`sia pool`: several finished Runs of one task together, so that a finding does not hang on one seed.

    pooled = pool_runs(db, ["seed-0", "seed-1", "seed-2"], lambda run: run_view(db, run))
    pooled.differences[0].by_problem        # W+H - H: the figure to quote

Guarantees: every Run counts, whatever came of it: where the winner is H itself, its difference is 0 for every problem.
All Runs have the same task, at the same version, and the same test problems; n counts problems, never episodes, since
a problem that is asked in three Runs is no three problems.

What the intervals hold: `by_problem` speaks of these Runs on more problems of the kind, and not of more seeds;
`by_seed` speaks of more seeds, and is wide for few. Not guaranteed: that the Runs were not picked for their results;
name all that were made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.text import Text
from sqlmodel import col, select

from flows import words
from flows.present import print_table, text_table
from flows.records import ARMS, Difference, Record, RunView, TestArm
from flows.settings import EVAL_PROFILE
from flows.state.database import Database
from flows.state.tables import EpisodeRow, RunRow, RunStatus, ScoreRow
from verifiers.statistics import Interval, is_binary, pooled_difference

POOLED = (("winner", "harness_only"), ("harness_only", "initial"))
"""The differences that are pooled, the headline first: (left, right) means left - right."""

SEED_OWN = frozenset({"seed"})
"""Settings in which pooled Runs are meant to differ."""


class PoolingError(Exception):
    """Raised when Runs cannot be pooled; the message is one line with the fix."""


class PooledRun(Record):
    """One Run's sealed test: its arms, and W+H - H paired by problem."""

    id: str
    seed: int
    arms: Mapping[str, TestArm]
    difference: Difference


class PooledInterval(Record):
    """A mean difference over `n` units (problems, or seeds) with its 95 % interval, in [-1, 1]."""

    n: int
    unit: str
    mean: float
    low: float
    high: float
    method: str

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


class PooledContrast(Record):
    """left - right over all Runs. `by_problem` is the headline; `per_seed` is in the order of the Runs."""

    left: str
    right: str
    by_problem: PooledInterval
    by_seed: PooledInterval
    per_seed: tuple[PooledInterval, ...]


class Pool(Record):
    """What several Runs say together."""

    task: str
    title: str
    task_digest: str
    runs: tuple[PooledRun, ...]
    differences: tuple[PooledContrast, ...]
    unequal_settings: tuple[str, ...]
    """Settings other than the seed in which the Runs differ: then they are no repetitions of one experiment."""


def pool_runs(database: Database, names: Sequence[str], view_of: Callable[[str], RunView]) -> Pool:
    """Pool finished Runs of the same task.

    Args:
        database: where they are recorded.
        names: two or more Runs, of different seeds.
        view_of: reads a Run, and says "killed" of one that nobody works on.

    Raises:
        PoolingError: fewer than two Runs, one named twice, two of one seed, of different tasks or test problems, an
            evaluation, or one that is not finished.
        UnknownRun: no Run of a name.
    """
    if len(names) < 2:
        raise PoolingError("pooling needs two runs or more; for one, use `sia show RUN`")
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        raise PoolingError(f"run '{twice}' is named twice; name each run once")
    views = [view_of(name) for name in names]
    for view in views:
        _check_finished(view)
    with database.session() as session:
        digests = dict(iter(session.exec(select(RunRow.id, RunRow.task_digest).where(col(RunRow.id).in_(names)))))
    _check_alike(views, digests)
    rewards = _rewards(database, sorted({arm.rollout_id for view in views for arm in view.test}))
    by_arm = [{arm.arm: rewards[arm.rollout_id] for arm in view.test} for view in views]
    first = set(by_arm[0]["initial"])
    for view, arms in zip(views, by_arm, strict=True):
        if any(set(found) != first for found in arms.values()):
            raise PoolingError(f"runs '{names[0]}' and '{view.id}' were tested on different problems; pool equal ones")
    return Pool(
        task=views[0].task,
        title=views[0].title,
        task_digest=digests[names[0]],
        runs=tuple(_run(view) for view in views),
        differences=tuple(
            _contrast(left, right, [(arms[left], arms[right]) for arms in by_arm]) for left, right in POOLED
        ),
        unequal_settings=_unequal(views),
    )


def _check_finished(view: RunView) -> None:
    if view.profile == EVAL_PROFILE:
        raise PoolingError(f"'{view.id}' is an evaluation of one scaffold, not a run; leave it out")
    if view.status == RunStatus.RUNNING:
        raise PoolingError(f"run '{view.id}' is still running; wait for it (`sia status {view.id}`) or leave it out")
    if view.status != RunStatus.FINISHED or any(view.arm(arm) is None for arm in ARMS):
        raise PoolingError(f"run '{view.id}' is {view.status}; finish it with `sia resume {view.id}` or leave it out")


def _check_alike(views: Sequence[RunView], digests: Mapping[str, str]) -> None:
    first = views[0]
    seeds: dict[int, str] = {}
    for view in views:
        if view.task != first.task:
            raise PoolingError(
                f"run '{first.id}' is of task '{first.task}' and '{view.id}' of '{view.task}'; pool runs of one task"
            )
        if digests[view.id] != digests[first.id]:
            raise PoolingError(
                f"task '{view.task}' was changed between runs '{first.id}' and '{view.id}'; run one of them again"
            )
        if view.seed in seeds:
            raise PoolingError(
                f"runs '{seeds[view.seed]}' and '{view.id}' have the same seed {view.seed}; pool different seeds"
            )
        seeds[view.seed] = view.id


def _rewards(database: Database, rollout_ids: Sequence[int]) -> dict[int, dict[str, float]]:
    """Rollout -> Problem -> mean reward; an Episode without a Score counts 0."""
    samples: dict[int, dict[str, list[float]]] = {rollout: defaultdict(list) for rollout in rollout_ids}
    with database.session() as session:
        for rollout, problem, reward in session.exec(
            select(EpisodeRow.rollout_id, EpisodeRow.problem_id, ScoreRow.reward)
            .join(ScoreRow, col(ScoreRow.episode_id) == EpisodeRow.id, isouter=True)
            .where(col(EpisodeRow.rollout_id).in_(rollout_ids))
            .order_by(col(EpisodeRow.id))
        ):
            samples[rollout][problem].append(reward or 0.0)
    return {
        rollout: {problem: sum(found) / len(found) for problem, found in by_problem.items()}
        for rollout, by_problem in samples.items()
    }


def _run(view: RunView) -> PooledRun:
    difference = next(d for d in view.test_differences if (d.left, d.right) == POOLED[0])
    return PooledRun(id=view.id, seed=view.seed, arms={arm.arm: arm for arm in view.test}, difference=difference)


def _contrast(
    left: str, right: str, seeds: Sequence[tuple[Mapping[str, float], Mapping[str, float]]]
) -> PooledContrast:
    found = pooled_difference(seeds)
    assert found.by_seed is not None, "two runs or more are pooled"

    def one(interval: Interval, unit: str, method: str) -> PooledInterval:
        n, mean, low, high = interval
        return PooledInterval(n=n, unit=unit, mean=mean, low=low, high=high, method=method)

    def paired(a: Mapping[str, float], b: Mapping[str, float]) -> str:
        return "Newcombe, paired" if is_binary([*a.values(), *b.values()]) else "Student t, paired"

    averaged = [
        [sum(side[p] for side in sides) / len(seeds) for p in seeds[0][0]] for sides in zip(*seeds, strict=True)
    ]
    headline = "Newcombe, paired" if all(is_binary(side) for side in averaged) else "Student t, paired"
    return PooledContrast(
        left=left,
        right=right,
        by_problem=one(found.by_problem, "problems", headline),
        by_seed=one(found.by_seed, "seeds", "Student t"),
        per_seed=tuple(
            one(interval, "problems", paired(*seed)) for interval, seed in zip(found.per_seed, seeds, strict=True)
        ),
    )


def _unequal(views: Sequence[RunView]) -> tuple[str, ...]:
    settings = [view.settings if isinstance(view.settings, dict) else {} for view in views]
    keys = {key for one in settings for key in one} - SEED_OWN
    return tuple(sorted(key for key in keys if any(one.get(key) != settings[0].get(key) for one in settings)))


def print_pool(console: Console, pool: Pool) -> None:
    """The screen of `sia pool`: a row for each Run, then the pooled differences."""
    console.print(Text(words.visible(pool.title), "bold"))
    table = text_table("Run", "Seed", *(name.short for name in ARMS.values()), "W+H - H, points", "n each")
    for run in pool.runs:
        table.add_row(
            Text(run.id, "bold"),
            str(run.seed),
            *(
                f"{words.percent(run.arms[arm].mean)}\n{words.bounds(run.arms[arm].low, run.arms[arm].high)}"
                for arm in ARMS
            ),
            "0 (W+H is H)"
            if run.difference.same
            else f"{words.points(run.difference.mean)}\n{words.signed_bounds(run.difference.low, run.difference.high)}",
            str(run.difference.n),
        )
    print_table(console, table)
    for contrast in pool.differences:
        _print_contrast(console, pool, contrast)
    console.print()
    console.print(
        "Over problems: each problem's mean difference over the seeds; speaks of these runs on more such problems. "
        "Between seeds: Student t over the seeds' means; speaks of more runs, and is wide for few. Intervals are 95 %.",
        style="dim",
    )
    if pool.unequal_settings:
        differing = ", ".join(pool.unequal_settings)
        console.print(f"These runs differ in more than the seed: {differing}.", style="yellow", markup=False)


def _print_contrast(console: Console, pool: Pool, contrast: PooledContrast) -> None:
    name = f"{words.ARM_NAMES[contrast.left]} - {words.ARM_NAMES[contrast.right]}"
    table = text_table(name, "Points", "95 % interval", "n", "Method", "")
    rows = [("over problems", contrast.by_problem, False), ("between seeds", contrast.by_seed, False)]
    for run, one in zip(pool.runs, contrast.per_seed, strict=True):
        same = run.arms[contrast.left].rollout_id == run.arms[contrast.right].rollout_id
        rows.append((f"seed {run.seed} alone", one, same))
    for label, one, same in rows:
        table.add_row(
            Text(label, "bold" if one is contrast.by_problem else ""),
            words.points(one.mean),
            words.signed_bounds(one.low, one.high),
            f"{one.n} {one.unit}",
            one.method,
            "same candidate" if same else "beyond noise" if one.beyond_noise else "not beyond noise",
        )
    print_table(console, table)
