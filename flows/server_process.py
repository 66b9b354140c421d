"""The Prefect server as a process of this machine: launching it, knowing it again, waiting for it, ending it.

`server.json` in the home holds what was launched: pid, port, and the process's start time, without which a pid means
nothing. `flows.server` decides when any of this happens, under its lock.
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
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from flows.settings import Places

if TYPE_CHECKING:
    import psutil

HOST = "127.0.0.1"
STOP_TIMEOUT_S = 10.0
POLL_S = 0.25
CLOCK_SLACK_S = 2.0
"""The system derives a start time from its boot time, which moves a little when the clock is set."""

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
NOT_FOR_THE_SERVER = ("PREFECT_API_URL", "PREFECT_API_KEY", "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL")
"""All that the server sees of this environment: it lives long, so it is given no keys. Of what is not for it, the first
two are a client's, and the third silences the command line, and would silence `server.log` too."""


class ServerRecord(BaseModel):
    """`server.json`: what was launched."""

    model_config = ConfigDict(frozen=True)
    pid: int
    port: int
    created: float

    @property
    def ui_url(self) -> str:
        """Where a browser finds it."""
        return f"http://{HOST}:{self.port}"

    @property
    def api_url(self) -> str:
        """Where Prefect's clients find it."""
        return f"{self.ui_url}/api"


def prefect_home(places: Places) -> Path:
    """Prefect's own folder: its database, so that Runs of several homes do not mix."""
    return places.home.absolute() / "prefect"


def log_path(places: Places) -> Path:
    """What the server printed since it was last started."""
    return places.home / "server.log"


def record_path(places: Places) -> Path:
    """Where the record of the launched server lies."""
    return places.home / "server.json"


def read_record(places: Places) -> ServerRecord | None:
    """What was launched last, dead or alive; None if nothing was, or the file is damaged."""
    try:
        return ServerRecord.model_validate_json(record_path(places).read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None


def launch(places: Places, port: int) -> ServerRecord:
    """Start a server, detached, and record it at once, so that a kill of this process does not lose sight of it."""
    import psutil

    home = prefect_home(places)
    home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    with log_path(places).open("wb") as log:
        process = subprocess.Popen(
            command,
            env=_environment(home),
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
    record = ServerRecord(pid=process.pid, port=port, created=created)
    part = record_path(places).with_suffix(".part")
    part.write_text(record.model_dump_json(), encoding="utf-8")
    part.replace(record_path(places))
    return record


def _environment(home: Path) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if (name in INHERITED or name.startswith(INHERITED_PREFIXES)) and name not in NOT_FOR_THE_SERVER
    }
    return {**kept, **CALM, **PRIVACY, "PREFECT_HOME": str(home)}


def find_process(record: ServerRecord | None) -> psutil.Process | None:
    """The process that was launched, or None if it has died; another one under the same pid is not it."""
    if record is None:
        return None
    import psutil

    try:
        process = psutil.Process(record.pid)
        same = abs(process.create_time() - record.created) < CLOCK_SLACK_S
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def wait_until_up(record: ServerRecord, timeout_s: float) -> bool:
    """True once the server itself answers on its port; False when it has died or the time is over."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        process = find_process(record)
        if process is None:
            return False
        if answers(record.api_url) and _listens(process, record.port):
            return True
        time.sleep(POLL_S)
    return False


def end(process: psutil.Process) -> None:
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


def answers(api_url: str, refusal_counts: bool = False) -> bool:
    """True if an API is there. `refusal_counts` takes an HTTP error for an answer too (a server that wants a key)."""
    local = api_url.startswith(f"http://{HOST}:")  # where a proxy for the outside is of no use
    opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))
    try:
        with opener.open(f"{api_url}/health", timeout=3.0) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:
        return refusal_counts
    except (OSError, ValueError):
        return False


def is_free(port: int) -> bool:
    """Whether a server could listen on this loopback port."""
    with socket.socket() as probe:
        # As the server itself does: connections that linger after a stop do not make the port taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def free_port() -> int:
    """A loopback port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def last_words(places: Places) -> str:
    """The last line of the server's log."""
    try:
        lines = log_path(places).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "it said nothing")


def _listens(process: psutil.Process, port: int) -> bool:
    import psutil

    try:
        return any(
            connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
            for member in (process, *process.children(recursive=True))
            for connection in member.net_connections("tcp")
        )
    except psutil.AccessDenied:  # some systems do not tell; its answer has to do
        return True
    except psutil.Error:
        return False
