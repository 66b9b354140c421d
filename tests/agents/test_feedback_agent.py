"""The offline Feedback-Agent against synthetic reward surfaces: what it decides, and how near it gets to the best."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import JsonValue

import agents.feedback_agent
from agents.archive import Attempt, Estimate, Lever, Objective
from agents.decision import (
    SHOT_POOL,
    Decision,
    Evidence,
    FeedbackAgent,
    RewardProbe,
    ScaffoldDraft,
    TrainSettings,
    TrialResult,
)
from agents.feedback_agent import OfflineFeedbackAgent, SearchRules
from agents.meta_agent import OfflineMetaAgent
from agents.program_recipes import Classifier, ProgramRecipe
from agents.recipes import Recipe, parse_recipe, parse_trials
from agents.solve_recipes import SolveRecipe, SolveSpace, Style
from agents.trial_memory import recalled_trials
from tasks.contract import AnswerKind, Example, Problem, Split, TaskKind, TaskSpec

TASK = TaskSpec(
    name="sums",
    title="Sums",
    kind=TaskKind.SOLVE,
    answer=AnswerKind.INTEGER,
    dev_block=200,
    sizes={Split.TRAIN: 300, Split.DEV: 200, Split.TEST: 200},
    text="Add two numbers.",
)
PROGRAM = TASK.model_copy(update={"kind": TaskKind.PROGRAM, "answer": AnswerKind.LABEL})
EXAMPLES = [Example(Problem(f"t{i}", f"Add: {i} + {i} ="), str(2 * i)) for i in range(300)]
SECRET = [Example(Problem(f"s{i}", f"secret {i}"), f"hidden {i}") for i in range(9)]
ALIVE = RewardProbe(((0.0, 1.0, 0.0, 0.0),) * 8)

Surface = Callable[[Recipe], float]


def surface(recipe: Recipe) -> float:
    """How often a recipe is right, in the image of a small base model: the space's best is 0.43."""
    assert isinstance(recipe, SolveRecipe)
    chance = {Style.CHAT: 0.08, Style.CHAT_PREFILL: 0.18, Style.COMPLETION: 0.22}[recipe.style]
    if recipe.style is Style.COMPLETION:
        chance += {0: -0.15, 2: 0.0, 4: 0.05, 6: 0.08, 8: 0.09, 12: 0.07}[recipe.shots]
    elif recipe.style is Style.CHAT_PREFILL:
        chance += 0.12 * (recipe.opening == "restate") + 0.01 * recipe.shots
    else:
        chance += 0.02 * recipe.shots**0.5
    chance += 0.05 * (recipe.layout == "restate") + 0.01 * (recipe.shot_seed == 3)
    chance -= 0.03 * (recipe.instruction in ("careful", "steps")) + 0.02 * (recipe.extraction == "last_integer")
    chance -= 0.04 * recipe.temperature * (recipe.votes > 1)
    return max(0.0, chance)


class Trials:
    """A `try_out` over a surface: rewards are drawn once for each (recipe, problem), as the loop's record does."""

    def __init__(self, chance: Surface, seed: int = 0) -> None:
        self.chance, self.seed = chance, seed
        self.calls: list[tuple[list[Recipe], int]] = []

    def __call__(self, drafts: Sequence[ScaffoldDraft], problems: int) -> Sequence[TrialResult]:
        recipes = [recipe for draft in drafts if (recipe := parse_recipe(draft.recipe)) is not None]
        assert len(recipes) == len(drafts)
        self.calls.append((recipes, problems))
        results = []
        for recipe in recipes:
            draw = random.Random(f"{self.seed} {recipe.model_dump_json()}")
            rewards = tuple(float(draw.random() < self.chance(recipe)) for _ in range(problems))
            results.append(TrialResult(rewards, {}))
        return results


def estimate(mean: float) -> Estimate:
    return Estimate(200, mean, mean - 0.07, mean + 0.07)


