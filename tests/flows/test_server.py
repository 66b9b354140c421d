"""The local Prefect server, for real: one is started for this module, reused, looked at from outside and stopped."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flows import server, server_process
from flows.server import (
    ServerError,
    ServerInfo,
    ensure_server,
    prepare_environment,
    server_status,
    stop_server,
    use_server,
)
from flows.server_process import ServerRecord, is_free, read_record, record_path
from flows.settings import Places

VARIABLES = ("PREFECT_API_URL", "PREFECT_HOME", "PREFECT_UI_URL", "PREFECT_API_KEY", "NO_PROXY", "no_proxy")


def places_in(folder: Path) -> Places:
    return Places(home=folder / "home", cache=folder / "cache", database_url="sqlite://")


@pytest.fixture(autouse=True)
def no_prefect_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, *server_process.PRIVACY):
        monkeypatch.setenv(name, "x")  # so that whatever a test sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(server, "_ours", set())


def silent(_text: str) -> None:
    pass


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Places, list[ServerInfo], list[str]]]:
    """A real server that two threads asked for at the same time."""
    places = places_in(tmp_path_factory.mktemp("server"))
    infos: list[ServerInfo] = []
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANTHROPIC_API_KEY", "not-for-the-server")
        patch.setenv("PREFECT_API_KEY", "nor-this")
        patch.delenv("PREFECT_API_URL", raising=False)
        threads = [threading.Thread(target=lambda: infos.append(ensure_server(places, said.append))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    yield places, infos, said
    os.environ.pop("PREFECT_API_URL", None)
    stop_server(places)


Running = tuple[Places, list[ServerInfo], list[str]]


def test_two_at_once_start_one(running: Running) -> None:
    _, infos, said = running
    assert sorted(info.started for info in infos) == [False, True]
    assert len({info.pid for info in infos}) == 1
    assert sum("Starting" in line for line in said) == 1


def test_a_healthy_server_is_reused_and_reported(running: Running) -> None:
    places, infos, _ = running
    again = ensure_server(places, silent)
    assert (again.pid, again.started) == (infos[0].pid, False)
    found = server_status(places)
    assert found is not None
    assert found.healthy
    assert found.ui_url == found.api_url.removesuffix("/api")


def test_it_listens_on_loopback_only_and_talks_to_nobody(running: Running) -> None:
    _, infos, _ = running
    process = psutil.Process(infos[0].pid or 0)
    for member in (process, *process.children(recursive=True)):
        for connection in member.net_connections("inet"):
            assert connection.laddr.ip == "127.0.0.1"
            assert not connection.raddr or connection.raddr.ip == "127.0.0.1"


def test_it_has_no_keys_and_lives_in_this_home(running: Running) -> None:
    places, infos, _ = running
    environment = psutil.Process(infos[0].pid or 0).environ()
    assert "ANTHROPIC_API_KEY" not in environment
    assert "PREFECT_API_KEY" not in environment
    assert environment["DO_NOT_TRACK"] == "1"
    assert environment["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert (places.home / "prefect" / "prefect.db").is_file()


def test_it_is_not_in_this_terminals_group(running: Running) -> None:
    assert os.getsid(running[1][0].pid or 0) != os.getsid(0)


def test_our_own_setting_of_the_address_is_no_foreign_server(running: Running) -> None:
    places, infos, _ = running
    use_server(places, infos[0])
    assert os.environ["PREFECT_API_URL"] == infos[0].api_url
    assert "127.0.0.1" in os.environ["NO_PROXY"]
    assert ensure_server(places, silent).pid == infos[0].pid


def test_a_server_of_the_users_is_used_and_never_stopped(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, infos, _ = running
    monkeypatch.setenv("PREFECT_API_URL", infos[0].api_url)
    elsewhere = places_in(tmp_path)
    found = ensure_server(elsewhere, silent)
    assert (found.api_url, found.pid, found.started) == (infos[0].api_url, None, False)
    with pytest.raises(ServerError, match="not started by sia"):
        stop_server(elsewhere)
    prepare_environment(elsewhere)
    assert "PREFECT_HOME" not in os.environ, "their profile, their settings"
    assert not elsewhere.home.exists()


def test_stopping_ends_every_process_and_forgets_it(running: Running) -> None:
    """The last test on the module's server."""
    places, infos, _ = running
    process = psutil.Process(infos[0].pid or 0)
    tree = [process, *process.children(recursive=True)]
    assert stop_server(places)
    assert not any(member.is_running() and member.status() != psutil.STATUS_ZOMBIE for member in tree)
    assert server_status(places) is None
    assert not stop_server(places)


def test_an_address_where_nobody_answers_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with pytest.raises(ServerError, match="unset PREFECT_API_URL"):
        ensure_server(places_in(tmp_path), silent)
    found = server_status(places_in(tmp_path))
    assert found is not None
    assert not found.healthy


def write_record(places: Places, pid: int, created: float) -> None:
    places.home.mkdir(parents=True)
    record_path(places).write_text(ServerRecord(pid=pid, port=4299, created=created).model_dump_json())


def test_a_stranger_under_our_pid_is_not_touched(tmp_path: Path) -> None:
    places = places_in(tmp_path)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as stranger:
        write_record(places, stranger.pid, psutil.Process(stranger.pid).create_time() - 1000)
        assert server_status(places) is None
        assert not stop_server(places)
        assert stranger.poll() is None
        assert read_record(places) is None, "a record of the dead is dropped"
        stranger.kill()


def test_a_server_that_does_not_answer_is_ended_by_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = places_in(tmp_path)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('x', flush=True); time.sleep(60)"
    monkeypatch.setattr(server_process, "STOP_TIMEOUT_S", 0.5)
    with subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        write_record(places, process.pid, psutil.Process(process.pid).create_time())
        found = server_status(places)
        assert found is not None
        assert not found.healthy
        assert stop_server(places)
        assert not psutil.pid_exists(process.pid)


@pytest.mark.parametrize("content", ["", "{", '{"pid": "x"}', "[]"])
def test_a_damaged_record_is_no_server(content: str, tmp_path: Path) -> None:
    places = places_in(tmp_path)
    places.home.mkdir()
    record_path(places).write_text(content)
    assert server_status(places) is None
    assert not stop_server(places)


def test_a_server_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is replaced by a program that complains and dies, as one with a broken installation does."""
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho ModuleNotFoundError: no prefect here >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    places = places_in(tmp_path)
    with pytest.raises(ServerError, match="no prefect here"):
        ensure_server(places, silent)
    assert read_record(places) is None


def test_a_strangers_answer_on_the_port_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something healthy answers on the port, but it is not the process that was launched."""
    monkeypatch.setattr(server_process, "answers", lambda *_: True)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as mute:
        record = ServerRecord(pid=mute.pid, port=4299, created=psutil.Process(mute.pid).create_time())
        assert not server_process.wait_until_up(record, timeout_s=1.0)
        mute.kill()


def test_a_taken_port_is_seen() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert not is_free(taken.getsockname()[1])
