"""The local Prefect server: one for each `SIA_HOME`, started when a Run needs it, reused, stopped on request.

    info = ensure_server(places, print)     # starts it, waits until it is healthy, or finds it running
    prepare_environment(places)             # before prefect is imported
    use_server(places, info)                # this process's Prefect talks to it from now on
    stop_server(places)

If `PREFECT_API_URL` is set, that server is used as it is, and never started or stopped from here.

Guarantees: at most one server a home, whatever starts at the same time (a file lock); a server is recognised by its
pid together with its start time and its own listening port, so that a reused pid or a stranger's server on that port
is never taken for ours, let alone killed; it listens on loopback only, sends nothing out (analytics off), gets no keys
in its environment, and outlives the Run that started it.
Does not: ask for a password. Any user of this machine can reach a loopback port.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from flows.settings import Places

if TYPE_CHECKING:
    import psutil

Say = Callable[[str], None]

HOST = "127.0.0.1"
USUAL_PORT = 4200
"""Prefect's own default, taken when it is free so that a bookmark of the UI keeps working."""
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 10.0

PRIVACY = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
}
"""Nothing leaves the machine. `flows.cli.main` sets these before anything imports prefect."""

CALM = {
    # These look at the database every 5 to 20 s by default; nobody waits for any of them. The scheduler keeps its pace.
    "PREFECT_SERVER_SERVICES_LATE_RUNS_LOOP_SECONDS": "30",
    "PREFECT_SERVER_SERVICES_PAUSE_EXPIRATIONS_LOOP_SECONDS": "30",
    "PREFECT_SERVER_SERVICES_CLEANUP_RECONCILER_LOOP_SECONDS": "60",
    "PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_LOOP_SECONDS": "60",
    "PREFECT_SERVER_SERVICES_FOREMAN_LOOP_SECONDS": "60",
    "PREFECT_SERVER_SERVICES_REPOSSESSOR_LOOP_SECONDS": "60",
}

INHERITED = ("PATH", "HOME", "USER", "LANG", "TZ", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "SYSTEMROOT")
INHERITED_PREFIXES = ("LC_", "PYTHON", "PREFECT_")
"""All that the server sees of this environment: it lives long, so it is given no API keys."""


_ours: set[str] = set()
"""Addresses of servers that this process found to be ours, so that a `PREFECT_API_URL` that we set ourselves is known
as such even after the server has gone."""


class ServerError(Exception):
    """Raised when the Prefect server cannot be started, reached or stopped; the message says what to do."""


@dataclass(frozen=True)
class ServerInfo:
    """A Prefect server. `pid` is None for one that is not ours; `started` tells whether this call started it."""

    api_url: str
    ui_url: str
    pid: int | None
    started: bool
    healthy: bool = True


class _Record(BaseModel):
    """`server.json`: what we started."""

    model_config = ConfigDict(frozen=True)
    pid: int
    port: int
    created: float

    @property
    def api_url(self) -> str:
        return f"http://{HOST}:{self.port}/api"

    def info(self, started: bool = False, healthy: bool = True) -> ServerInfo:
        _ours.add(self.api_url)
        return ServerInfo(self.api_url, f"http://{HOST}:{self.port}", self.pid, started, healthy)


def ensure_server(places: Places, say: Say) -> ServerInfo:
    """The server for this home, healthy; started if it does not run (about 15 s).

    Raises:
        ServerError: it did not become healthy in time, or `PREFECT_API_URL` points to nothing that answers.
    """
    external = _external(places)
    if external is not None:
        if not external.healthy:
            raise ServerError(
                f"no Prefect server answers at PREFECT_API_URL={external.api_url}; "
                "start it, or unset PREFECT_API_URL to use a local one"
            )
        return external
    found = _running(places)
    if found is not None and _healthy(found.api_url):
        return found.info()
    from filelock import FileLock, Timeout

    places.home.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(places.home / "server.lock", timeout=START_TIMEOUT_S + STOP_TIMEOUT_S):
            return _ensure_locked(places, say)
    except Timeout:
        raise ServerError(
            f"another process holds {places.home / 'server.lock'}; wait for it, or see {log_path(places)}"
        ) from None


def server_status(places: Places) -> ServerInfo | None:
    """The server if there is one (healthy or not), without starting anything."""
    external = _external(places)
    if external is not None:
        return external
    record = _running(places)
    return None if record is None else record.info(healthy=_healthy(record.api_url))


def stop_server(places: Places) -> bool:
    """Stop our server and all its children, gracefully and then by force. False if none was running.

    Raises:
        ServerError: `PREFECT_API_URL` points to a server that is not ours.
    """
    external = _external(places)
    if external is not None:
        raise ServerError(f"{external.api_url} was not started by sia; stop it where it was started")
    if not places.home.is_dir():
        return False
    from filelock import FileLock

    with FileLock(places.home / "server.lock", timeout=START_TIMEOUT_S + STOP_TIMEOUT_S):
        process = _process(_read(places))
        if process is not None:
            _end(process)
        _record_path(places).unlink(missing_ok=True)
        return process is not None


def prepare_environment(places: Places) -> None:
    """Point this process's Prefect at this home's own folder, unless the user named a server of their own.

    To be called before anything imports prefect.
    """
    os.environ.update(PRIVACY)
    if not os.environ.get("PREFECT_API_URL"):
        os.environ["PREFECT_HOME"] = str(prefect_home(places).absolute())


