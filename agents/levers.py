"""Which lever to pull next: a pure function of the evidence, with its reasons.

The rule, in the order in which it is applied:

1. No candidate left, or nothing left to try on either lever: STOP.
2. A model that cannot be trained: harness.
3. No harness candidate made yet: harness. (It is the cheaper lever, and a weight update is worth more on a harness
   that already reads the answers.)
4. The weight lever is *due* when the last `harness_patience` harness candidates in a row were not accepted, counted
   since the last weight update; when it was never pulled and fewer than `explore_below` candidates are left; or when
   no untried recipe remains. So after any weight update, accepted or not, the harness has its turns again first:
   accepted, because the best harness may differ under new weights; rejected, because the same update would be
   decided on the same evidence.
5. Due, and the reward probe shows that an available Objective can learn: weights. GRPO if enough groups have unequal
   rewards; best-of-N cloning if few have because success is rare, but some rollouts succeeded. Else harness, and the
   reason says what the probe lacked.

It does not estimate which lever would gain more: with a handful of candidates a run, that could not be measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field

from agents.archive import Attempt, Lever, Objective
from agents.decision import Evidence
from agents.evidence import (
    IMPLEMENTED_TODAY,
    NOT_AVAILABLE,
    EvidenceRules,
    above_floor,
    preconditions,
    reward_summary,
)


class LeverRules(EvidenceRules):
    """The numbers in the rule above."""

    harness_patience: int = Field(default=2, ge=1, description="Harness candidates in a row not accepted.")
    explore_below: int = Field(
        default=3, description="An untried weight lever is due when fewer candidates than this are left."
    )


@dataclass(frozen=True)
class LeverChoice:
    """A lever, its Objective (WEIGHTS only) and why, one sentence a reason."""

    lever: Lever
    objective: Objective | None
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Streak:
    """What the archive says about the levers so far."""

    harness_tried: int
    weights_tried: int
    rejected_in_a_row: int
    """Harness candidates not accepted, back from the newest to the last acceptance or weight update."""


def streak(archive: Sequence[Attempt]) -> Streak:
    """Count back through the archive. Undecided attempts count as neither accepted nor rejected."""
    ordered = sorted(archive, key=lambda attempt: attempt.generation)
    rejected = 0
    for attempt in reversed(ordered):
        if attempt.lever is not Lever.HARNESS or attempt.accepted:
            break
        if attempt.accepted is False:
            rejected += 1
    return Streak(
        harness_tried=sum(a.lever is Lever.HARNESS for a in ordered),
        weights_tried=sum(a.lever is Lever.WEIGHTS for a in ordered),
        rejected_in_a_row=rejected,
    )


def weights_due(evidence: Evidence, rules: LeverRules, harness_open: bool = True) -> str | None:
    """The reason why the weight lever's turn has come (whether or not an Objective can learn), or None."""
    if evidence.trainable is not None or evidence.generations_left <= 0:
        return None
    seen = streak(evidence.archive)
    if not harness_open:
        return "no untried recipe is left on the harness lever"
    if seen.harness_tried == 0:
        return None
    if seen.rejected_in_a_row >= rules.harness_patience:
        since = " since the last weight update" if seen.weights_tried else ""
        return (
            f"the last {seen.rejected_in_a_row} harness candidates{since} were not accepted"
            f" (patience {rules.harness_patience})"
        )
    if seen.weights_tried == 0 and evidence.generations_left < rules.explore_below:
        return (
            f"the weight lever was never pulled and {evidence.generations_left} of the run's candidates are left"
            f" (explored when fewer than {rules.explore_below} are)"
        )
    return None


