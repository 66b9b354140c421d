"""The loop itself: both levers interleaved, a fault in each step, and what a Run leaves behind."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from agents.archive import Lever, Objective
from agents.decision import Decision, Evidence, ScaffoldDraft, TrainSettings, TryOut
from flows.control import execute_run, start_run
from flows.settings import Places
from flows.state.database import Database
from flows.state.store import Store
from flows.views import RunView, run_view
from flows.watch import QuietProgress
from flows.work import choices, rollouts, weights
from flows.workshop import Workshop
from tasks.contract import Example
from tests.flows.loops import EVEN_LENGTH, environment, places_in, sia, small_settings


@pytest.fixture(scope="module")
def prefect_server(prefect_url: str) -> Iterator[str]:
    """This process's Prefect talks to the session's server (one and the same for all: its event client is kept)."""
    from prefect.context import refresh_global_settings_context

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", prefect_url)
        refresh_global_settings_context()
        yield prefect_url
    refresh_global_settings_context()


class Scripted:
    """A Feedback-Agent that pulls given levers in turn; its scaffolds differ in a comment only."""

    def __init__(self, levers: Sequence[Lever]) -> None:
        self.levers = levers

    def needs_probe(self, evidence: Evidence) -> bool:
        return self.levers[len(evidence.archive) - 1] is Lever.WEIGHTS

    def decide(self, evidence: Evidence, examples: Sequence[Example], seed: int, try_out: TryOut) -> Decision:
        turn = len(evidence.archive)
        lever = self.levers[turn - 1]
        if lever is Lever.WEIGHTS:
            assert evidence.probe is not None
            assert all(len(group) == 8 for group in evidence.probe.groups)
            settings = TrainSettings(
                objective=Objective.GRPO, iterations=3, problems=6, samples=8, learning_rate=0.02, rank=8
            )
            return Decision(lever=lever, reasons=("scripted",), settings=settings)
        source = f"# {turn}\ndef solve(problem, tools):\n    return tools.complete(problem['prompt'], max_tokens=4)\n"
        draft = ScaffoldDraft(files={"agent.py": source}, note=f"scripted {turn}")
        assert try_out([draft], 4)[0].rewards
        return Decision(lever=lever, reasons=("scripted",), draft=draft)


def script(monkeypatch: pytest.MonkeyPatch, levers: Sequence[Lever]) -> None:
    monkeypatch.setattr(Workshop, "feedback_agent", property(lambda self: Scripted(levers)))


def run(places: Places, model: Path, **settings: object) -> RunView:
    name = start_run(places, str(EVEN_LENGTH), small_settings(model, **settings), "loop")
    execute_run(places, name, QuietProgress())
    database = Database.open(places.database_url)
    try:
        return run_view(database, name)
    finally:
        database.close()


def test_levers_interleave_and_the_second_update_goes_on_from_the_firsts_adapter(
    tmp_path: Path, tiny: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, [Lever.HARNESS, Lever.WEIGHTS, Lever.HARNESS, Lever.WEIGHTS])
    # What the gate says is not this test's subject: updates pass, so that the second has an adapter to go on from.
    accepting(monkeypatch, lambda row: row.lever == Lever.WEIGHTS)
    places = places_in(tmp_path)
    settings = {"weights.samples": 8, "weights.problems": 6}
    view = run(places, tiny, generations=5, **settings)
    assert [g.lever for g in view.generations] == ["first", "harness", "weights", "harness", "weights"]
    assert [g.accepted for g in view.generations] == [True, False, True, False, True]
    assert [g.parent for g in view.generations] == [None, 1, 1, 3, 3]
    first, second = view.generations[2], view.generations[4]
    assert view.generations[3].adapter_id == first.adapter_id, "a harness candidate keeps the incumbent's adapter"
    database = Database.open(places.database_url)
    from sqlmodel import select

    from flows.state.tables import AdapterRow, WeightUpdateRow

    with database.session() as session:
        updates = session.exec(select(WeightUpdateRow).order_by(WeightUpdateRow.generation)).all()  # type: ignore[arg-type]
        parents = {row.id: row.parent_id for row in session.exec(select(AdapterRow))}
    database.close()
    assert [u.start_adapter_id for u in updates] == [None, first.adapter_id]
    chain = [second.adapter_id]
    while (parent := parents[chain[-1] or ""]) is not None:
        chain.append(parent)
    assert first.adapter_id in chain
    assert len(chain) == 6, "three committed iterations each"
    assert {arm.arm for arm in view.test} == {"initial", "harness_only", "winner"}
    assert all(arm.n == 16 for arm in view.test)
    report = places.run_folder("loop") / "report.html"
    assert report.stat().st_size > 10_000


def accepting(monkeypatch: pytest.MonkeyPatch, rule: Callable[[object], bool]) -> None:
    """The gate measures as always, and then says what `rule` says of the candidate."""
    judged = choices.judge_candidate

    def judge(shop: Workshop, number: int, pair: tuple[int, int] | None) -> object:
        row = judged(shop, number, pair)
        row.accepted = rule(shop.store.generation(number))
        shop.store.save_verdict(row)
        return row

    monkeypatch.setattr(choices, "judge_candidate", judge)


FAULTS = {
    "scaffold synthesis": (choices, "synthesise"),
    "sandboxed rollout": (rollouts, "run_shard"),
    "verifier scoring": (rollouts, "score_rollout"),
    "feedback decision": (choices, "decide"),
    "conditional training": (weights, "train_step"),
}


def test_a_transient_fault_in_each_step_retries_that_step_alone(
    tmp_path: Path, tiny: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import steps

    by_name = {
        task.name: task for task in vars(steps).values() if hasattr(task, "task_run_name") and hasattr(task, "retries")
    }
    assert set(by_name) == set(FAULTS), "a fault is injected into each of the steps"
    script(monkeypatch, [Lever.WEIGHTS])
    calls: dict[str, list[str]] = {name: [] for name in FAULTS}
    for name, (module, function) in FAULTS.items():
        real = getattr(module, function)

        def first_fails(
            shop: Workshop, *args: object, _real: Callable[..., object] = real, _seen: list[str] = calls[name]
        ) -> object:
            _seen.append(repr(args))
            if len(_seen) == 1:
                raise ConnectionError("injected")
            return _real(shop, *args)

        monkeypatch.setattr(module, function, first_fails)
    view = run(places_in(tmp_path), tiny, generations=2, **{"weights.samples": 8, "weights.problems": 6})
    assert view.status == "finished"
    for name, seen in calls.items():
        times = Counter(seen)
        assert times.pop(seen[0]) == 2, f"{name}: the faulted piece of work is done again, once"
        assert set(times.values()) <= {1}, f"{name}: no other piece of work is repeated"


def test_infrastructure_that_keeps_failing_stops_the_run_and_loses_nothing(
    tmp_path: Path, tiny: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.control import RunProblem
    from training.engine import LocalEngine

    script(monkeypatch, [Lever.HARNESS])
    places = places_in(tmp_path)
    with monkeypatch.context() as broken:

        def dead(self: LocalEngine) -> object:
            raise RuntimeError("no such device")

        broken.setattr(LocalEngine, "_load", dead)
        with pytest.raises(RunProblem, match="sia resume loop"):
            run(places, tiny, generations=2)
    database = Database.open(places.database_url)
    store = Store(database, "loop")
    assert store.run().status == "failed"
    assert store.unfinished_episodes(1), "what was not measured is still to be made, not scored 0"
    assert store.rewards(1) == {}
    database.close()
    assert run(places, tiny, generations=2).status == "finished"


def test_the_real_command_on_the_real_model(tmp_path: Path, smollm: Path, prefect_url: str) -> None:
    """`sia run chain-sum`, small: real model, sandbox, gateway, server, gate, report."""
    places = places_in(tmp_path)
    small = ["dev_block=24", "test_problems=24", "search.first_batch=2", "search.second_batch=0"]
    small += ["search.problems=8", "search.finalists=1", "search.final_problems=8"]
    arguments = ["run", "chain-sum", "--generations", "2", "--name", "real", "--json"]
    process = sia([*arguments, *(part for pair in small for part in ("--set", pair))], environment(places, prefect_url))
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    events = [json.loads(line) for line in out.splitlines()]
    result = events[-1]
    assert result["event"] == "result"
    assert result["status"] == "finished"
    assert [arm["n"] for arm in result["test"]] == [24, 24, 24]
    assert all(0 <= arm["low"] <= arm["mean"] <= arm["high"] <= 1 for arm in result["test"])
    assert {"generation", "step"} <= {event["event"] for event in events}
    assert Path(result["report"]).is_file()
