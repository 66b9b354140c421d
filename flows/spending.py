"""What a Run cost: tokens from the recorded calls, seconds and money from the booked steps.

Tokens are not taken from the bookings, so that nothing is counted twice; a call that was sent again after a kill is in
`resent`. An Episode's seconds are those it was alive; many are alive at once, so their sum exceeds the wall clock's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from sqlalchemy import func
from sqlmodel import Session, col, select

from flows.measured import Measured
from flows.records import PhaseSpending, Spending, WeightUpdateView
from flows.state.tables import EpisodeRow, ModelCallRow, RolloutRow, RunRow, SpendingRow

PHASES: Mapping[str, str] = {
    "dev": "gates on dev",
    "trial": "drafts tried out on train",
    "probe": "probes at temperature 1",
    "train": "training rollouts",
    "test": "sealed test",
    "eval": "evaluations",
}
"""First part of a Rollout's slot -> what it was for, in the order of the spending table."""


def spending(
    session: Session, run: RunRow, rollouts: Sequence[Measured], updates: Sequence[WeightUpdateView]
) -> Spending:
    """Sums over a Run, by what its rollouts were for and by Generation; two queries."""
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
