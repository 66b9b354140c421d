"""The command line: what each command prints where, exit codes, the paper's spelling, and that help is quick.

Runs are told by the `story` fixture, or made by stand-ins for `flows.control`, so that no model is needed here; what
they print, write and read back is real.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows import cli_errors, server
from flows.cli import app
from flows.cli_common import parse_settings, terminate_politely
from flows.cli_errors import UserError
from flows.progress import Progress
from flows.records import RunView
from flows.server import ServerInfo
from flows.settings import Places, RunSettings, SandboxKind
from flows.state.tables import RunStatus

runner = CliRunner()

HEAVY = (
    "torch",
    "prefect",
    "transformers",
    "sqlmodel",
    "sqlalchemy",
    "pandas",
    "numpy",
    "scipy",
    "optuna",
    "matplotlib",
)


def sia(*words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command line."""
    result = runner.invoke(app, list(words))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SIA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SIA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PREFECT_HOME", "x")  # commands set it for their process: undone after the test
    monkeypatch.setenv("COLUMNS", "140")
    for name in ("SIA_DATABASE_URL", "SIA_DEBUG", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


@pytest.fixture
def told(story: object, tell_run: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> str:
    """A finished run in the database that the command line opens."""
    places = story.places  # type: ignore[attr-defined]
    monkeypatch.setenv("SIA_HOME", str(places.home))
    monkeypatch.setenv("SIA_DATABASE_URL", places.database_url)
    return tell_run()


class Control:
    """Stands in for `flows.control`: remembers what it was asked, and lets a test say what happens."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.started: list[tuple[str, RunSettings, str | None]] = []
        self.executed: list[str] = []
        self.work: Callable[[Progress], None] = lambda progress: progress.step("roll out dev/00", 4)

    def start_run(self, places: Places, task: str, settings: RunSettings, name: str | None) -> str:
        self.started.append((task, settings, name))
        return self.run_id

    def execute_run(self, places: Places, run_id: str, progress: Progress) -> None:
        self.executed.append(run_id)
        self.work(progress)


@pytest.fixture
def control(told: str, monkeypatch: pytest.MonkeyPatch) -> Control:
    stand_in = Control(told)
    monkeypatch.setattr("flows.control.start_run", stand_in.start_run)
    monkeypatch.setattr("flows.control.execute_run", stand_in.execute_run)
    monkeypatch.setattr("flows.report.write_report", write_nothing)  # charts take a second; one test draws them
    return stand_in


def write_nothing(view: RunView, places: Places) -> Path:
    """A report without charts."""
    path = places.run_folder(view.id) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("<!doctype html>", encoding="utf-8")
    return path


# Help, version, imports


def test_help_needs_nothing_heavy() -> None:
    loaded = f"import sys, flows.cli; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", loaded], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_help_is_quick() -> None:
    """Processor time, since other tests may run beside this one; on an idle machine it is the time that one waits."""
    command = [sys.executable, "-m", "flows.cli", "--help"]
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert "Self-improving agents" in done.stdout
    assert min(times) < 1.0, "0.5 s when this was written"


COMMANDS = (
    "run",
    "resume",
    "eval",
    "list",
    "status",
    "show",
    "pool",
    "report",
    "doctor",
    "tasks list",
    "tasks fetch",
    "tasks describe",
    "server start",
    "server stop",
    "server status",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    code, out, _ = sia(*command.split(), "--help")
    assert code == 0
    assert "Example" in out
    assert f"sia {command}" in out


def test_version_and_bare_call() -> None:
    code, out, _ = sia("--version")
    assert (code, out.split()[0]) == (0, "sia")
    code, out, _ = sia()
    assert code == 0
    assert "Usage" in out


# Mistakes


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("rnu", ["'run'", "sia --help"]),
        ("run", ["TASK", "sia run --help"]),
        ("run chain-sum --generations nine", ["--generations", "sia run --help"]),
        ("run chain-sum --nonsense", ["--nonsense"]),
        ("run chain-sum --profile nowhere", ["nowhere", "offline"]),
        ("run chain-sum --set weights", ["key=value"]),
        ("run chain-sum --set nonsense=1", ["nonsense"]),
        ("run chain-smu", ["chain-sum"]),
        ("tasks ftch", ["'fetch'", "sia tasks --help"]),
        ("tasks describe lawbanch", ["lawbench"]),
        ("resume nobody", ["nobody", "sia run"]),
        ("show nobody", ["nobody"]),
        ("report nobody", ["nobody"]),
        ("status nobody", ["nobody"]),
        ("status", ["sia run"]),
        ("eval chain-sum --scaffold ./nowhere", ["nowhere"]),
        ("eval chain-sum --scaffold . --split test", ["sealed", "--unseal"]),
        ("--max_gen 3", ["--task"]),
        ("--task lawbench list", ["list"]),
    ],
)
def test_a_mistake_is_one_line_with_the_fix(line: str, words: list[str]) -> None:
    code, out, error = sia(*line.split())
    assert code == 2
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error


def test_a_fault_of_ours_is_one_line_and_a_traceback_on_demand(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(_progress: Progress) -> None:
        raise ZeroDivisionError("by zero")

    control.work = breaks
    code, _, error = sia("run", "chain-sum", "--quiet")
    assert (code, error.count("\n")) == (1, 1)
    assert "SIA_DEBUG=1" in error
    monkeypatch.setenv("SIA_DEBUG", "1")
    assert isinstance(runner.invoke(app, ["run", "chain-sum", "-q"]).exception, ZeroDivisionError)


@pytest.mark.parametrize("exit_code", [1, 2, 3])
def test_a_problem_with_a_run_keeps_its_exit_code(control: Control, exit_code: int) -> None:
    from flows.control import RunProblem

    def breaks(_progress: Progress) -> None:
        raise RunProblem("another process\nworks on it", exit_code)

    control.work = breaks
    assert sia("run", "chain-sum", "-q") == (exit_code, "", "error: another process works on it\n")


def test_all_errors_written_for_people_exist() -> None:
    for module, name in cli_errors.WRITTEN_FOR_PEOPLE:
        assert issubclass(getattr(importlib.import_module(module), name), Exception)


# Running


def test_run_hands_over_the_settings_and_shows_the_result(control: Control) -> None:
    line = "run chain-sum --generations 5 --seed 7 --name monday --sandbox none --deterministic --set weights.rank=4"
    code, out, error = sia(*line.split())
    assert code == 0, error
    [(task, settings, name)] = control.started
    assert (task, name) == ("chain-sum", "monday")
    assert (settings.generations, settings.seed, settings.weights.rank) == (5, 7, 4)
    assert settings.sandbox is SandboxKind.NONE
    assert settings.deterministic
    assert control.executed == [control.run_id]
    assert "Sealed test" in out
    report = next(line.split()[-1] for line in error.splitlines() if line.startswith("Report"))
    assert Path(report).is_file()
    assert f"sia resume {control.run_id}" in error
    assert "roll out dev/00" in error


def test_what_was_not_given_is_left_to_the_profile(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIA_RUN_SEED", "11")
    assert sia("run", "chain-sum", "-q")[0] == 0
    [(_, settings, name)] = control.started
    assert (settings.seed, settings.sandbox, settings.deterministic, name) == (11, SandboxKind.BUBBLEWRAP, False, None)


def test_the_papers_spelling_is_the_same_run(control: Control) -> None:
    assert sia("--task", "lawbench", "--max_gen", "5", "--run_id", "1")[0] == 0
    assert sia("run", "lawbench", "--generations", "5", "--name", "run-1")[0] == 0
    assert control.started[0] == control.started[1]
    assert control.started[0][2] == "run-1"


def test_json_is_all_that_stands_on_standard_output(control: Control) -> None:
    def chatters(progress: Progress) -> None:
        print("a library says hello")
        progress.generation(1, 5, "first", "")
        progress.step("roll out dev/00", 2)
        progress.advance(2, 0.5)

    control.work = chatters
    code, out, error = sia("run", "chain-sum", "--json")
    assert code == 0, error
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["event"] for event in events] == ["note", "generation", "step", "advance", "close", "result"]
    assert events[-1]["id"] == control.run_id
    assert events[-1]["test"]
    assert Path(events[-1]["report"]).is_file()
    assert "a library says hello" in error


def test_quiet_is_only_the_result(control: Control) -> None:
    code, out, error = sia("run", "chain-sum", "--quiet")
    assert (code, error) == (0, "")
    assert "Sealed test" in out
    code, out, error = sia("run", "chain-sum", "--quiet", "--json")
    assert (code, error) == (0, "")
    assert json.loads(out)["event"] == "result"


def test_ctrl_c_says_how_to_go_on(control: Control) -> None:
    def stops(_progress: Progress) -> None:
        raise KeyboardInterrupt

    control.work = stops
    code, out, error = sia("run", "chain-sum")
    assert (code, out) == (130, "")
    assert error.rstrip().endswith(f"sia resume {control.run_id}")


def test_resume_goes_on_with_the_run_of_that_name(control: Control) -> None:
    code, out, _ = sia("resume", control.run_id)
    assert code == 0
    assert control.executed == [control.run_id]
    assert control.started == []
    assert "Sealed test" in out


def test_a_run_that_did_not_finish_is_no_success(
    control: Control, tell_run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    control.run_id = tell_run("half-way", tested=False)
    code, _, error = sia("run", "chain-sum", "-q")
    assert code == 1
    assert RunStatus.INTERRUPTED in error
    assert "sia resume half-way" in error


def test_the_end_says_where_the_ui_is_and_how_to_stop_it(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    info = ServerInfo("http://127.0.0.1:4200/api", "http://127.0.0.1:4200", pid=1, started=False)
    monkeypatch.setattr(server, "server_status", lambda _places: info)
    _, _, error = sia("run", "chain-sum")
    assert "Prefect UI: http://127.0.0.1:4200" in error
    assert "sia server stop" in error


WAITS = """
import sys, time
import flows.control
flows.control.start_run = lambda *_: "the-run"
def work(places, run_id, progress):
    print("at work", flush=True)
    time.sleep(60)
flows.control.execute_run = work
from flows.cli import main
sys.argv = ["sia", "run", "chain-sum", "--quiet"]
main()
"""


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_is_a_polite_stop(kind: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WAITS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
        process.send_signal(kind)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "sia resume the-run" in error
    assert "Traceback" not in error


def test_signals_are_given_back_and_use_the_runs_own_handler() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: seen.append(number))
    try:
        with terminate_politely():
            os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGINT]
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1", 1),
        ("a=0.5", 0.5),
        ("a=true", True),
        ('a="1"', "1"),
        ("a=plain text", "plain text"),
        ("a=x=y", "x=y"),
        ("a=[1, 2]", [1, 2]),
        ("a=2026-01-01", "2026-01-01"),
        ("a=", ""),
    ],
)
def test_settings_are_typed_as_toml(text: str, value: object) -> None:
    assert parse_settings([text]) == {"a": value}


def test_a_setting_without_a_name_is_refused() -> None:
    with pytest.raises(UserError, match="key=value"):
        parse_settings(["=1"])


# Looking


def test_list_status_show_and_report(told: str) -> None:
    assert told in sia("list")[1]
    assert [run["id"] for run in json.loads(sia("list", "--json")[1])] == [told]
    assert sia("status")[1] == sia("status", told)[1]
    assert json.loads(sia("status", told, "--json")[1])["id"] == told
    assert "Sealed test" in sia("show", told)[1]
    assert json.loads(sia("show", told, "--json")[1])["status"] == "finished"
    code, out, _ = sia("report", told)
    assert code == 0
    assert Path(out.strip()).read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html")


def test_show_a_generation_and_an_episode(told: str) -> None:
    code, out, _ = sia("show", told, "--generation", "2")
    assert code == 0
    assert out
    generation = json.loads(sia("show", told, "--generation", "2", "--json")[1])
    assert generation["number"] == 2
    episode = generation["samples"][0]["id"]
    code, out, _ = sia("show", told, "--episode", str(episode))
    assert code == 0
    assert f"Episode {episode}" in out
    assert json.loads(sia("show", told, "--episode", str(episode), "--json")[1])["id"] == episode


def test_show_refuses_what_is_not_there(told: str, tell_run: Callable[..., str]) -> None:
    for words in (["--generation", "99"], ["--episode", "999999"], ["--generation", "1", "--episode", "1"]):
        code, out, error = sia("show", told, *words)
        assert (code, out, error.count("\n")) == (2, "", 1)
    other = tell_run("other")
    code, _, error = sia("show", other, "--episode", "1")
    assert code == 2
    assert told in error, "the run that it does belong to"


def test_an_empty_home_lists_nothing() -> None:
    code, out, _ = sia("list")
    assert code == 0
    assert "sia run" in out
    assert json.loads(sia("list", "--json")[1]) == []


# Tasks, server, doctor


def test_tasks_are_listed_and_described() -> None:
    code, out, _ = sia("tasks", "list")
    assert code == 0
    assert "chain-sum" in out
    assert "lawbench" in out
    names = [spec["name"] for spec in json.loads(sia("tasks", "list", "--json")[1])]
    assert names == sorted(names)
    code, out, _ = sia("tasks", "describe", "chain_sum")
    assert code == 0
    assert "model-only" in out
    assert json.loads(sia("tasks", "describe", "chain-sum", "--json")[1])["kind"] == "solve"


def test_fetch_prepares_data_and_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prepared: list[str] = []

    def ensure(name: str, say: Callable[[str], None]) -> Path:
        prepared.append(name)
        return tmp_path

    monkeypatch.setattr("training.base_model.ensure_base_model", ensure)
    code, out, error = sia("tasks", "fetch", "chain-sum")
    assert code == 0, error
    assert prepared == ["smollm2-135m-instruct"]
    assert "data ready" in out


def test_the_server_that_is_not_there_is_reported_and_not_started(home: Path) -> None:
    assert "not running" in sia("server", "status")[1]
    assert json.loads(sia("server", "status", "--json")[1]) == {"up": False}
    assert sia("server", "stop")[1] == "it was not running\n"
    assert not home.exists()


def test_doctor_prints_a_line_each_and_fails_only_for_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import doctor
    from flows.doctor import Check, Status

    bad = Check(name="sandbox", status=Status.FAIL, text="[no] namespaces", fix="allow them")
    fine = Check(name="model", status=Status.WARN, text="not there yet")
    monkeypatch.setattr(doctor, "examine", lambda _places: [fine])
    assert sia("doctor")[0] == 0
    monkeypatch.setattr(doctor, "examine", lambda _places: [fine, bad])
    code, out, _ = sia("doctor")
    assert code == 1
    assert len(out.splitlines()) == 2
    assert "[no] namespaces  -> allow them" in out
    code, out, _ = sia("doctor", "--json")
    assert code == 1
    assert [check["status"] for check in json.loads(out)] == ["warn", "fail"]
