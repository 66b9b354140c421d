"""Trajectories: one Episode with its ModelCalls, as `sia show RUN --episode ID` shows it."""

from __future__ import annotations

from sqlmodel import col, select

from flows.columns import mapping, sandbox_of
from flows.records import CallView, EpisodeView, UnknownRun
from flows.state.database import Database
from flows.state.tables import EpisodeRow, ModelCallRow, RolloutRow, RunRow, ScoreRow


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
            sandbox=sandbox_of(run.settings),
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
            calls=tuple(_call_view(call) for call in calls),
        )


def _call_view(row: ModelCallRow) -> CallView:
    request = mapping(row.request)
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
