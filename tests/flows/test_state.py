"""The state store: schema, idempotence, and what counts as recorded."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine, inspect
from sqlmodel import SQLModel, select

from agents.archive import Lever, Objective
from agents.calls import CallKey
from agents.decision import Decision
from agents.episode import CAUSES, Cause, EpisodeResult
from agents.model import Completion, Message, ModelRequest, Sampling
from flows.state.calls import SqlCallRecorder, pack_ids, pack_logprobs, unpack_ids, unpack_logprobs
from flows.state.database import Database, StateError, connect, current_revision, migrate, newest_revision
from flows.state.rollout_rows import RolloutPlan
from flows.state.store import Store, create_run, find_run
from flows.state.tables import EpisodeRow, GateVerdictRow, ModelCallRow, RunRow, RunStatus, SpendingRow, WorkStatus


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database.open(f"sqlite:///{tmp_path / 'sia.db'}")
    yield database
    database.close()


@pytest.fixture
def store(database: Database) -> Store:
    create_run(database, RunRow(id="run-1", task="t", task_digest="d", profile="offline", seed=0, settings={}))
    store = Store(database, "run-1")
    store.save_scaffold("s1", "solve", "first")
    store.save_scaffold("s2", "solve", "second")
    return store


ITEMS = [(f"p{i}", sample) for i in range(3) for sample in range(2)]


def open_rollout(store: Store, slot: str = "dev/00", scaffold: str = "s1", adapter: str | None = None) -> int:
    plan = RolloutPlan(slot, scaffold, adapter, generation=1, split="dev", items=ITEMS)
    return store.open_rollout(plan, seeds=range(len(ITEMS)), shard_episodes=4)


def schema(engine_url: str, build: str) -> dict[str, object]:
    engine = connect(engine_url)
    if build == "migrations":
        migrate(engine)
    else:
        SQLModel.metadata.create_all(engine)
    look = inspect(engine)
    found = {
        table: (
            {c["name"]: (str(c["type"]), c["nullable"]) for c in look.get_columns(table)},
            sorted(tuple(u["column_names"]) for u in look.get_unique_constraints(table)),
            sorted((tuple(f["constrained_columns"]), f["referred_table"]) for f in look.get_foreign_keys(table)),
            sorted(tuple(i["column_names"]) for i in look.get_indexes(table)),
        )
        for table in look.get_table_names()
        if table != "alembic_version"
    }
    engine.dispose()
    return found


def test_migrations_make_what_the_tables_say(tmp_path: Path) -> None:
    migrated = schema(f"sqlite:///{tmp_path / 'a.db'}", "migrations")
    declared = schema(f"sqlite:///{tmp_path / 'b.db'}", "create_all")
    assert migrated == declared
    assert set(migrated) == set(SQLModel.metadata.tables)
    assert "episodes" in migrated


def test_migrations_go_down_and_up_again(tmp_path: Path) -> None:
    engine = connect(f"sqlite:///{tmp_path / 'a.db'}")
    migrate(engine)
    assert current_revision(engine) == newest_revision()
    from alembic import command
    from alembic.config import Config

    from flows.state.database import MIGRATIONS

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    assert current_revision(engine) is None
    migrate(engine)
    assert current_revision(engine) == newest_revision()
    engine.dispose()


def test_sqlite_is_opened_safely(database: Database) -> None:
    with database.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 30000


def test_unknown_database_url_names_the_fix() -> None:
    with pytest.raises(StateError, match="SIA_DATABASE_URL"):
        connect("mysql://nobody")


def test_unreachable_database_is_one_line() -> None:
    with pytest.raises(StateError) as caught:
        Database.open("postgresql://sia@127.0.0.1:9/none")
    assert "\n" not in str(caught.value)


def test_run_names_are_unique(database: Database, store: Store) -> None:
    with pytest.raises(StateError, match="run-1"):
        create_run(database, RunRow(id="run-1", task="t", task_digest="", profile="p", seed=0, settings={}))
    assert find_run(database, "nobody") is None


def test_run_status_and_time(store: Store) -> None:
    store.set_status(RunStatus.RUNNING, owner="here:1")
    store.add_active_time(2.0)
    store.add_active_time(1.5)
    row = store.run()
    assert (row.status, row.owner, row.active_s, row.finished_at) == ("running", "here:1", 3.5, None)
    store.set_status(RunStatus.FINISHED)
    assert store.run().finished_at is not None
    with pytest.raises(StateError, match="sia list"):
        Store(store.database, "nobody").run()


def test_a_rollout_is_opened_once(store: Store) -> None:
    first = open_rollout(store)
    assert open_rollout(store) == first
    assert open_rollout(store, scaffold="s2") != first
    assert open_rollout(store, slot="dev/01") != first
    assert len(store.episodes(first)) == len(ITEMS)
    assert store.unfinished_shards(first) == [0, 1]
    assert [e.problem_id for e in store.unfinished_episodes(first, 1)] == ["p2", "p2"]


def test_every_cause_is_in_the_table_and_only_measurements_end_an_episode(store: Store) -> None:
    assert set(CAUSES) == set(Cause)
    rollout = open_rollout(store)
    episode = store.episodes(rollout)[0].id
    assert episode is not None
    for cause, meaning in CAUSES.items():
        if not meaning.measures:
            store.finish_episodes([EpisodeResult(episode, cause, None, 0.1, detail="gone")])
    row = store.episodes(rollout)[0]
    assert row.status == WorkStatus.INTENDED
    assert row.infrastructure_failures == sum(not m.measures for m in CAUSES.values())


def test_a_recorded_ending_never_changes(store: Store) -> None:
    rollout = open_rollout(store)
    episode = store.episodes(rollout)[0].id
    assert episode is not None
    store.finish_episodes([EpisodeResult(episode, Cause.FINISHED, {"a": [1]}, 0.5, events=("x",))])
    store.finish_episodes([EpisodeResult(episode, Cause.CRASHED, None, 9.0)])
    store.finish_episodes([EpisodeResult(episode, Cause.SANDBOX_LOST, None, 9.0)])
    row = store.episodes(rollout)[0]
    assert (row.status, row.answer, row.events, row.wall_s) == ("done", {"a": [1]}, ["x"], 0.5)


def test_scores_close_a_rollout_and_are_written_once(store: Store) -> None:
    rollout = open_rollout(store)
    ids = [e.id or 0 for e in store.episodes(rollout)]
    store.save_scores(rollout, [(i, 1.0, "right") for i in ids])
    store.save_scores(rollout, [(i, 0.0, "wrong") for i in ids])
    assert store.rollout(rollout).status == WorkStatus.DONE
    assert store.rewards(rollout) == dict.fromkeys(ITEMS, 1.0)
    assert [r.id for r in store.rollouts("dev/", "s1", None)] == [rollout]
    assert store.rollouts("dev/", "s1", "another") == []


def test_generations_decisions_and_verdicts_are_found_again(store: Store) -> None:
    store.begin_generation(1, Lever.FIRST, None)
    store.complete_generation(1, scaffold_id="s1", note="plain chat", accepted=True)
    again = store.begin_generation(1, Lever.HARNESS, None, scaffold_id="s2")
    assert (again.lever, again.scaffold_id, again.status) == ("first", "s1", "done")
    store.begin_generation(2, Lever.HARNESS, 1, scaffold_id="s2")
    decision = store.save_decision(1, Decision(lever=Lever.HARNESS, reasons=("because",)), "s2", {"n": 1})
    assert store.save_decision(1, Decision(lever=Lever.STOP, reasons=("no",)), None, None).id == decision.id
    assert store.incumbent().number == 1

    def verdict(accepted: bool) -> GateVerdictRow:
        return GateVerdictRow(
            run_id="run-1", gate=1, generation=2, incumbent=1, slot="dev/01", accepted=accepted, n=4, difference=0.5,
            low=0.1, high=0.9, p_value=0.01, alpha=0.025, minimum_detectable=0.3, text="better",
        )  # fmt: skip

    store.save_verdict(verdict(True))
    found = store.verdict(1)
    assert found is not None
    assert found.text == "better"
    assert store.incumbent().number == 2
    assert store.verdict(2) is None


def test_weight_updates_and_spending_are_booked_once(store: Store) -> None:
    first = store.begin_weight_update(5, Objective.GRPO, {"iterations": 2}, None)
    assert store.begin_weight_update(5, Objective.BEST_OF_N, {}, None).id == first.id
    store.spend(5, "step", train_s=2.0)
    store.spend(5, "step", train_s=7.0, usd=1.0)
    with store.database.session() as session:
        assert {r.kind: r.amount for r in session.exec(select(SpendingRow))} == {"train_s": 2.0, "usd": 1.0}


REQUEST = ModelRequest(Sampling(1.0, 1.0, 8, ("\n",)), seed=7, messages=(Message("user", "hi"),), adapter=None)
DONE = Completion("hello", (1, 2), (3, 4, 5), (-0.5, -0.25, -1.0), "stop")


def test_a_recorded_call_is_answered_from_the_record(store: Store) -> None:
    rollout = open_rollout(store)
    episode = store.episodes(rollout)[0].id
    assert episode is not None
    recorder = SqlCallRecorder(store.database)
    key = CallKey(episode, "digest", 0, "p0")
    assert recorder.recorded(key) is None
    recorder.begin(key, Sampling(temperature=0.0), REQUEST)
    assert recorder.recorded(key) is None
    recorder.failed(key, "engine died")
    recorder.begin(key, Sampling(temperature=0.0), REQUEST)
    assert recorder.finish(key, DONE, 0.2) == DONE
    assert recorder.finish(key, Completion("other", (), (), (), "stop"), 9.0) == DONE, "what is on record"
    recorder.failed(key, "too late")
    assert recorder.begin(key, Sampling(temperature=0.0), REQUEST) == DONE, "never an intent again"
    assert recorder.recorded(key) == DONE
    assert store.completions(rollout) == {episode: ["hello"]}
    assert store.tokens(rollout) == (2, 3)
    with store.database.session() as session:
        row = session.get_one(ModelCallRow, 1)
        assert row.sends == 2
        assert row.asked == {"temperature": 0.0, "top_p": 1.0, "max_tokens": 64, "stop": []}
        assert row.effective == {"temperature": 1.0, "top_p": 1.0, "max_tokens": 8, "stop": ["\n"], "seed": 7}
        assert row.request == {"messages": [{"role": "user", "content": "hi"}]}


def test_a_request_refused_as_bad_is_sent_once_however_often_it_is_made(store: Store) -> None:
    rollout = open_rollout(store)
    key = CallKey(store.episodes(rollout)[0].id or 0, "digest", 0, "p0")
    recorder = SqlCallRecorder(store.database)
    for _ in range(3):
        assert recorder.begin(key, REQUEST.sampling, REQUEST) is None
        recorder.failed(key, "RequestError: the prompt is too long")
    with store.database.session() as session:
        assert session.get_one(ModelCallRow, 1).sends == 1
    recorder.failed(key, "EngineError: RequestError: of another kind")
    recorder.begin(key, REQUEST.sampling, REQUEST)
    recorder.begin(key, REQUEST.sampling, REQUEST)
    with store.database.session() as session:
        row = session.get_one(ModelCallRow, 1)
        assert (row.sends, row.status) == (3, WorkStatus.INTENDED)


def test_unattributed_calls_are_never_trained_on(store: Store) -> None:
    rollout = open_rollout(store)
    episodes = [e.id or 0 for e in store.episodes(rollout)]
    recorder = SqlCallRecorder(store.database)
    for problem_id, episode in (("p0", episodes[0]), (None, episodes[1])):
        key = CallKey(episode, "d", 0, problem_id)
        recorder.begin(key, REQUEST.sampling, REQUEST)
        recorder.finish(key, DONE, 0.1)
    store.save_scores(rollout, [(i, 0.5, "x") for i in episodes])
    calls = {row.id: len(found) for row, _, found in store.training_calls(rollout)}
    assert calls[episodes[0]] == 1
    assert sum(calls.values()) == 1
    assert len(calls) == len(ITEMS)


def test_many_threads_write_at_once(store: Store) -> None:
    rollout = open_rollout(store)
    episodes = [e.id or 0 for e in store.episodes(rollout)]
    recorder = SqlCallRecorder(store.database)

    def work(i: int) -> None:
        key = CallKey(episodes[i % len(episodes)], f"d{i}", 0, "p")
        recorder.begin(key, REQUEST.sampling, REQUEST)
        recorder.finish(key, DONE, 0.0)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(120)))
    assert sum(len(t) for t in store.completions(rollout).values()) == 120


def test_a_session_rolls_back_whole(store: Store) -> None:
    rollout = open_rollout(store)

    def killed_midway() -> None:
        with store.database.session() as session:
            session.get_one(EpisodeRow, store.episodes(rollout)[0].id).status = WorkStatus.DONE
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        killed_midway()
    assert store.episodes(rollout)[0].status == WorkStatus.INTENDED


@given(st.lists(st.integers(0, 2**31 - 1)), st.lists(st.floats(-50, 0, width=32)))
@settings(max_examples=50)
def test_tokens_and_logprobs_survive_packing(ids: list[int], logprobs: list[float]) -> None:
    assert unpack_ids(pack_ids(ids)) == tuple(ids)
    assert unpack_logprobs(pack_logprobs(logprobs)) == tuple(logprobs)


def test_engine_of_an_empty_file_has_no_revision(tmp_path: Path) -> None:
    assert current_revision(create_engine(f"sqlite:///{tmp_path / 'x.db'}")) is None
