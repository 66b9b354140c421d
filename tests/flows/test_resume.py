"""Kill it anywhere: the run goes on where it was, and ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import random
import shutil
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

from flows.control import RunProblem, execute_run, owned, start_run
from flows.server_process import read_record
from flows.settings import Places, RunSettings
from flows.state.database import Database
from flows.state.store import Store
from flows.state.tables import RunStatus
from flows.views import RunView, run_view
from flows.watch import QuietProgress
from tests.flows.loops import (
    EVEN_LENGTH,
    environment,
    kill_and_watch,
    places_in,
    recorded,
    run_arguments,
    sia,
    small_settings,
    start_or_resume,
)

KILLS = 25
END_S = 180.0


def view_of(database_url: str, name: str) -> RunView:
    database = Database.open(database_url)
    try:
        return run_view(database, name)
    finally:
        database.close()


def outcome(view: RunView) -> object:
    """All that a run found, less what differs between two runs by their nature (names, times, row ids)."""
    return {
        "generations": [
            (g.number, g.lever, g.parent, g.accepted, g.scaffold_id, g.adapter_id, g.note) for g in view.generations
        ],
        "verdicts": [(v.gate, v.accepted, v.n, v.difference, v.p_value) for v in view.verdicts],
        "decisions": [(d.after_generation, d.lever, d.reasons) for d in view.decisions],
        "test": [(arm.arm, arm.generation, arm.n, arm.mean) for arm in view.test],
    }


@pytest.mark.timeout(600)
def test_killed_at_25_random_moments_it_ends_as_if_never_killed(
    tmp_path: Path, tiny: Path, prefect_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", prefect_url)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    work = Workers()
    settings = small_settings(tiny, deterministic=True)
    whole = places_in(tmp_path / "whole")
    reference = work.start(whole, settings)
    wait_for_episodes(whole, 1)  # the first process waits for the imports too
    began = time.monotonic()
    reference.join(END_S)
    assert reference.exitcode == 0
    length_s = time.monotonic() - began
    expected = outcome(view_of(whole.database_url, "r"))

    moments = random.Random(20261122)
    kills, rounds = 0, 0
    while kills < KILLS:
        # A round is one run killed until it is finished; a finished one is followed by another from the beginning.
        rounds += 1
        places = places_in(tmp_path / f"round-{rounds}")
        known: dict[str, dict[object, tuple[object, ...]]] = {}
        while True:
            process = work.start(places, settings)
            process.join(moments.uniform(0, 0.5) * length_s if kills < KILLS else END_S)
            if process.exitcode is None:
                kills += 1
                assert kill_and_watch(process) == []
            else:
                assert process.exitcode == 0
            now = recorded(places.database_url)
            for table, rows in known.items():
                assert {key: now[table].get(key) for key in rows} == rows, f"recorded rows of {table} changed"
            known = now
            if process.exitcode == 0:
                break
        assert outcome(view_of(places.database_url, "r")) == expected
        assert repeated_sends(places.database_url) <= kills * 16, "only calls in flight at a kill are sent again"


class Workers:
    """Processes of their own that start or resume a run. A server that has everything imported forks them, so that the
    kills fall into the run's work rather than into imports; each is a plain process to kill."""

    PRELOADED = ("tests.flows.loops", "flows.improve", "training.trainer", "training.engine")

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(list(self.PRELOADED))

    def start(self, places: Places, settings: RunSettings) -> BaseProcess:
        process = self.context.Process(target=start_or_resume, args=(places, settings))
        process.start()
        return process