def choose_lever(evidence: Evidence, rules: LeverRules | None = None, harness_open: bool = True) -> LeverChoice:
    """Apply the rule of this module.

    Args:
        evidence: with `probe` filled in where `weights_due` gives a reason; without it, harness is chosen.
        rules: thresholds.
        harness_open: False if the harness search has no untried recipe left.

    Returns:
        Never WEIGHTS without an Objective, nor with a model that cannot be trained.
    """
    rules = rules or LeverRules()
    if evidence.generations_left <= 0:
        return LeverChoice(Lever.STOP, None, ("no candidates are left in this run's budget",))
    if evidence.trainable is not None:
        why = f"the weight lever is closed: {evidence.trainable}"
        if harness_open:
            return LeverChoice(Lever.HARNESS, None, (why,))
        return LeverChoice(Lever.STOP, None, (why, "and no untried recipe is left on the harness lever"))
    due = weights_due(evidence, rules, harness_open)
    if due is None:
        return LeverChoice(Lever.HARNESS, None, (_harness_turn(evidence, rules),))
    objective, why_objective = choose_objective(evidence, rules)
    if objective is not None:
        return LeverChoice(Lever.WEIGHTS, objective, (due, *why_objective))
    if harness_open:
        return LeverChoice(Lever.HARNESS, None, (due, *why_objective, "so the harness lever goes on"))
    return LeverChoice(Lever.STOP, None, (due, *why_objective, "neither lever has anything to try"))


def choose_objective(evidence: Evidence, rules: LeverRules) -> tuple[Objective | None, tuple[str, ...]]:
    """The Objective that the reward evidence calls for, or None, with reasons that quote the numbers."""
    refused = preconditions(evidence, rules)
    if evidence.probe is None or evidence.trainable is not None:
        return None, (refused[Objective.GRPO] or "",)
    s = reward_summary(evidence.probe)
    numbers = (
        f"probe of {s.groups} train problems x {s.smallest_group} at temperature 1: mean reward {s.mean:.3f},"
        f" {s.groups_alive} of {s.groups} groups ({s.share_alive:.0%}) have unequal rewards, skew {s.skew:+.1f}"
    )
    elsewhere = [o.value for o in Objective if refused[o] is None and o not in IMPLEMENTED_TODAY]
    also = (f"could learn too but {NOT_AVAILABLE}: {', '.join(elsewhere)}",) if elsewhere else ()
    if refused[Objective.GRPO] is None:
        return Objective.GRPO, (
            numbers,
            f"GRPO: rewards come at the episode's end and at least {rules.min_groups_alive:.0%} of groups vary",
            *also,
        )
    grpo = f"GRPO refused: {refused[Objective.GRPO]}"
    if refused[Objective.BEST_OF_N] is not None:
        return None, (numbers, grpo, f"best-of-N refused: {refused[Objective.BEST_OF_N]}", *also)
    if s.mean > rules.sparse_mean:
        return None, (
            numbers,
            grpo,
            f"best-of-N refused: mean reward {s.mean:.3f} is not sparse (at most {rules.sparse_mean:g}),"
            " so cloning would repeat what the model already does",
            *also,
        )
    good = above_floor(evidence.probe, rules.floor)
    return Objective.BEST_OF_N, (
        numbers,
        grpo,
        f"best-of-N: rewards are sparse, but {good} of {s.rollouts} rollouts are above {rules.floor:g} to clone",
        *also,
    )


def _harness_turn(evidence: Evidence, rules: LeverRules) -> str:
    """Why the weight lever is not due."""
    seen = streak(evidence.archive)
    if seen.harness_tried == 0:
        return "no harness candidate was made yet, and the harness is the cheaper lever"
    last = max(evidence.archive, key=lambda a: a.generation)
    if last.lever is Lever.WEIGHTS:
        verdict = "accepted" if last.accepted else "not accepted"
        return (
            f"the weight update was {verdict}, so the harness is searched"
            f"{' again under the new weights' if last.accepted else ''}"
            f" until {rules.harness_patience} candidates in a row are not accepted"
        )
    return (
        f"{seen.rejected_in_a_row} harness candidates in a row were not accepted, fewer than {rules.harness_patience}"
    )
