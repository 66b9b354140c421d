"""What was measured in a Rollout: rewards by Problem, read for a whole Run at once, and the figures made from them.

- Denominators are fixed: n is what was intended, and in a finished Rollout an Episode without a Score counts 0.
- Nothing is estimated from an unfinished Rollout, where the quick Episodes are in and the slow ones are not.
- Several samples of a Problem are averaged first: Problems are independent of each other, samples are not.
- Differences are paired by Problem.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sqlmodel import Session, col, select

from agents.archive import Estimate
from flows.records import HISTOGRAM_BINS, Difference, EpisodeBrief, ProbeView
from flows.state.tables import EpisodeRow, RolloutRow, ScoreRow, WorkStatus

SAMPLES_SHOWN = 3
"""So many wrong and so many right Episodes of a Rollout are kept as an entrance to its trajectories."""


@dataclass
class Measured:
    """A Rollout's row with its Episodes' rewards, read in one query for the whole Run."""

    row: RolloutRow
    done: int = 0
    scored: int = 0
    reward_sum: float = 0.0
    seen: int = 0
    by_problem: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    causes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    briefs: list[EpisodeBrief] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every Episode is in and scored."""
        return self.row.status == WorkStatus.DONE

    @property
    def accuracy(self) -> float | None:
        """Mean reward of what is scored so far."""
        return self.reward_sum / self.scored if self.scored else None

    @property
    def missing(self) -> int:
        """Problems that were intended and have no Episode at all; each counts 0."""
        samples = max((len(rewards) for rewards in self.by_problem.values()), default=1)
        return max(0, self.row.episodes - self.seen) // samples

    def rewards(self) -> dict[str, float]:
        """Mean reward by Problem; an Episode without a Score counts 0."""
        return {problem: sum(rewards) / len(rewards) for problem, rewards in self.by_problem.items()}

    def estimate(self) -> Estimate | None:
        """Mean reward over Problems, or None while Episodes are missing."""
        return estimate_rewards([*self.rewards().values(), *[0.0] * self.missing]) if self.complete else None


def read_rollouts(session: Session, run_id: str) -> list[Measured]:
    """All Rollouts of a Run in the order they were made, with their Episodes' rewards, in two queries."""
    rows = session.exec(select(RolloutRow).where(RolloutRow.run_id == run_id).order_by(col(RolloutRow.id))).all()
    by_id = {row.id: Measured(row) for row in rows}
    columns = (
        EpisodeRow.id,
        EpisodeRow.rollout_id,
        EpisodeRow.problem_id,
        EpisodeRow.status,
        EpisodeRow.cause,
        ScoreRow.reward,
    )
    episodes = session.execute(
        select(*columns)  # type: ignore[call-overload]
        .join(RolloutRow, col(RolloutRow.id) == EpisodeRow.rollout_id)
        .join(ScoreRow, col(ScoreRow.episode_id) == EpisodeRow.id, isouter=True)
        .where(RolloutRow.run_id == run_id)
        .order_by(col(EpisodeRow.id))
    )
    for episode_id, rollout_id, problem_id, status, cause, reward in episodes:
        rollout = by_id[rollout_id]
        rollout.seen += 1
        rollout.by_problem[problem_id].append(reward or 0.0)
        rollout.done += status == WorkStatus.DONE
        if reward is not None:
            rollout.scored += 1
            rollout.reward_sum += reward
        if cause is not None and status == WorkStatus.DONE:
            rollout.causes[cause] += 1
        brief = EpisodeBrief(id=episode_id, slot=rollout.row.slot, problem_id=problem_id, cause=cause, reward=reward)
        if status == WorkStatus.DONE and _worth_showing(rollout.briefs, brief):
            rollout.briefs.append(brief)
    return list(by_id.values())


def _worth_showing(shown: Sequence[EpisodeBrief], brief: EpisodeBrief) -> bool:
    """The first few that are wrong and the first few that are right."""
    right = (brief.reward or 0.0) > 0
    return sum(((other.reward or 0.0) > 0) == right for other in shown) < SAMPLES_SHOWN


def pool(rollouts: Iterable[Measured]) -> list[float]:
    """Rewards of all Rollouts by Problem; a Problem that was asked in several of them is averaged and counts once."""
    by_problem: dict[str, list[float]] = defaultdict(list)
    missing = 0
    for rollout in rollouts:
        missing += rollout.missing
        for problem, reward in rollout.rewards().items():
            by_problem[problem].append(reward)
    return [sum(rewards) / len(rewards) for rewards in by_problem.values()] + [0.0] * missing


def probe_view(rollout: Measured) -> ProbeView:
    """How rewards vary within the groups of a probe."""
    groups = list(rollout.by_problem.values())
    means = list(rollout.rewards().values())
    return ProbeView(
        groups=len(groups),
        samples=max((len(group) for group in groups), default=0),
        alive=sum(max(group) > min(group) for group in groups),
        mean=sum(means) / len(means) if means else 0.0,
        histogram=histogram(means),
    )


def histogram(rewards: Iterable[float]) -> tuple[int, ...]:
    """Counts in HISTOGRAM_BINS equal bins over [0, 1]."""
    counts = [0] * HISTOGRAM_BINS
    for reward in rewards:
        counts[min(int(reward * HISTOGRAM_BINS + 1e-9), HISTOGRAM_BINS - 1)] += 1
    return tuple(counts)


def difference(left: str, right: str, of_left: Measured, of_right: Measured) -> Difference:
    """Mean of left - right, paired by Problem; where only one of them has an Episode, the other counts 0."""
    from verifiers.statistics import is_binary, paired_difference

    left_rewards, right_rewards = of_left.rewards(), of_right.rewards()
    problems = sorted(left_rewards.keys() | right_rewards.keys())
    unseen = max(0, max(len(r.by_problem) + r.missing for r in (of_left, of_right)) - len(problems))
    a = [left_rewards.get(problem, 0.0) for problem in problems] + [0.0] * unseen
    b = [right_rewards.get(problem, 0.0) for problem in problems] + [0.0] * unseen
    found = paired_difference(a, b)
    binary = is_binary(a) and is_binary(b)
    return Difference(
        left=left,
        right=right,
        n=found.n,
        mean=found.mean,
        low=found.low,
        high=found.high,
        method="Newcombe, paired by problem" if binary else "Student t, paired by problem",
        same=of_left.row.id == of_right.row.id,
    )


def estimate_rewards(rewards: Sequence[float]) -> Estimate | None:
    """Mean with its interval, as the verifiers' statistics define it; None without a reward."""
    from verifiers.statistics import estimate

    if not rewards:
        return None
    found = estimate(rewards)
    return Estimate(n=found.n, mean=found.mean, low=found.low, high=found.high)


def interval_method(rewards: Iterable[float]) -> str:
    """Name of the 95 % interval that `estimate_rewards` puts around these rewards."""
    from verifiers.statistics import is_binary

    return "Wilson" if is_binary(list(rewards)) else "Student t"