def use_server(places: Places, info: ServerInfo) -> None:
    """Make this process's Prefect talk to `info`, whether or not prefect is imported already."""
    if info.pid is None:
        return
    os.environ["PREFECT_API_URL"] = info.api_url
    os.environ["PREFECT_HOME"] = str(prefect_home(places).absolute())
    for name in ("NO_PROXY", "no_proxy"):  # a proxy that the user set for the outside must not see loopback
        bypassed = [part for part in os.environ.get(name, "").split(",") if part]
        os.environ[name] = ",".join(dict.fromkeys([*bypassed, HOST, "localhost"]))
    if "prefect" in sys.modules:
        from prefect.context import refresh_global_settings_context

        refresh_global_settings_context()


def prefect_home(places: Places) -> Path:
    """Prefect's own folder: its database, so that Runs of several homes do not mix."""
    return places.home / "prefect"


def log_path(places: Places) -> Path:
    """What the server printed since it was last started."""
    return places.home / "server.log"


def _ensure_locked(places: Places, say: Say) -> ServerInfo:
    record = _running(places)
    if record is not None:  # alive, so its starter may have been killed while it was coming up
        if _wait(record, time.monotonic() + START_TIMEOUT_S / 2):
            return record.info()
        process = _process(record)
        if process is not None:
            say("The local Prefect server does not answer; starting it anew.")
            _end(process)
    say("Starting the local Prefect server (about 15 s, once; it stays for the next run).")
    ports = [USUAL_PORT, 0] if _is_free(USUAL_PORT) else [0, 0]  # 0: any free one; the second is for a lost race
    for port in ports:
        record = _launch(places, port or _free_port())
        if _wait(record, time.monotonic() + START_TIMEOUT_S):
            return record.info(started=True)
        process = _process(record)
        if process is not None:
            _end(process)
            break
    _record_path(places).unlink(missing_ok=True)
    raise ServerError(
        f"the Prefect server did not come up: {_last_line(places)} (see {log_path(places)}; "
        "or set PREFECT_API_URL to a server of your own)"
    )


def _launch(places: Places, port: int) -> _Record:
    import psutil

    home = prefect_home(places)
    home.mkdir(parents=True, exist_ok=True)
    kept = {
        name: value for name, value in os.environ.items() if name in INHERITED or name.startswith(INHERITED_PREFIXES)
    }
    environment = {**kept, **CALM, **PRIVACY, "PREFECT_HOME": str(home.absolute())}
    environment.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    with log_path(places).open("wb") as log:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in this terminal is not for it
        )
    try:
        created = psutil.Process(process.pid).create_time()
    except psutil.Error:
        created = 0.0
    record = _Record(pid=process.pid, port=port, created=created)
    part = _record_path(places).with_suffix(".part")
    part.write_text(record.model_dump_json(), encoding="utf-8")
    part.replace(_record_path(places))
    return record


def _wait(record: _Record, until: float) -> bool:
    """True once the server answers; False when it has died or the time is over."""
    while time.monotonic() < until:
        process = _process(record)
        if process is None:
            return False
        if _healthy(record.api_url) and _listens(process, record.port):
            return True
        time.sleep(0.25)
    return False


def _end(process: psutil.Process) -> None:
    """SIGTERM to the whole tree, then SIGKILL to what is left after `STOP_TIMEOUT_S`."""
    import psutil

    tree = [process]
    with contextlib.suppress(psutil.Error):
        tree += process.children(recursive=True)
    for member in tree:
        with contextlib.suppress(psutil.Error):
            member.terminate()
    _, left = psutil.wait_procs(tree, timeout=STOP_TIMEOUT_S)
    for member in left:
        with contextlib.suppress(psutil.Error):
            member.kill()
    psutil.wait_procs(left, timeout=STOP_TIMEOUT_S)


def _record_path(places: Places) -> Path:
    return places.home / "server.json"


def _read(places: Places) -> _Record | None:
    try:
        return _Record.model_validate_json(_record_path(places).read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None


def _running(places: Places) -> _Record | None:
    record = _read(places)
    return record if _process(record) is not None else None


def _process(record: _Record | None) -> psutil.Process | None:
    """The process that we started, or None if it has died; another one under the same pid is not it."""
    if record is None:
        return None
    import psutil

    try:
        process = psutil.Process(record.pid)
        ours = abs(process.create_time() - record.created) < 2.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return None
    return process if ours else None


def _listens(process: psutil.Process, port: int) -> bool:
    import psutil

    try:
        members = [process, *process.children(recursive=True)]
        return any(
            c.status == psutil.CONN_LISTEN and c.laddr.port == port
            for member in members
            for c in member.net_connections("tcp")
        )
    except psutil.AccessDenied:  # some systems do not tell; health has to do
        return True
    except psutil.Error:
        return False


def _external(places: Places) -> ServerInfo | None:
    """The server that the environment names, unless it is the one we started (a Run sets the variable itself)."""
    url = os.environ.get("PREFECT_API_URL", "").rstrip("/")
    record = _read(places)
    if not url or url in _ours or (record is not None and record.api_url == url):
        return None
    ui = os.environ.get("PREFECT_UI_URL") or url.removesuffix("/api")
    info = ServerInfo(api_url=url, ui_url=ui, pid=None, started=False)
    return replace(info, healthy=_healthy(url, any_answer=True))


def _healthy(api_url: str, any_answer: bool = False) -> bool:
    """True if the API answers. `any_answer` takes a refusal for an answer too (a server that wants a key)."""
    local = api_url.startswith(f"http://{HOST}:")
    opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))
    try:
        with opener.open(f"{api_url}/health", timeout=3.0) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:
        return any_answer
    except (OSError, ValueError):
        return False


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the server itself does: connections that linger after a stop do not make the port taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _last_line(places: Places) -> str:
    with contextlib.suppress(OSError):
        lines = log_path(places).read_text(encoding="utf-8", errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return said[-1][:200] if said else "it said nothing"
    return "it said nothing"