def test_ctrl_c_leaves_a_resumable_run(tmp_path: Path, tiny: Path, prefect_url: str) -> None:
    places = places_in(tmp_path)
    env = environment(places, prefect_url)
    process = sia(run_arguments(tiny, "polite"), env)
    wait_for_episodes(places, 3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "sia resume polite" in errors
    assert "Traceback" not in errors
    assert view_of(places.database_url, "polite").status == RunStatus.INTERRUPTED
    before = recorded(places.database_url)
    resumed = sia(["resume", "polite", "--json"], env)
    out, errors = resumed.communicate(timeout=END_S)
    assert resumed.returncode == 0, errors
    assert json.loads(out.splitlines()[-1])["event"] == "result"
    after = recorded(places.database_url)
    assert all(after[table][key] == row for table, rows in before.items() for key, row in rows.items())


def test_killed_sandboxes_are_made_again_within_the_run(tmp_path: Path, tiny: Path, prefect_url: str) -> None:
    places = places_in(tmp_path)
    process = sia(run_arguments(tiny, "lost", generations=2, deterministic=True), environment(places, prefect_url))
    wait_for_episodes(places, 1)  # the first sandbox is a probe; one that cannot be made at all ends the run
    # A kill after a sandbox's last episode costs nothing, so kills go on until one has struck open episodes.
    while process.poll() is None and not counted(places.database_url, "sum(infrastructure_failures)"):
        for child in psutil.Process(process.pid).children():
            with contextlib.suppress(psutil.Error):
                if child.name() == "bwrap":
                    child.kill()
        time.sleep(0.2)
    _, errors = process.communicate(timeout=END_S)
    assert process.returncode == 0, errors
    assert counted(places.database_url, "sum(infrastructure_failures)") > 0
    assert counted(places.database_url, "sum(status != 'done')") == 0, "every episode was measured in the end"
    assert counted(places.database_url, "sum(cause = 'sandbox_lost')") == 0


def counted(database_url: str, what: str) -> int:
    """One aggregate over all episodes."""
    engine = create_engine(database_url)
    with engine.connect() as connection:
        found = connection.execute(text(f"SELECT {what} FROM episodes")).scalar()
    engine.dispose()
    return int(found or 0)


@pytest.mark.slow
def test_a_killed_server_comes_back_under_the_run(tmp_path: Path, tiny: Path) -> None:
    places = places_in(tmp_path)
    env = environment(places, "")
    process = sia(run_arguments(tiny, "served"), env)
    wait_for_episodes(places, 3)
    first = read_record(places)
    assert first is not None
    psutil.Process(first.pid).kill()
    _, errors = process.communicate(timeout=END_S)
    second = read_record(places)
    sia(["server", "stop"], env).communicate(timeout=60)
    assert process.returncode == 0, errors
    assert second is not None
    assert (second.port, second.pid != first.pid) == (first.port, True)


def test_a_second_process_on_a_live_run_is_refused(tmp_path: Path, tiny: Path) -> None:
    places = places_in(tmp_path)
    name = start_run(places, str(EVEN_LENGTH), small_settings(tiny), "busy")
    database = Database.open(places.database_url)
    row = Store(database, name).run()
    with owned(places, row), pytest.raises(RunProblem, match="another process is working on 'busy'") as caught:
        execute_run(places, name, QuietProgress())
    assert caught.value.exit_code == 3
    database.close()


def test_the_same_name_is_the_same_run_or_is_refused(tmp_path: Path, tiny: Path) -> None:
    places = places_in(tmp_path)
    assert start_run(places, str(EVEN_LENGTH), small_settings(tiny), "a") == "a"
    assert start_run(places, str(EVEN_LENGTH), small_settings(tiny), "a") == "a"
    with pytest.raises(RunProblem, match="other settings \\(seed\\)"):
        start_run(places, str(EVEN_LENGTH), small_settings(tiny, seed=5), "a")
    with pytest.raises(RunProblem, match="another task"):
        start_run(places, "chain-sum", small_settings(tiny), "a")
    with pytest.raises(RunProblem, match="cannot name a run"):
        start_run(places, "chain-sum", small_settings(tiny), "../a")
    assert start_run(places, "chain-sum", small_settings(tiny), None) == "chain-sum-1"
    assert start_run(places, "chain-sum", small_settings(tiny), None) == "chain-sum-2"


def test_a_task_that_moved_under_a_run_is_noticed(tmp_path: Path, tiny: Path) -> None:
    folder = tmp_path / "task"
    shutil.copytree(EVEN_LENGTH, folder)
    places = places_in(tmp_path / "home")
    name = start_run(places, str(folder), small_settings(tiny), None)
    (folder / "task.toml").write_text((folder / "task.toml").read_text().replace("dev = 120", "dev = 132"))
    with pytest.raises(RunProblem, match="has changed since"):
        execute_run(places, name, QuietProgress())


def test_unknown_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunProblem, match="there are: none yet"):
        execute_run(places_in(tmp_path), "nobody", QuietProgress())


def repeated_sends(database_url: str) -> int:
    engine = create_engine(database_url)
    with engine.connect() as connection:
        total = connection.execute(text("SELECT sum(sends - 1) FROM model_calls")).scalar()
    engine.dispose()
    return int(total or 0)


def wait_for_episodes(places: Places, count: int) -> None:
    """Until so many episodes are on record."""
    path = Path(places.database_url.removeprefix("sqlite:///"))
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if path.exists():
            engine = create_engine(places.database_url)
            with contextlib.suppress(OperationalError), engine.connect() as connection:
                done = connection.execute(text("SELECT count(*) FROM episodes WHERE status = 'done'")).scalar()
                if int(done or 0) >= count:
                    return
            engine.dispose()
        time.sleep(0.1)
    raise AssertionError("no episode was recorded in a minute")