def first(task: TaskSpec = TASK, mean: float = 0.1) -> Attempt:
    recipe = OfflineMetaAgent().first_scaffold(task, EXAMPLES, 0).recipe
    return Attempt(1, Lever.FIRST, None, "s1", None, recipe, estimate(mean), True)


def harness(number: int, recipe: dict[str, JsonValue] | None, mean: float, accepted: bool, parent: int = 1) -> Attempt:
    return Attempt(number, Lever.HARNESS, parent, f"s{number}", None, recipe, estimate(mean), accepted)


def evidence(archive: Sequence[Attempt], task: TaskSpec = TASK, incumbent: int = 1, left: int = 8) -> Evidence:
    return Evidence(task, archive, incumbent, left, None, None)


def decide(seen: Evidence, seed: int = 0, chance: Surface = surface) -> tuple[Decision, Trials]:
    trials = Trials(chance, seed)
    agent: FeedbackAgent = OfflineFeedbackAgent()
    return agent.decide(seen, EXAMPLES, seed, trials), trials


def rejected_twice() -> list[Attempt]:
    openings = [recipe.model_dump(mode="json") for recipe in SolveSpace(TASK).openings()]
    return [first(), harness(2, openings[0], 0.09, False), harness(3, openings[1], 0.08, False)]


def test_a_harness_decision_tries_recipes_beside_the_incumbents_and_proposes_the_best() -> None:
    decision, trials = decide(evidence([first()]))
    assert decision.lever is Lever.HARNESS
    assert decision.settings is None
    assert decision.draft is not None
    own = parse_recipe(first().recipe)
    rules = SearchRules()
    sizes = [(len(recipes), problems) for recipes, problems in trials.calls]
    assert sizes == [
        (rules.first_batch + 1, rules.problems),
        (rules.second_batch + 1, rules.problems),
        (rules.finalists + 1, rules.final_problems),
    ]
    assert all(recipes[-1] == own for recipes, _ in trials.calls)
    tried = [recipe for recipes, _ in trials.calls[:2] for recipe in recipes[:-1]]
    assert len(set(tried)) == len(tried)
    assert {recipe.style for recipe in tried if isinstance(recipe, SolveRecipe)} == set(Style)
    winner = parse_recipe(decision.draft.recipe)
    assert winner in trials.calls[-1][0][:-1]
    assert any(
        f"tried {rules.first_batch + rules.second_batch} recipes on {rules.problems} train problems" in reason
        for reason in decision.reasons
    )
    assert any(f"{rules.final_problems} train problems against" in reason for reason in decision.reasons)


