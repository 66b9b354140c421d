"""Owning Runs: one that was killed is found out by its lock, and unnamed starts never share a name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows import control
from flows.cli import app
from flows.control import EVAL_PROFILE, RunProblem, is_abandoned, owned, start_run
from flows.settings import RunSettings
from flows.state.database import StateError
from flows.state.store import Store, find_run, run_names
from flows.state.tables import RunRow, RunStatus
from tests.flows.conftest import Story

TASK = str(Path(__file__).parents[1] / "fixtures" / "even-length")

HOLDS = """
import sys, time
from flows.control import owned
from flows.settings import Places
from flows.state.tables import RunRow
row = RunRow(id=sys.argv[1], task="t", task_digest="", profile="", seed=0, settings={})
with owned(Places.from_environment(), row):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def environment(story: Story, monkeypatch: pytest.MonkeyPatch) -> Story:
    monkeypatch.setenv("SIA_HOME", str(story.places.home))
    monkeypatch.setenv("SIA_CACHE", str(story.places.cache))
    monkeypatch.setenv("SIA_DATABASE_URL", story.places.database_url)
    monkeypatch.setenv("COLUMNS", "140")
    return story


def sia(*line: str) -> str:
    result = CliRunner().invoke(app, list(line))
    assert result.exit_code == 0, result.stderr
    return result.stdout


def statuses(run: str) -> set[str]:
    listed = {one["id"]: one["status"] for one in json.loads(sia("list", "--json"))}
    return {
        listed[run],
        json.loads(sia("status", run, "--json"))["status"],
        json.loads(sia("show", run, "--json"))["status"],
    }


def test_a_killed_run_is_shown_as_killed(environment: Story, tell_run: Callable[..., str]) -> None:
    run = tell_run(tested=False, calls=False)
    Store(environment.db, run).set_status(RunStatus.RUNNING, owner="here:1")
    assert statuses(run) == {"running"}, "no lock file here: it may be at work from another home"
    with subprocess.Popen([sys.executable, "-c", HOLDS, run], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert statuses(run) == {"running"}
        assert "sia resume" not in sia("status", run)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=30)
    assert statuses(run) == {"killed"}
    assert f"sia resume {run}" in sia("status", run)
    assert f"sia resume {run}" in sia("show", run)
    found = find_run(environment.db, run)
    assert found is not None
    assert found.status == RunStatus.RUNNING, "looking changes nothing"
    with owned(environment.places, found):
        assert not is_abandoned(environment.places, environment.db, run)


def test_a_finished_run_is_never_abandoned(environment: Story, tell_run: Callable[..., str]) -> None:
    run = tell_run(calls=False)
    found = find_run(environment.db, run)
    assert found is not None
    with owned(environment.places, found):
        pass
    assert not is_abandoned(environment.places, environment.db, run)
    assert statuses(run) == {"finished"}


def test_an_evaluation_is_not_to_be_resumed(environment: Story) -> None:
    row = RunRow(
        id="eval-1",
        task="t",
        task_digest="0",
        profile=EVAL_PROFILE,
        seed=0,
        settings=RunSettings().model_dump(mode="json"),
        status=RunStatus.RUNNING,
    )
    with environment.db.session() as session:
        session.add(row)
    with owned(environment.places, row):
        pass
    assert statuses("eval-1") == {"killed"}
    for line in (("status", "eval-1"), ("show", "eval-1")):
        assert "sia resume" not in sia(*line)
    assert "do it again with `sia eval`" in sia("status", "eval-1")


def test_unnamed_starts_at_once_get_names_of_their_own(environment: Story) -> None:
    def start(_: int) -> str:
        return start_run(environment.places, TASK, RunSettings(generations=2), None)

    with ThreadPoolExecutor(4) as pool:
        names = list(pool.map(start, range(8)))
    assert sorted(names) == sorted(f"even-length-{number}" for number in range(1, 9))


def test_a_name_taken_meanwhile_is_passed_over(environment: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of names is as of before another process took the next one."""
    settings = RunSettings(generations=2)
    assert start_run(environment.places, TASK, settings, None) == "even-length-1"
    stale = iter([[], [], ["even-length-1"]])
    monkeypatch.setattr(control, "run_names", lambda _database: next(stale))
    assert start_run(environment.places, TASK, settings, None) == "even-length-2"
    monkeypatch.setattr(control, "run_names", lambda _database: [])
    with pytest.raises(StateError, match="there is a run 'even-length-1' already"):
        start_run(environment.places, TASK, settings, None)
    monkeypatch.undo()
    assert len(run_names(environment.db)) == 2


def test_a_given_name_is_kept_or_refused(environment: Story) -> None:
    settings = RunSettings(generations=2)
    assert start_run(environment.places, TASK, settings, "monday") == "monday"
    assert start_run(environment.places, TASK, settings, "monday") == "monday"
    with pytest.raises(RunProblem, match="other settings"):
        start_run(environment.places, TASK, RunSettings(generations=1), "monday")
