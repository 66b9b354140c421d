"""What the archive still knows about recipes, brought onto one scale: margins over today's incumbent.

Mean rewards from different problems or different weights cannot be compared; margins on the same problems nearly can.
Everything here is read from the archive alone, so that a resumed run remembers exactly what the first one did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agents.archive import Attempt, Lever
from agents.decision import Evidence, ScaffoldDraft
from agents.recipes import Recipe, Trial, parse_recipe, parse_trials, with_trials


@dataclass(frozen=True)
class Tried:
    """A recipe's mean reward on n problems, and its margin over the incumbent there."""

    recipe: Recipe
    n: int
    mean: float
    margin: float
    twin: bool = False
    """Its rewards equalled the incumbent's problem by problem: the same behaviour in other words, most likely."""

    @property
    def worth(self) -> float:
        """The margin less the recipe's price: what the search maximises."""
        return round(self.margin - self.recipe.price(), 9)


def best_first(tried: Sequence[Tried]) -> list[Tried]:
    """By worth, twins of the incumbent last (a gate could only reject them); equals in a fixed order."""
    return sorted(tried, key=lambda one: (one.twin, -one.worth, one.recipe.model_dump_json()))


def incumbent_of(evidence: Evidence) -> Attempt:
    """The incumbent's Attempt."""
    return next(a for a in evidence.archive if a.generation == evidence.incumbent)


def archived_margins(evidence: Evidence) -> list[Tried]:
    """The archive's own recipes with their dev means, as margins.

    Under the incumbent's weights: less the incumbent's dev mean. Under other weights: less the best mean reached
    there, so that a weaker model's best recipe is not mistaken for a bad one.
    """
    incumbent = incumbent_of(evidence)
    found: list[Tried] = []
    for attempt in evidence.archive:
        recipe = parse_recipe(attempt.recipe)
        if recipe is None or attempt.dev is None:
            continue
        if attempt.adapter_id == incumbent.adapter_id and incumbent.dev is not None:
            level = incumbent.dev.mean
        else:
            level = max(a.dev.mean for a in evidence.archive if a.dev and a.adapter_id == attempt.adapter_id)
        found.append(Tried(recipe, attempt.dev.n, attempt.dev.mean, attempt.dev.mean - level))
    return found


def recalled_trials(evidence: Evidence) -> list[Tried]:
    """Trials that earlier Decisions recorded under the incumbent's weights, as margins over today's incumbent.

    A trial's margin is over the incumbent of its time, the candidate's parent. It is moved to today's: by today's
    incumbent's own margin in the same batch if it was tried there, else by the difference of the two dev means.
    Of a recipe tried more than once the newest trial counts.
    """
    incumbent = incumbent_of(evidence)
    own = parse_recipe(incumbent.recipe)
    dev_mean = {a.generation: a.dev.mean for a in evidence.archive if a.dev is not None}
    found: dict[Recipe, Tried] = {}
    for attempt in sorted(evidence.archive, key=lambda a: a.generation):
        if attempt.lever is not Lever.HARNESS:
            continue
        trials = [t for t in parse_trials(attempt.recipe) if t.adapter_id == incumbent.adapter_id]
        shift = next((t.margin for t in trials if t.recipe == own), None)
        if shift is None:
            now = dev_mean.get(incumbent.generation)
            before = None if attempt.parent is None else dev_mean.get(attempt.parent)
            shift = now - before if now is not None and before is not None else 0.0
        for trial in trials:
            twin = trial.twin and attempt.parent == incumbent.generation
            found[trial.recipe] = Tried(trial.recipe, trial.n, trial.mean, trial.margin - shift, twin)
    return list(found.values())


def expected_mean(evidence: Evidence) -> float:
    """What the incumbent is expected to score where it is not run beside the drafts: its trial, or its dev mean."""
    incumbent = incumbent_of(evidence)
    own = parse_recipe(incumbent.recipe)
    for attempt in evidence.archive:
        for trial in parse_trials(attempt.recipe):
            if trial.recipe == own and trial.adapter_id == incumbent.adapter_id:
                return trial.mean
    return incumbent.dev.mean if incumbent.dev else 0.0


def recorded(draft: ScaffoldDraft, tried: Sequence[Tried], adapter_id: str | None) -> ScaffoldDraft:
    """The draft with its Decision's trials in its record, for `recalled_trials` to find."""
    return with_trials(
        draft,
        [
            Trial(
                recipe=one.recipe,
                adapter_id=adapter_id,
                n=one.n,
                mean=round(one.mean, 6),
                margin=round(one.margin, 6),
                twin=one.twin,
            )
            for one in tried
        ],
    )
