"""A Run's rollouts, Episodes and scores: rows written, found again and read.

A part of `flows.state.store.Store`, which is what the rest of the program uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import func, insert, update
from sqlmodel import col, select

from agents.episode import CAUSES, Cause, EpisodeResult
from flows.state.database import Database
from flows.state.tables import EpisodeRow, ModelCallRow, RolloutRow, ScoreRow, WorkStatus, now


@dataclass(frozen=True)
class RolloutPlan:
    """A set of Episodes to be made: who (`scaffold_id`, `adapter_id`), on what (`items`), under which key."""

    slot: str
    scaffold_id: str
    adapter_id: str | None
    generation: int
    split: str
    items: Sequence[tuple[str, int]]
    """(problem id, sample) in the order of shards."""
    train_policy: bool = False


class RolloutRows:
    """Rows of rollouts and what is in them, for one Run."""

    def __init__(self, database: Database, run_id: str) -> None:
        self.database = database
        self.run_id = run_id

    def open_rollout(self, plan: RolloutPlan, seeds: Sequence[int], shard_episodes: int) -> int:
        """Write the intent of a rollout with all its Episodes, or find it; returns its id."""
        key = plan.adapter_id or ""
        with self.database.session() as session:
            found = session.exec(
                select(RolloutRow).where(
                    RolloutRow.run_id == self.run_id,
                    RolloutRow.slot == plan.slot,
                    RolloutRow.scaffold_id == plan.scaffold_id,
                    RolloutRow.adapter_key == key,
                )
            ).first()
            if found is not None:
                assert found.id is not None
                return found.id
            row = RolloutRow(
                run_id=self.run_id,
                slot=plan.slot,
                scaffold_id=plan.scaffold_id,
                adapter_key=key,
                generation=plan.generation,
                split=plan.split,
                train_policy=plan.train_policy,
                episodes=len(plan.items),
            )
            session.add(row)
            session.flush()
            assert row.id is not None
            rows = [
                {
                    "rollout_id": row.id,
                    "problem_id": problem_id,
                    "sample": sample,
                    "shard": i // shard_episodes,
                    "seed": seed,
                    "status": WorkStatus.INTENDED,
                    "detail": "",
                    "wall_s": 0.0,
                    "infrastructure_failures": 0,
                }
                for i, ((problem_id, sample), seed) in enumerate(zip(plan.items, seeds, strict=True))
            ]
            session.execute(insert(EpisodeRow), rows)
            return row.id

    def rollout(self, rollout_id: int) -> RolloutRow:
        """A rollout's row."""
        with self.database.session() as session:
            return session.get_one(RolloutRow, rollout_id)

    def rollouts(self, slot_prefix: str, scaffold_id: str, adapter_id: str | None) -> list[RolloutRow]:
        """Finished rollouts of a (Scaffold, Adapter) whose slot begins so."""
        with self.database.session() as session:
            query = select(RolloutRow).where(
                RolloutRow.run_id == self.run_id,
                col(RolloutRow.slot).startswith(slot_prefix),
                RolloutRow.scaffold_id == scaffold_id,
                RolloutRow.adapter_key == (adapter_id or ""),
                RolloutRow.status == WorkStatus.DONE,
            )
            return list(session.exec(query.order_by(col(RolloutRow.slot))))

    def unfinished_shards(self, rollout_id: int) -> list[int]:
        """Shards with Episodes still to be made."""
        with self.database.session() as session:
            query = select(EpisodeRow.shard).where(
                EpisodeRow.rollout_id == rollout_id, EpisodeRow.status == WorkStatus.INTENDED
            )
            return sorted(set(session.exec(query)))

    def unfinished_episodes(self, rollout_id: int, shard: int | None = None) -> list[EpisodeRow]:
        """Episodes still to be made, of one shard or of all."""
        with self.database.session() as session:
            query = select(EpisodeRow).where(
                EpisodeRow.rollout_id == rollout_id, EpisodeRow.status == WorkStatus.INTENDED
            )
            if shard is not None:
                query = query.where(EpisodeRow.shard == shard)
            return list(session.exec(query.order_by(col(EpisodeRow.id))))

    def finish_episodes(self, results: Iterable[EpisodeResult]) -> None:
        """Record endings. One that measures nothing is only counted, and stays to be made again."""
        with self.database.session() as session:
            for result in results:
                if not CAUSES[result.cause].measures:
                    session.execute(
                        update(EpisodeRow)
                        .where(col(EpisodeRow.id) == result.episode_id)
                        .values(
                            infrastructure_failures=EpisodeRow.infrastructure_failures + 1,
                            cause=result.cause,
                            detail=result.detail,
                        )
                    )
                    continue
                session.execute(
                    update(EpisodeRow)
                    .where(col(EpisodeRow.id) == result.episode_id, col(EpisodeRow.status) == WorkStatus.INTENDED)
                    .values(
                        status=WorkStatus.DONE,
                        cause=result.cause,
                        answer=result.answer,
                        events=list(result.events) or None,
                        detail=result.detail,
                        wall_s=result.wall_s,
                        finished_at=now(),
                    )
                )

    def episodes(self, rollout_id: int) -> list[EpisodeRow]:
        """All Episodes of a rollout in order."""
        with self.database.session() as session:
            query = select(EpisodeRow).where(EpisodeRow.rollout_id == rollout_id)
            return list(session.exec(query.order_by(col(EpisodeRow.id))))

    def completions(self, rollout_id: int) -> dict[int, list[str]]:
        """Episode id -> texts of its recorded completions."""
        texts: dict[int, list[str]] = {}
        with self.database.session() as session:
            query = (
                select(ModelCallRow.episode_id, ModelCallRow.text)
                .join(EpisodeRow, col(EpisodeRow.id) == col(ModelCallRow.episode_id))
                .where(EpisodeRow.rollout_id == rollout_id, ModelCallRow.status == WorkStatus.DONE)
            )
            for episode_id, text in session.exec(query):
                texts.setdefault(episode_id, []).append(text or "")
        return texts

    def save_scores(self, rollout_id: int, scores: Sequence[tuple[int, float, str]]) -> None:
        """Record (episode id, reward, reason) and close the rollout."""
        with self.database.session() as session:
            known = set(
                session.exec(
                    select(ScoreRow.episode_id)
                    .join(EpisodeRow, col(EpisodeRow.id) == col(ScoreRow.episode_id))
                    .where(EpisodeRow.rollout_id == rollout_id)
                )
            )
            fresh = [
                {"episode_id": episode_id, "reward": reward, "reason": reason}
                for episode_id, reward, reason in scores
                if episode_id not in known
            ]
            if fresh:
                session.execute(insert(ScoreRow), fresh)
            row = session.get_one(RolloutRow, rollout_id)
            if row.status != WorkStatus.DONE:
                row.status, row.finished_at = WorkStatus.DONE, now()

    def rewards(self, rollout_id: int) -> dict[tuple[str, int], float]:
        """(problem id, sample) -> reward of a scored rollout."""
        with self.database.session() as session:
            query = (
                select(EpisodeRow.problem_id, EpisodeRow.sample, ScoreRow.reward)
                .join(ScoreRow, col(ScoreRow.episode_id) == col(EpisodeRow.id))
                .where(EpisodeRow.rollout_id == rollout_id)
                .order_by(col(EpisodeRow.id))
            )
            return {(problem_id, sample): reward for problem_id, sample, reward in session.exec(query)}

    def causes(self, rollout_id: int) -> dict[Cause, int]:
        """How a rollout's Episodes ended."""
        with self.database.session() as session:
            query = (
                select(EpisodeRow.cause, func.count())
                .where(EpisodeRow.rollout_id == rollout_id, EpisodeRow.status == WorkStatus.DONE)
                .group_by(col(EpisodeRow.cause))
            )
            return {Cause(cause): int(count) for cause, count in session.exec(query) if cause is not None}

    def training_calls(self, rollout_id: int) -> list[tuple[EpisodeRow, float, list[ModelCallRow]]]:
        """Episodes of a training rollout with reward and attributed calls, in a fixed order."""
        with self.database.session() as session:
            episodes = session.exec(
                select(EpisodeRow, ScoreRow.reward)
                .join(ScoreRow, col(ScoreRow.episode_id) == col(EpisodeRow.id))
                .where(EpisodeRow.rollout_id == rollout_id)
                .order_by(col(EpisodeRow.id))
            ).all()
            calls: dict[int, list[ModelCallRow]] = {}
            for call in session.exec(
                select(ModelCallRow)
                .join(EpisodeRow, col(EpisodeRow.id) == col(ModelCallRow.episode_id))
                .where(
                    EpisodeRow.rollout_id == rollout_id,
                    ModelCallRow.status == WorkStatus.DONE,
                    col(ModelCallRow.problem_id).is_not(None),
                )
                .order_by(col(ModelCallRow.digest), col(ModelCallRow.occurrence))
            ):
                calls.setdefault(call.episode_id, []).append(call)
            return [(episode, reward, calls.get(episode.id or 0, [])) for episode, reward in episodes]

    def tokens(self, rollout_id: int) -> tuple[int, int]:
        """Prompt and completion tokens of a rollout's recorded calls."""
        with self.database.session() as session:
            prompt, completion = session.exec(
                select(func.sum(ModelCallRow.prompt_tokens), func.sum(ModelCallRow.completion_tokens))
                .join(EpisodeRow, col(EpisodeRow.id) == col(ModelCallRow.episode_id))
                .where(EpisodeRow.rollout_id == rollout_id, ModelCallRow.status == WorkStatus.DONE)
            ).one()
            return int(prompt or 0), int(completion or 0)
