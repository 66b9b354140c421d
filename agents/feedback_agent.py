"""The offline Feedback-Agent: rules pull the lever, a search over recipes writes the next Scaffold.

`decide` asks `agents.levers` for the lever. For WEIGHTS it returns training settings; the update goes on from the
incumbent's Adapter. For HARNESS it searches: a batch of recipes is tried on a few train problems beside the
incumbent's own recipe, a smaller batch follows around the best, and the best few are tried on more problems. The
best of them becomes the candidate; the gate, on dev, judges it.

Guarantees: the Decision is a function of (evidence, examples, seed) and of what `try_out` returns; a recipe that
the archive holds is never proposed again; nothing is known here of dev or test but the archive's mean rewards.
Not guaranteed: that the candidate is better. A trial of 48 problems has a standard error near 0.07, the best of nine
looks better than it is, and train problems are not dev problems.

What one Decision learned is kept: the draft's record carries its trials (`agents.recipes.Trial`), and the next
Decision rebuilds its study from the archive's recipes, dev means and trials, and from nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from agents.archive import Attempt, Lever
from agents.decision import Decision, Evidence, ScaffoldDraft, TrainSettings, TryOut
from agents.levers import LeverChoice, LeverRules, choose_lever, weights_due
from agents.recipe_search import RecipeSearch, derived_seed
from agents.recipes import Recipe, Trial, parse_recipe, parse_trials, render, space_for, with_trials
from tasks.contract import Example, TaskKind


class SearchRules(BaseModel):
    """How much one harness Decision spends on trials. A program's trial is a whole run, so it gets few."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    first_batch: int = Field(default=6, ge=1)
    second_batch: int = Field(default=3, ge=0)
    neighbours: int = Field(default=2, ge=0, description="Of a batch, one choice away from the best recipe known.")
    problems: int = Field(default=48, ge=1, description="Train problems a trial.")
    finalists: int = Field(default=2, ge=1, description="Recipes tried again on `final_problems`.")
    final_problems: int = Field(default=96, ge=1)
    program_drafts: int = Field(default=2, ge=1)


@dataclass(frozen=True)
class _Tried:
    """A recipe with its margin over the incumbent (see `agents.recipe_search`)."""

    recipe: Recipe
    n: int
    mean: float
    margin: float


