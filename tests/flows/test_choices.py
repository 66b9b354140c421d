"""Choosing: which problems, which arms, and what a decision remembers of the ones before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.archive import Lever
from agents.decision import SHOT_POOL, Decision, Evidence, ScaffoldDraft, TryOut
from agents.recipes import parse_trials, space_for
from flows.control import RunProblem, start_run
from flows.keys import draw, keyed_seed
from flows.state.database import Database
from flows.state.store import Store
from flows.state.tables import GateVerdictRow
from flows.watch import QuietProgress
from flows.work import choices
from flows.workshop import Workshop
from tasks.contract import Example, Split
from tests.flows.loops import EVEN_LENGTH, places_in, small_settings


@pytest.fixture
def shop(tmp_path: Path, tiny: Path) -> Iterator[Workshop]:
    places = places_in(tmp_path)
    name = start_run(places, str(EVEN_LENGTH), small_settings(tiny), "choices")
    database = Database.open(places.database_url)
    shop = Workshop(places, database, name, QuietProgress())
    yield shop
    shop.close()
    database.close()


def candidate(
    store: Store, number: int, incumbent: int, difference: float, accepted: bool, adapter: str | None = None
) -> None:
    """A judged candidate, as rows."""
    if adapter is not None:
        store.save_adapter(adapter, "tiny", None)
    store.save_scaffold(f"s{number}", "solve", "")
    store.begin_generation(number, Lever.HARNESS, incumbent, scaffold_id=f"s{number}", adapter_id=adapter)
    store.save_verdict(
        GateVerdictRow(
            run_id=store.run_id,
            gate=number - 1,
            generation=number,
            incumbent=incumbent,
            slot="",
            accepted=accepted,
            n=12,
            difference=difference,
            low=-1,
            high=1,
            p_value=0.5,
            alpha=0.01,
            minimum_detectable=0.5,
            text="",
        )
    )


def test_h_is_ranked_by_paired_differences_not_by_raw_dev_means(shop: Workshop) -> None:
    choices.synthesise(shop, 1)
    store = shop.store
    candidate(store, 2, incumbent=1, difference=0.3, accepted=True)
    candidate(store, 3, incumbent=2, difference=0.0, accepted=False)
    arms = choices.choose_arms(shop)
    assert {arm: row.number for arm, row in arms.items()} == {"initial": 1, "harness_only": 2, "winner": 2}
    candidate(store, 4, incumbent=2, difference=0.02, accepted=False)
    assert choices.choose_arms(shop)["harness_only"].number == 4, "a rejected one that looked better is H"
    candidate(store, 5, incumbent=2, difference=0.4, accepted=True, adapter="a")
    candidate(store, 6, incumbent=5, difference=0.2, accepted=True, adapter="a")
    arms = choices.choose_arms(shop)
    assert {arm: row.number for arm, row in arms.items()} == {"initial": 1, "harness_only": 4, "winner": 6}


def test_fresh_blocks_do_not_overlap_and_training_never_asks_what_prompts_show(shop: Workshop) -> None:
    choices.synthesise(shop, 1)
    row = shop.store.incumbent()
    blocks = [{e.problem_id for e in shop.store.episodes(choices.plan_dev(shop, row, gate))} for gate in range(4)]
    assert all(len(block) == 12 for block in blocks)
    assert len(set().union(*blocks)) == 48
    shown = {p.id for p in shop.task.problems(Split.TRAIN)[:SHOT_POOL]}
    probe = shop.store.episodes(choices.plan_probe(shop, 1))
    assert not shown & {e.problem_id for e in probe}
    assert len(probe) == 4 * 4
    assert len({e.seed for e in probe}) == len(probe)


class Curious:
    """Proposes a recipe with a record of what it tried, and keeps the evidence it was shown."""

    def __init__(self) -> None:
        self.seen: list[Evidence] = []

    def needs_probe(self, evidence: Evidence) -> bool:
        return False

    def decide(self, evidence: Evidence, examples: Sequence[Example], seed: int, try_out: TryOut) -> Decision:
        self.seen.append(evidence)
        recipe = space_for(evidence.task).first().model_dump(mode="json")
        trial = {
            "recipe": recipe,
            "adapter_id": None,
            "n": 4,
            "mean": 0.5,
            "margin": 0.1,
        }
        draft = ScaffoldDraft(
            files={"agent.py": "def solve(problem, tools):\n    return tools.complete('x', max_tokens=1)\n"},
            note="curious",
            recipe={**recipe, "trials": [trial]},
        )
        assert len(try_out([draft], 3)) == 1
        return Decision(lever=Lever.HARNESS, reasons=("so",), draft=draft)


def test_a_decision_sees_the_trials_of_the_one_before(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The try-out stores the same files before the decision does; the record of the trials must outlive that."""
    agent = Curious()
    monkeypatch.setattr(Workshop, "feedback_agent", property(lambda self: agent))
    choices.synthesise(shop, 1)
    choices.decide(shop, 1, None)
    row = choices.begin_candidate(shop, 2)
    assert row.note == "curious"
    choices.decide(shop, 2, None)
    trials = parse_trials(agent.seen[1].archive[1].recipe)
    assert [(t.n, t.mean, t.margin) for t in trials] == [(4, 0.5, 0.1)]
    assert parse_trials(agent.seen[1].archive[0].recipe) == []


def test_a_run_that_dev_cannot_serve_is_refused_at_once(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(RunProblem, match="--generations 10 or fewer"):
        start_run(places_in(tmp_path), str(EVEN_LENGTH), small_settings(tiny, generations=11), None)


@given(st.lists(st.integers(), unique=True, max_size=30), st.integers(0, 40), st.text())
def test_draws_depend_on_their_key_alone(items: list[int], count: int, key: str) -> None:
    drawn = draw(items, count, key)
    assert drawn == draw(items, count, key)
    assert len(set(drawn)) == len(drawn) == min(count, len(items))
    assert set(drawn) <= set(items)


@given(st.lists(st.text(), min_size=1), st.lists(st.text(), min_size=1))
def test_seeds_tell_keys_apart(a: list[str], b: list[str]) -> None:
    assert 0 <= keyed_seed(*a) < 2**53
    if "\x1f".join(a) != "\x1f".join(b):
        assert keyed_seed(*a) != keyed_seed(*b)
