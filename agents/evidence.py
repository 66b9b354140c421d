"""What reward evidence says: summaries of a probe, and which of the six Objectives could learn from it.

Pure functions of `Evidence`. A precondition answers one question only: would this Objective's loss have anything to
learn from here? It is necessary, never a promise that an update helps: that is the gate's to say.

Source of the conditions: arXiv 2605.27276, section 7.3, and the originals it cites.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from agents.archive import Objective
from agents.decision import Evidence, RewardProbe

IMPLEMENTED_TODAY = frozenset({Objective.GRPO, Objective.BEST_OF_N})
"""The Objectives that the weight lever can run; the others are judged, and named, but not chosen."""

NOT_AVAILABLE = "not available in this version"

BINS = 10


class EvidenceRules(BaseModel):
    """Thresholds on reward evidence."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    min_groups_alive: float = Field(default=0.25, description="Share of groups with unequal rewards for GRPO.")
    sparse_mean: float = Field(default=0.05, description="Below this mean reward, rewards count as sparse.")
    floor: float = Field(default=0.0, description="Best-of-N clones only rollouts with a reward above this.")
    critic_rollouts: int = Field(default=32, description="Rollouts that PPO's critic needs to warm up on.")


@dataclass(frozen=True)
class RewardSummary:
    """A probe in numbers. Groups are problems, rollouts their samples, rewards lie in [0, 1]."""

    groups: int
    smallest_group: int
    rollouts: int
    mean: float
    best: float
    groups_alive: int
    """Groups whose rewards are not all equal: only they move a group-relative objective."""
    histogram: tuple[int, ...]
    """Rollouts in each of `BINS` equal bins of [0, 1]; a reward of 1 falls into the last."""
    skew: float
    """Third standardised moment (population); 0 where all rewards are equal. Right-skewed is positive."""

    @property
    def share_alive(self) -> float:
        """Groups alive over all groups; 0 without groups."""
        return self.groups_alive / self.groups if self.groups else 0.0


def reward_summary(probe: RewardProbe) -> RewardSummary:
    """Summarise a probe. An empty one has mean 0 and nothing alive."""
    rewards = [r for group in probe.groups for r in group]
    n = len(rewards)
    mean = math.fsum(rewards) / n if n else 0.0
    variance = math.fsum((r - mean) ** 2 for r in rewards) / n if n else 0.0
    third = math.fsum((r - mean) ** 3 for r in rewards) / n if n else 0.0
    histogram = [0] * BINS
    for r in rewards:
        histogram[min(BINS - 1, max(0, int(r * BINS)))] += 1
    return RewardSummary(
        groups=len(probe.groups),
        smallest_group=min((len(g) for g in probe.groups), default=0),
        rollouts=n,
        mean=mean,
        best=max(rewards, default=0.0),
        groups_alive=sum(1 for g in probe.groups if g and max(g) > min(g)),
        histogram=tuple(histogram),
        skew=third / variance**1.5 if variance > 1e-12 else 0.0,
    )


def above_floor(probe: RewardProbe, floor: float) -> int:
    """How many rollouts have a reward above `floor`."""
    return sum(1 for group in probe.groups for r in group if r > floor)


def preconditions(evidence: Evidence, rules: EvidenceRules | None = None) -> dict[Objective, str | None]:
    """For each Objective: None if it could learn from this evidence, else the reason why it could not.

    What a probe cannot show is not judged here: that reference log-probabilities exist follows from local training
    with LoRA (the base model is the adapter switched off), and an action's length from the task's token limit.

    Args:
        evidence: without a probe, every Objective is refused for want of one.
        rules: thresholds.
    """
    rules = rules or EvidenceRules()
    if evidence.trainable is not None:
        return dict.fromkeys(Objective, f"no trainable model: {evidence.trainable}")
    probe = evidence.probe
    if probe is None or not any(probe.groups):
        return dict.fromkeys(Objective, "no reward probe: how rewards vary at temperature 1 is not known")
    s = reward_summary(probe)
    alive = f"{s.groups_alive} of {s.groups} groups have unequal rewards"
    return {
        Objective.PPO: _ppo(evidence, s, rules),
        Objective.GRPO: None
        if s.groups_alive and s.share_alive >= rules.min_groups_alive
        else f"{alive}, below the {rules.min_groups_alive:.0%} that group-relative advantages need",
        Objective.ENTROPIC: _entropic(s, alive),
        Objective.REINFORCE_KL: None if s.best > 0 else f"all {s.rollouts} returns are 0: no gradient",
        Objective.BEST_OF_N: None
        if above_floor(probe, rules.floor)
        else f"none of {s.rollouts} rollouts is above {rules.floor:g}: nothing to clone",
        Objective.DPO: None if s.groups_alive else "no strictly ordered pair in any group",
    }


def _ppo(evidence: Evidence, s: RewardSummary, rules: EvidenceRules) -> str | None:
    if evidence.task.limits.max_tokens_per_call == 1:
        return "actions are single tokens: there is nothing to spread credit over"
    if s.rollouts < rules.critic_rollouts:
        return f"{s.rollouts} rollouts are too few to warm a critic up ({rules.critic_rollouts})"
    if s.skew == 0.0 and max(s.histogram) == s.rollouts:
        return f"all {s.rollouts} rewards fall into one bin: a critic has nothing to learn from"
    return None


def _entropic(s: RewardSummary, alive: str) -> str | None:
    if s.smallest_group < 3:
        return f"the smallest group has {s.smallest_group} rollouts: the leave-one-out weights need 3"
    if not s.groups_alive:
        return f"{alive}: all weights would be equal"
    return None