class OfflineFeedbackAgent:
    """Implements `agents.decision.FeedbackAgent` without a model of its own.

    Args:
        levers: when which lever is pulled.
        search: how much a harness Decision tries.
        update: fields of `TrainSettings` (size and rate of a WeightUpdate) that differ from its defaults.
    """

    def __init__(
        self,
        levers: LeverRules | None = None,
        search: SearchRules | None = None,
        update: Mapping[str, int | float] | None = None,
    ) -> None:
        self.levers = levers or LeverRules()
        self.search = search or SearchRules()
        self.update = dict(update or {})

    def needs_probe(self, evidence: Evidence) -> bool:
        """True exactly when the weight lever is due, so that only the probe is wanting."""
        return weights_due(evidence, self.levers, self._open(evidence, seed=0).untried()) is not None

    def decide(self, evidence: Evidence, examples: Sequence[Example], seed: int, try_out: TryOut) -> Decision:
        """Choose the lever and fill in what it needs; see the module's text.

        Args:
            evidence: with `probe` where `needs_probe` said so.
            examples: train examples; Scaffolds show only the first `SHOT_POOL`.
            seed: of the run; the archive's length is mixed in, so each Decision draws anew.
            try_out: runs drafts on train problems under the incumbent's weights.
        """
        search = self._open(evidence, seed)
        choice = choose_lever(evidence, self.levers, search.untried())
        if choice.lever is Lever.WEIGHTS and choice.objective is not None:
            start = _incumbent(evidence).adapter_id
            onward = f"goes on from adapter {start}" if start else "starts from the base model"
            settings = TrainSettings.model_validate({**self.update, "objective": choice.objective})
            return Decision(lever=choice.lever, reasons=(*choice.reasons, onward), settings=settings)
        if choice.lever is Lever.STOP:
            return Decision(lever=choice.lever, reasons=choice.reasons)
        return self._harness(evidence, examples, try_out, search, choice)

    def _open(self, evidence: Evidence, seed: int) -> RecipeSearch:
        """A search to which every recipe of the archive is known as seen."""
        newest = max((a.generation for a in evidence.archive), default=0)
        archived = [r for a in evidence.archive if (r := parse_recipe(a.recipe)) is not None]
        return RecipeSearch(space_for(evidence.task), derived_seed(seed, newest), archived)

    def _harness(
        self,
        evidence: Evidence,
        examples: Sequence[Example],
        try_out: TryOut,
        search: RecipeSearch,
        choice: LeverChoice,
    ) -> Decision:
        rules, task = self.search, evidence.task
        whole_run = task.kind is TaskKind.PROGRAM
        incumbent = _incumbent(evidence)
        own = parse_recipe(incumbent.recipe)
        archived = set(search.seen)
        earlier = recall(evidence)
        for known in known_margins(evidence) + earlier:
            search.learn(known.recipe, known.margin)
        reference = None if own is None or whole_run else own

        def run(recipes: Sequence[Recipe], problems: int) -> tuple[list[_Tried], float]:
            """Margins of `recipes`, and the mean that they are measured against."""
            asked = [*recipes, reference] if reference is not None else list(recipes)
            drafts = [render(recipe, task, examples) for recipe in asked]
            results = list(try_out(drafts, problems))
            means = [sum(r.rewards) / len(r.rewards) if r.rewards else 0.0 for r in results]
            base = means[-1] if reference is not None else _expected(incumbent, own, evidence)
            return [
                _Tried(recipe, len(result.rewards), mean, mean - base)
                for recipe, result, mean in zip(recipes, results[: len(recipes)], means, strict=False)
            ], base

        batch = search.propose(
            rules.program_drafts if whole_run else rules.first_batch,
            own,
            neighbours=0 if whole_run else rules.neighbours,
        )
        tried, base = run(batch, rules.problems)
        for one in tried:
            search.learn(one.recipe, one.margin)
        if not whole_run and rules.second_batch:
            best = max([*tried, *earlier], key=_rank).recipe if tried or earlier else own
            second = search.propose(rules.second_batch, best, neighbours=rules.neighbours)
            if second:
                more, base = run(second, rules.problems)
                tried += more
        pool = [one for one in [*tried, *earlier] if one.recipe not in archived]
        ranked = sorted(pool, key=_rank, reverse=True)
        reasons = [*choice.reasons, self._account(tried, base, reference is not None)]
        if not whole_run and rules.final_problems > rules.problems:
            finals, base = run([one.recipe for one in ranked[: rules.finalists]], rules.final_problems)
            ranked = sorted(finals, key=_rank, reverse=True)
            tried = [one for one in tried if all(one.recipe != f.recipe for f in finals)] + finals
        winner = ranked[0]
        reasons.append(_verdict(winner, base, reference is not None))
        draft = self._record(render(winner.recipe, task, examples), tried, incumbent)
        return Decision(lever=Lever.HARNESS, reasons=tuple(reasons), draft=draft)

    def _account(self, tried: Sequence[_Tried], base: float, same: bool) -> str:
        """What was tried, in one sentence."""
        n = max((one.n for one in tried), default=0)
        listed = "; ".join(
            f"{one.mean:.3f} {one.recipe.describe()}" for one in sorted(tried, key=_rank, reverse=True)[:3]
        )
        beside = f"the incumbent's own recipe {base:.3f} on the same" if same else f"the incumbent about {base:.3f}"
        return f"tried {len(tried)} recipes on {n} train problems ({beside}); best: {listed}"

    def _record(self, draft: ScaffoldDraft, tried: Sequence[_Tried], incumbent: Attempt) -> ScaffoldDraft:
        return with_trials(
            draft,
            [
                Trial(
                    recipe=one.recipe,
                    adapter_id=incumbent.adapter_id,
                    n=one.n,
                    mean=round(one.mean, 6),
                    margin=round(one.margin, 6),
                )
                for one in tried
            ],
        )


