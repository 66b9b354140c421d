"""The local Prefect server: one for each `SIA_HOME`, started when a Run needs it, reused, stopped on request.

    prepare_environment(places)             # before prefect is imported
    info = ensure_server(places, print)     # starts it, waits until it is healthy, or finds it running
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

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from flows.server_process import (
    HOST,
    PRIVACY,
    STOP_TIMEOUT_S,
    ServerRecord,
    answers,
    end,
    find_process,
    free_port,
    is_free,
    last_words,
    launch,
    log_path,
    prefect_home,
    read_record,
    record_path,
    wait_until_up,
)
from flows.settings import Places

Say = Callable[[str], None]

USUAL_PORT = 4200
"""Prefect's own default, taken when it is free so that a bookmark of the UI keeps working."""
START_TIMEOUT_S = 90.0

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
    record = read_record(places)
    if record is not None and find_process(record) is not None and answers(record.api_url):
        return _info(record)
    places.home.mkdir(parents=True, exist_ok=True)
    with _locked(places):
        return _ensure_locked(places, say)


def keep_server(places: Places, say: Say) -> None:
    """Start our server anew if its process has died, at the same address; nothing to do for a server of the user's.

    Called now and then by a run under way, so that a killed server costs it nothing but a few late events.

    Raises:
        ServerError: it does not come up again.
    """
    record = read_record(places)
    if record is not None and find_process(record) is None and _external(places) is None:
        ensure_server(places, say)


def server_status(places: Places) -> ServerInfo | None:
    """The server if there is one (healthy or not), without starting anything."""
    external = _external(places)
    if external is not None:
        return external
    record = read_record(places)
    if record is None or find_process(record) is None:
        return None
    return _info(record, healthy=answers(record.api_url))


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
    with _locked(places):
        process = find_process(read_record(places))
        if process is not None:
            end(process)
        record_path(places).unlink(missing_ok=True)
        return process is not None


def prepare_environment(places: Places) -> None:
    """Point this process's Prefect at this home's own folder, unless the user named a server of their own.

    To be called before anything imports prefect.
    """
    os.environ.update(PRIVACY)
    if not os.environ.get("PREFECT_API_URL"):
        os.environ["PREFECT_HOME"] = str(prefect_home(places))


def use_server(places: Places, info: ServerInfo) -> None:
    """Make this process's Prefect talk to `info`, whether or not prefect is imported already."""
    if info.pid is None:
        return
    os.environ["PREFECT_API_URL"] = info.api_url
    os.environ["PREFECT_HOME"] = str(prefect_home(places))
    for name in ("NO_PROXY", "no_proxy"):  # a proxy that the user set for the outside must not see loopback
        bypassed = [part for part in os.environ.get(name, "").split(",") if part]
        os.environ[name] = ",".join(dict.fromkeys([*bypassed, HOST, "localhost"]))
    if "prefect" in sys.modules:
        from prefect.context import refresh_global_settings_context

        refresh_global_settings_context()


def _ensure_locked(places: Places, say: Say) -> ServerInfo:
    record = read_record(places)
    if record is not None and find_process(record) is not None:
        # Alive and silent: its starter may have been killed while it was coming up.
        if wait_until_up(record, START_TIMEOUT_S / 2):
            return _info(record)
        process = find_process(record)
        if process is not None:
            say("The local Prefect server does not answer; starting it anew.")
            end(process)
    say("Starting the local Prefect server (about 15 s, once; it stays for the next run).")
    # A server that died comes back where its clients look for it, so that a run under way goes on talking to it.
    wished = [port for port in (record.port if record else USUAL_PORT, USUAL_PORT) if is_free(port)]
    for attempt in range(2):  # the second is for a port that somebody else took in between
        record = launch(places, wished[0] if attempt == 0 and wished else free_port())
        if wait_until_up(record, START_TIMEOUT_S):
            return _info(record, started=True)
        process = find_process(record)
        if process is not None:
            end(process)
            break
    record_path(places).unlink(missing_ok=True)
    raise ServerError(
        f"the Prefect server did not come up: {last_words(places)} (see {log_path(places)}; "
        "or set PREFECT_API_URL to a server of your own)"
    )


@contextmanager
def _locked(places: Places) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = places.home / "server.lock"
    try:
        with FileLock(lock, timeout=START_TIMEOUT_S + STOP_TIMEOUT_S):
            yield
    except Timeout:
        raise ServerError(f"another process holds {lock}; wait for it, or see {log_path(places)}") from None


def _info(record: ServerRecord, started: bool = False, healthy: bool = True) -> ServerInfo:
    _ours.add(record.api_url)
    return ServerInfo(record.api_url, record.ui_url, record.pid, started, healthy)


def _external(places: Places) -> ServerInfo | None:
    """The server that the environment names, unless it is the one we started (a Run sets the variable itself)."""
    url = os.environ.get("PREFECT_API_URL", "").rstrip("/")
    record = read_record(places)
    if not url or url in _ours or (record is not None and record.api_url == url):
        return None
    ui = os.environ.get("PREFECT_UI_URL") or url.removesuffix("/api")
    info = ServerInfo(api_url=url, ui_url=ui, pid=None, started=False)
    return replace(info, healthy=answers(url, refusal_counts=True))