def test_recipes_that_ask_often_are_few_in_a_batch() -> None:
    for seed in range(5):
        for recipes, problems in decide(evidence([first()]), seed)[1].calls[:2]:
            assert problems == SearchRules().problems
            batch = recipes[:-1]
            assert sum(recipe.asks_often for recipe in batch) <= max(1, len(batch) // 4)


def test_the_draft_is_its_recipe_rendered() -> None:
    decision, _ = decide(evidence([first()]))
    assert decision.draft is not None
    names: dict[str, object] = {}
    exec(decision.draft.files["agent.py"], names)
    assert callable(names["solve"])


def test_equal_evidence_gives_equal_decisions_and_another_seed_another_search() -> None:
    archive = [first(), harness(2, SolveSpace(TASK).openings()[0].model_dump(mode="json"), 0.3, True)]
    seen = evidence(archive, incumbent=2)
    one, first_trials = decide(seen, seed=5)
    two, second_trials = decide(seen, seed=5)
    assert one == two
    assert first_trials.calls == second_trials.calls
    assert decide(seen, seed=6)[1].calls != first_trials.calls


def test_nothing_archived_is_proposed_again_even_if_it_is_best() -> None:
    best = SolveSpace(TASK).openings()[1]
    archive = [first(), harness(2, best.model_dump(mode="json"), 0.05, False)]
    for seed in range(4):
        decision, trials = decide(evidence(archive), seed, lambda r: 0.9 if r == best else 0.1)
        assert decision.draft is not None
        assert parse_recipe(decision.draft.recipe) not in {best, parse_recipe(first().recipe)}
        assert all(best not in recipes for recipes, _ in trials.calls)


def test_where_none_looks_better_the_best_untried_goes_to_the_gate_and_the_reason_says_so() -> None:
    own = parse_recipe(first().recipe)
    decision, _ = decide(evidence([first(mean=0.8)]), chance=lambda r: 0.8 if r == own else 0.05)
    assert decision.draft is not None
    assert "none looked better than the incumbent" in decision.reasons[-1]


def test_the_incumbents_behaviour_in_other_words_is_not_worth_a_gate() -> None:
    own = SolveSpace(TASK).openings()[1]

    def same_at_any_length(drafts: Sequence[ScaffoldDraft], problems: int) -> Sequence[TrialResult]:
        plain = [draft.model_copy(update={"recipe": short(draft.recipe)}) for draft in drafts]
        return Trials(lambda r: 0.9 if r == own else 0.2)(plain, problems)

    def short(recipe: dict[str, JsonValue] | None) -> dict[str, JsonValue]:
        return {**(recipe or {}), "max_tokens": own.max_tokens}

    archive = [replace(first(mean=0.9), recipe=own.model_dump(mode="json"))]
    for seed in range(4):
        decision = OfflineFeedbackAgent().decide(evidence(archive), EXAMPLES, seed, same_at_any_length)
        assert decision.draft is not None
        proposed = parse_recipe(short(decision.draft.recipe))
        assert proposed != own


def test_what_was_tried_is_remembered_through_the_archive() -> None:
    decision, trials = decide(evidence([first()]))
    assert decision.draft is not None
    recorded = parse_trials(decision.draft.recipe)
    assert {trial.recipe for trial in recorded} == {r for recipes, _ in trials.calls for r in recipes[:-1]}
    archive = [first(), harness(2, decision.draft.recipe, 0.3, True)]
    _, later = decide(evidence(archive, incumbent=2), seed=0)
    again = {r for recipes, n in later.calls if n == SearchRules().problems for r in recipes[:-1]}
    assert not again & {trial.recipe for trial in recorded}


def test_a_remembered_margin_is_moved_to_todays_incumbent() -> None:
    decision, _ = decide(evidence([first()]))
    assert decision.draft is not None
    archive = [first(), harness(2, decision.draft.recipe, 0.3, True)]
    trials = {t.recipe: t for t in parse_trials(decision.draft.recipe)}
    own = parse_recipe(decision.draft.recipe)
    assert own is not None
    for tried in recalled_trials(evidence(archive, incumbent=2)):
        assert tried.margin == pytest.approx(trials[tried.recipe].margin - trials[own].margin)
    other_weights = [replace(archive[0], adapter_id=None), replace(archive[1], adapter_id="a1")]
    assert recalled_trials(evidence(other_weights, incumbent=2)) == []


def test_a_scaffold_of_another_author_can_be_the_incumbent() -> None:
    foreign = replace(first(), recipe=None)
    decision, trials = decide(evidence([foreign]))
    assert decision.draft is not None
    assert len(trials.calls[0][0]) == SearchRules().first_batch
    assert "not on the same problems" in decision.reasons[-1]


def test_the_weight_lever_is_due_before_the_probe_and_pulled_with_it() -> None:
    agent = OfflineFeedbackAgent()
    waiting = evidence(rejected_twice())
    assert not agent.needs_probe(evidence(rejected_twice()[:2]))
    assert agent.needs_probe(waiting)
    assert not agent.needs_probe(replace(waiting, trainable="an API model"))
    decision = agent.decide(replace(waiting, probe=ALIVE), EXAMPLES, 0, Trials(surface))
    assert decision.lever is Lever.WEIGHTS
    assert decision.draft is None
    assert decision.settings is not None
    assert decision.settings.objective is Objective.GRPO
    assert decision.reasons[-1] == "starts from the base model"


def test_the_size_of_a_weight_update_is_the_callers_and_the_objective_is_not() -> None:
    sparse = RewardProbe(((0.0,) * 8,) * 15 + ((0.0,) * 7 + (1.0,),))
    seen = replace(evidence(rejected_twice()), probe=sparse)
    agent = OfflineFeedbackAgent(update={"iterations": 4, "samples": 6})
    settings = agent.decide(seen, EXAMPLES, 0, Trials(surface)).settings
    assert settings == TrainSettings(objective=Objective.BEST_OF_N, iterations=4, samples=6)


def test_a_later_weight_update_goes_on_from_the_incumbents_adapter() -> None:
    archive = rejected_twice()
    trained = Attempt(4, Lever.WEIGHTS, 1, "s1", "adapter-4", archive[0].recipe, estimate(0.3), True)
    after = [replace(attempt, generation=number, parent=4) for number, attempt in ((5, archive[1]), (6, archive[2]))]
    seen = replace(evidence([*archive, trained, *after], incumbent=4), probe=ALIVE)
    decision = OfflineFeedbackAgent().decide(seen, EXAMPLES, 0, Trials(surface))
    assert decision.lever is Lever.WEIGHTS
    assert decision.reasons[-1] == "goes on from adapter adapter-4"


def test_no_candidate_left_stops_without_a_trial() -> None:
    decision, trials = decide(evidence([first()], left=0))
    assert (decision.lever, decision.draft, decision.settings) == (Lever.STOP, None, None)
    assert trials.calls == []


class OneChoice(SolveSpace):
    """A space of two recipes, to be used up."""

    def __init__(self, task: TaskSpec) -> None:
        super().__init__(task)
        self.axes = {axis: values[:1] for axis, values in self.axes.items()} | {"shots": (0, 2)}

    def openings(self) -> Sequence[SolveRecipe]:
        return []


def test_a_space_used_up_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents.feedback_agent, "space_for", OneChoice)
    space = OneChoice(TASK)
    both = [space.build({axis: values[i % len(values)] for axis, values in space.axes.items()}) for i in (0, 1)]
    zero, two = (recipe.model_dump(mode="json") for recipe in both)
    half = evidence([replace(first(), recipe=zero)])
    decision, trials = decide(half)
    assert decision.draft is not None
    assert parse_recipe(decision.draft.recipe) == both[1]
    assert trials.calls[0][0] == [both[1], both[0]]
    full = replace(evidence([replace(first(), recipe=zero), harness(2, two, 0.1, False)]), trainable="no weights")
    decision, _ = decide(full)
    assert decision.lever is Lever.STOP
    assert any("no untried recipe" in reason for reason in decision.reasons)


