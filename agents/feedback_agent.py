"""The offline Feedback-Agent: rules pull the lever, a search over recipes writes the next Scaffold.

`decide` asks `agents.levers` for the lever. For WEIGHTS it returns training settings; the update goes on from the
incumbent's Adapter. For HARNESS it searches: a batch of recipes is tried on a few train problems beside the
incumbent's own recipe, a smaller batch follows around the best, and the best few are tried on more problems. The
best of them becomes the candidate; the gate, on dev, judges it.

Guarantees: the Decision is a function of (evidence, examples, seed) and of what `try_out` returns; a recipe that
the archive holds is never proposed again; nothing is known here of dev or test but the archive's mean rewards.
Not guaranteed: that the candidate is better. A first trial of 24 problems has a standard error near 0.1 and the last
one of 96 near 0.05, the best of several looks better than it is, and train problems are not dev problems.

What one Decision learned is kept: the draft's record carries its trials (`agents.recipes.Trial`), and the next
Decision rebuilds its study from the archive's recipes, dev means and trials, and from nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field

from agents.archive import Lever
from agents.decision import Decision, Evidence, TrainSettings, TryOut
from agents.levers import LeverChoice, LeverRules, choose_lever, weights_due
from agents.recipe_search import RecipeSearch, derived_seed
from agents.recipes import Recipe, parse_recipe, render, space_for
from agents.trial_memory import (
    Tried,
    archived_margins,
    best_first,
    expected_mean,
    incumbent_of,
    recalled_trials,
    recorded,
)
from tasks.contract import Example, TaskKind


class SearchRules(BaseModel):
    """How much one harness Decision spends on trials: about 800 Episodes by default.

    Many recipes on few problems, then few on many: over a synthetic surface, at equal cost, this came nearer to the
    best recipe than half as many recipes on twice the problems. A program's trial is a whole run, so it gets few.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    first_batch: int = Field(default=10, ge=1)
    second_batch: int = Field(default=6, ge=0)
    neighbours: int = Field(default=2, ge=0, description="Of a batch, one choice away from the best recipe known.")
    problems: int = Field(default=24, ge=1, description="Train problems a trial.")
    finalists: int = Field(default=4, ge=1, description="Recipes tried again on `final_problems`.")
    final_problems: int = Field(default=96, ge=1)
    program_drafts: int = Field(default=2, ge=1)


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
        return weights_due(evidence, self.levers, _open(evidence, seed=0).untried()) is not None

    def decide(self, evidence: Evidence, examples: Sequence[Example], seed: int, try_out: TryOut) -> Decision:
        """Choose the lever and fill in what it needs; see the module's text.

        Args:
            evidence: with `probe` where `needs_probe` said so.
            examples: train examples; Scaffolds show only the first `SHOT_POOL`.
            seed: of the run; the newest Generation's number is mixed in, so each Decision draws anew.
            try_out: runs drafts on train problems under the incumbent's weights.
        """
        search = _open(evidence, seed)
        choice = choose_lever(evidence, self.levers, search.untried())
        if choice.lever is Lever.HARNESS:
            return self._harness(evidence, examples, search, choice, _Bench(evidence, examples, try_out))
        if choice.objective is None:
            return Decision(lever=choice.lever, reasons=choice.reasons)
        start = incumbent_of(evidence).adapter_id
        onward = f"goes on from adapter {start}" if start else "starts from the base model"
        settings = TrainSettings.model_validate({**self.update, "objective": choice.objective})
        return Decision(lever=choice.lever, reasons=(*choice.reasons, onward), settings=settings)

    def _harness(
        self,
        evidence: Evidence,
        examples: Sequence[Example],
        search: RecipeSearch,
        choice: LeverChoice,
        bench: _Bench,
    ) -> Decision:
        """Try, refine, compare the best few, and propose one recipe that the archive does not hold."""
        rules = self.search
        archived = set(search.seen)
        earlier = recalled_trials(evidence)
        for known in archived_margins(evidence) + earlier:
            search.learn(known.recipe, known.worth)
        own = parse_recipe(incumbent_of(evidence).recipe)
        if bench.whole_runs:
            tried = bench.run(search.propose(rules.program_drafts, own, neighbours=1), rules.problems)
        else:
            tried = bench.run(search.propose(rules.first_batch, own, rules.neighbours), rules.problems)
            for one in tried:
                search.learn(one.recipe, one.worth)
            around = next((one.recipe for one in best_first([*tried, *earlier]) if one.margin > 0), own)
            tried += bench.run(search.propose(rules.second_batch, around, rules.neighbours), rules.problems)
        reasons = [*choice.reasons]
        if tried:
            reasons.append(_account(tried, bench))
        ranked = best_first([one for one in [*tried, *earlier] if one.recipe not in archived])
        if not bench.whole_runs:
            ranked = best_first(bench.run([one.recipe for one in ranked[: rules.finalists]], rules.final_problems))
            again = {one.recipe for one in ranked}
            tried = [*(one for one in tried if one.recipe not in again), *ranked]
        reasons.append(_verdict(ranked[0], bench))
        draft = render(ranked[0].recipe, evidence.task, examples)
        draft = recorded(draft, tried, incumbent_of(evidence).adapter_id)
        return Decision(lever=Lever.HARNESS, reasons=tuple(reasons), draft=draft)