def known_margins(evidence: Evidence) -> list[_Tried]:
    """The archive's own recipes with their dev means, as margins.

    Under the incumbent's weights: less the incumbent's dev mean. Under other weights: less the best mean reached
    there, so that a weaker model's best recipe is not mistaken for a bad one.
    """
    incumbent = _incumbent(evidence)
    found: list[_Tried] = []
    for attempt in evidence.archive:
        recipe = parse_recipe(attempt.recipe)
        if recipe is None or attempt.dev is None:
            continue
        if attempt.adapter_id == incumbent.adapter_id and incumbent.dev is not None:
            level = incumbent.dev.mean
        else:
            level = max(a.dev.mean for a in evidence.archive if a.dev and a.adapter_id == attempt.adapter_id)
        found.append(_Tried(recipe, attempt.dev.n, attempt.dev.mean, attempt.dev.mean - level))
    return found


def recall(evidence: Evidence) -> list[_Tried]:
    """Trials that earlier Decisions recorded under the incumbent's weights, as margins over today's incumbent.

    A trial's margin is over the incumbent of its time, the candidate's parent. It is moved to today's: by the
    incumbent's own margin in the same batch if it was tried there, else by the difference of the two dev means.
    Of a recipe tried more than once the newest trial counts.
    """
    incumbent = _incumbent(evidence)
    own = parse_recipe(incumbent.recipe)
    by_generation = {a.generation: a for a in evidence.archive}
    found: dict[Recipe, _Tried] = {}
    for attempt in sorted(evidence.archive, key=lambda a: a.generation):
        if attempt.lever is not Lever.HARNESS:
            continue
        trials = [t for t in parse_trials(attempt.recipe) if t.adapter_id == incumbent.adapter_id]
        parent = by_generation.get(attempt.parent) if attempt.parent is not None else None
        shift = next((t.margin for t in trials if t.recipe == own), None)
        if shift is None:
            before = parent.dev.mean if parent and parent.dev else None
            now = incumbent.dev.mean if incumbent.dev else None
            shift = now - before if before is not None and now is not None else 0.0
        for trial in trials:
            found[trial.recipe] = _Tried(trial.recipe, trial.n, trial.mean, trial.margin - shift)
    return list(found.values())


def _incumbent(evidence: Evidence) -> Attempt:
    return next(a for a in evidence.archive if a.generation == evidence.incumbent)


def _expected(incumbent: Attempt, own: Recipe | None, evidence: Evidence) -> float:
    """What the incumbent is expected to score where it is not run beside the drafts: its trial, or its dev mean."""
    for attempt in evidence.archive:
        for trial in parse_trials(attempt.recipe):
            if trial.recipe == own and trial.adapter_id == incumbent.adapter_id:
                return trial.mean
    return incumbent.dev.mean if incumbent.dev else 0.0


def _rank(one: _Tried) -> tuple[float, int, str]:
    """Best last: by margin, then the cheaper, then a fixed order."""
    return (round(one.margin, 9), -one.recipe.cost(), one.recipe.model_dump_json())


def _verdict(winner: _Tried, base: float, same: bool) -> str:
    where = f"{winner.mean:.3f} on {winner.n} train problems against {base:.3f} of the incumbent"
    if not same:
        where += " (not on the same problems)"
    if winner.margin > 0:
        return f"proposed, {where}: {winner.recipe.describe()}"
    return f"none looked better than the incumbent; the best untried is proposed and the gate decides, {where}"
