"""`sia eval`: one scaffold scored for real, and what a scaffold gains by doing the model's work itself: nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.control import RunProblem, execute_run
from flows.evaluate import Evaluation, evaluate_scaffold
from flows.settings import load_run_settings
from flows.state.database import Database
from flows.state.store import Store, run_names
from flows.watch import QuietProgress
from tasks.contract import Split
from tests.flows.loops import EVEN_LENGTH, places_in

COMPUTES = """
def solve(problem, tools):
    a, b = [int(word) for word in problem["prompt"].split() if word.isdigit()]
    {call}
    return str(a + b)
"""
ASKS = "def solve(problem, tools):\n    return tools.complete(problem['prompt'], max_tokens=4, temperature=1.0)\n"


def evaluate(
    folder: Path, model: Path, task: str, source: str, problems: int = 8, split: Split = Split.DEV
) -> tuple[Evaluation, Store]:
    scaffold = folder / "scaffold"
    scaffold.mkdir(parents=True, exist_ok=True)
    (scaffold / "agent.py").write_text(source)
    places = places_in(folder / "home")
    settings = load_run_settings("offline", {"model": str(model)}, folder)
    found = evaluate_scaffold(places, task, scaffold, None, split, settings, problems, QuietProgress())
    return found, Store(Database.open(places.database_url), found.run_id)


@pytest.mark.parametrize("call", ["pass", "tools.complete(problem['prompt'], max_tokens=2)"])
def test_a_scaffold_that_computes_the_answer_itself_scores_0(tmp_path: Path, tiny: Path, call: str) -> None:
    found, store = evaluate(tmp_path, tiny, "chain-sum", COMPUTES.format(call=call))
    assert (found.n, found.mean, found.causes) == (8, 0.0, {"finished": 8})
    episodes = store.episodes(found.rollout_id)
    assert all(int(str(e.answer)) > 0 for e in episodes), "it did answer, and rightly"


def test_an_evaluation_is_recorded_and_its_denominator_fixed(tmp_path: Path, tiny: Path) -> None:
    half = ASKS.replace("return", "if problem['id'].endswith(('1', '3')): raise ValueError('no')\n    return")
    found, store = evaluate(tmp_path, tiny, str(EVEN_LENGTH), half, problems=10)
    assert found.n == 10
    assert found.causes["crashed"] == 2
    assert found.low <= found.mean <= found.high
    assert found.text().startswith("even-length dev: ")
    assert len(store.rewards(found.rollout_id)) == 10
    assert store.test_reads() == []


def test_reading_the_sealed_test_is_recorded(tmp_path: Path, tiny: Path) -> None:
    found, store = evaluate(tmp_path, tiny, str(EVEN_LENGTH), ASKS, problems=4, split=Split.TEST)
    assert [(read.arm, read.rollout_id) for read in store.test_reads()] == [("eval", found.rollout_id)]


def test_an_evaluation_is_no_run_to_resume(tmp_path: Path, tiny: Path) -> None:
    found, store = evaluate(tmp_path, tiny, str(EVEN_LENGTH), ASKS, problems=2)
    places = places_in(tmp_path / "home")
    execute_run(places, found.run_id, QuietProgress())  # finished: nothing to do
    with store.database.session() as session:
        row = store.run()
        row.status = "interrupted"
        session.add(row)
    with pytest.raises(RunProblem, match="do it again with `sia eval`"):
        execute_run(places, found.run_id, QuietProgress())
    assert run_names(store.database) == [found.run_id]
    assert store.test_reads() == []


def test_a_program_is_refused_by_a_solve_task(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(RunProblem, match="asks for a 'solve' scaffold, this is a 'program' one"):
        evaluate(tmp_path, tiny, str(EVEN_LENGTH), "print('hello')\n")


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "scaffold").mkdir()
    (tmp_path / "scaffold" / "agent.py").write_text(ASKS)
    settings = load_run_settings("offline", {"model": str(tiny)}, tmp_path)
    with pytest.raises(RunProblem, match=r"no adapter_config\.json"):
        evaluate_scaffold(
            places_in(tmp_path / "home"),
            str(EVEN_LENGTH),
            tmp_path / "scaffold",
            tmp_path,
            Split.DEV,
            settings,
            2,
            QuietProgress(),
        )