class _Bench:
    """Runs recipes on train problems beside the incumbent's own recipe.

    Where the incumbent cannot be run beside them (a program's run is too costly, or its Scaffold was not written from
    a recipe), its expected mean stands in.
    """

    def __init__(self, evidence: Evidence, examples: Sequence[Example], try_out: TryOut) -> None:
        self.whole_runs = evidence.task.kind is TaskKind.PROGRAM
        own = parse_recipe(incumbent_of(evidence).recipe)
        self.reference = None if self.whole_runs else own
        self.level = expected_mean(evidence)
        """The incumbent's mean in the latest run."""
        self._evidence = evidence
        self._examples = examples
        self._try_out = try_out

    def run(self, recipes: Sequence[Recipe], problems: int) -> list[Tried]:
        """The recipes' results, in order; no recipes, no run."""
        if not recipes:
            return []
        asked = [*recipes] if self.reference is None else [*recipes, self.reference]
        drafts = [render(recipe, self._evidence.task, self._examples) for recipe in asked]
        results = self._try_out(drafts, problems)
        means = [sum(r.rewards) / len(r.rewards) if r.rewards else 0.0 for r in results]
        if self.reference is not None:
            self.level = means[-1]
        own = None if self.reference is None else results[-1].rewards
        return [
            Tried(recipe, len(result.rewards), mean, mean - self.level, twin=result.rewards == own)
            for recipe, result, mean in list(zip(asked, results, means, strict=True))[: len(recipes)]
        ]


def _open(evidence: Evidence, seed: int) -> RecipeSearch:
    """A search to which every recipe of the archive is known as seen."""
    newest = max((a.generation for a in evidence.archive), default=0)
    archived = [r for a in evidence.archive if (r := parse_recipe(a.recipe)) is not None]
    return RecipeSearch(space_for(evidence.task), derived_seed(seed, newest), archived)


def _account(tried: Sequence[Tried], bench: _Bench) -> str:
    """What was tried, in one sentence."""
    n = max(one.n for one in tried)
    listed = "; ".join(f"{one.mean:.3f} {one.recipe.describe()}" for one in best_first(tried)[:3])
    own = "the incumbent's own recipe" if bench.reference is not None else "the incumbent about"
    return f"tried {len(tried)} recipes on {n} train problems ({own} {bench.level:.3f}); best: {listed}"


def _verdict(winner: Tried, bench: _Bench) -> str:
    """What is proposed, and how it compares."""
    where = f"{winner.mean:.3f} on {winner.n} train problems against {bench.level:.3f} of the incumbent"
    if bench.reference is None:
        where += " (not on the same problems)"
    if winner.margin > 0:
        return f"proposed, {where}: {winner.recipe.describe()}"
    return (
        f"none looked better than the incumbent; the best untried is proposed and the gate decides, {where}: "
        + winner.recipe.describe()
    )