def test_a_program_task_gets_two_whole_runs_and_finds_the_linear_svm() -> None:
    def accuracy(recipe: Recipe) -> float:
        assert isinstance(recipe, ProgramRecipe)
        return {Classifier.LINEAR_SVC: 0.79, Classifier.SGD_HUBER: 0.78}.get(recipe.classifier, 0.7)

    runs: list[int] = []

    def whole_runs(drafts: Sequence[ScaffoldDraft], problems: int) -> Sequence[TrialResult]:
        runs.append(len(drafts))
        recipes = [recipe for draft in drafts if (recipe := parse_recipe(draft.recipe)) is not None]
        return [TrialResult((accuracy(recipe),) * 900, {}) for recipe in recipes]

    decision = OfflineFeedbackAgent().decide(evidence([first(PROGRAM, 0.72)], PROGRAM), EXAMPLES, 0, whole_runs)
    assert runs == [SearchRules().program_drafts]
    assert decision.draft is not None
    proposed = parse_recipe(decision.draft.recipe)
    assert isinstance(proposed, ProgramRecipe)
    assert proposed.classifier is Classifier.LINEAR_SVC


def test_no_answer_but_the_shot_pools_reaches_a_draft() -> None:
    examples = [*EXAMPLES[:SHOT_POOL], *SECRET]

    def watch(drafts: Sequence[ScaffoldDraft], problems: int) -> Sequence[TrialResult]:
        for draft in drafts:
            assert "secret" not in draft.model_dump_json()
            assert "hidden" not in draft.model_dump_json()
        return Trials(surface)(drafts, problems)

    decision = OfflineFeedbackAgent().decide(evidence([first()]), examples, 0, watch)
    assert "secret" not in decision.model_dump_json()


def improve(seed: int, decisions: int) -> float:
    """Play harness Decisions with a gate on 200 noisy dev problems; the chance of the incumbent at the end."""
    draw = random.Random(seed)

    def measured(recipe: Recipe) -> Estimate:
        return estimate(sum(draw.random() < surface(recipe) for _ in range(200)) / 200)

    archive = [first()]
    incumbent = 1
    for number in range(2, 2 + decisions):
        decision, _ = decide(replace(evidence(archive, incumbent=incumbent), trainable="harness only"), seed)
        assert decision.draft is not None
        recipe = parse_recipe(decision.draft.recipe)
        assert recipe is not None
        dev = measured(recipe)
        before = archive[incumbent - 1].dev
        assert before is not None
        accepted = dev.mean > before.mean + 0.06
        archive.append(Attempt(number, Lever.HARNESS, incumbent, "s", None, decision.draft.recipe, dev, accepted))
        incumbent = number if accepted else incumbent
    found = parse_recipe(archive[incumbent - 1].recipe)
    assert found is not None
    return surface(found)


def test_three_decisions_come_near_the_best_recipe_of_a_noisy_surface() -> None:
    space, draw = SolveSpace(TASK), random.Random(0)
    random_chances = sorted(
        surface(space.build({axis: draw.choice(values) for axis, values in space.axes.items()})) for _ in range(2000)
    )
    reached = [improve(seed, decisions=3) for seed in range(12)]
    # The space's best is 0.43, a random recipe's median about 0.19. Near-best here: among the best twentieth.
    best_twentieth = random_chances[int(0.95 * len(random_chances))]
    assert statistics.median(reached) >= best_twentieth
    assert min(reached) >= random_chances[int(0.8 * len(random_chances))]


words = st.lists(st.sampled_from("hHwW"), max_size=5)


@settings(max_examples=25, deadline=None)
@given(words, st.integers(0, 4), st.booleans(), st.booleans())
def test_a_decision_carries_what_its_lever_needs_and_nothing_else(
    history: list[str], left: int, trainable: bool, probed: bool
) -> None:
    recipes = [recipe.model_dump(mode="json") for recipe in SolveSpace(TASK).openings()]
    archive = [first()]
    for number, letter in enumerate(history, start=2):
        lever = Lever.HARNESS if letter in "hH" else Lever.WEIGHTS
        attempt = harness(number, recipes[number % 3], 0.1, letter.isupper())
        archive.append(replace(attempt, lever=lever))
    seen = Evidence(TASK, archive, 1, left, None if trainable else "no weights", ALIVE if probed else None)
    quick = OfflineFeedbackAgent(search=SearchRules(first_batch=2, second_batch=1, problems=4, final_problems=4))
    decision = quick.decide(seen, EXAMPLES, 1, Trials(surface))
    assert (decision.draft is not None) == (decision.lever is Lever.HARNESS)
    assert (decision.settings is not None) == (decision.lever is Lever.WEIGHTS)
    assert decision.reasons
    if not trainable or not probed:
        assert decision.lever is not Lever.WEIGHTS
    if decision.lever is Lever.WEIGHTS:
        assert quick.needs_probe(seen)
