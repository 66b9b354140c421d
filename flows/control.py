"""Starting, resuming and owning Runs: what stands between the command line and the flow.

Guarantees: one process works on a Run at a time (a file lock that the kernel releases when its holder dies, so a killed
owner never blocks); a Run's settings never change once stored; an interrupted or failed Run keeps all it recorded.
Not guaranteed: that two machines on one PostgreSQL exclude each other; the lock is per SIA_HOME.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from flows.progress import Progress
from flows.server import ServerError, ensure_server, keep_server, use_server
from flows.settings import EVAL_PROFILE as EVAL_PROFILE
from flows.settings import Places, RunSettings
from flows.state.database import Database, StateError
from flows.state.store import Store, create_run, find_run, run_names
from flows.state.tables import RunRow, RunStatus
from tasks.contract import Split
from tasks.loader import BUILT_IN, find_folder, load_spec, task_digest

BEAT_S = 2.0
NAME_ATTEMPTS = 100
"""So many other runs may take the name that was about to be given before a start is given up."""


class RunProblem(Exception):
    """Raised when a Run cannot be started, found, owned or finished; the message says what to do."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def start_run(places: Places, task: str, settings: RunSettings, name: str | None) -> str:
    """Create a Run, or return the existing one of that name if task and settings agree.

    Raises:
        RunProblem: the name is taken by a Run of another task or other settings, or cannot be a name.
        TaskError: the task cannot be loaded.
    """
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise RunProblem(f"'{name}' cannot name a run; use letters, digits, '.', '_' and '-', at most 64")
    digest = task_digest(task)
    _check_dev(task, settings)
    database = Database.open(places.database_url)
    try:
        found = find_run(database, name) if name else None
        if found is not None:
            _same(found, task, digest, settings)
            return found.id
        label = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(task).name) or "run"
        folder = find_folder(task)
        stored = folder.name if folder.parent == BUILT_IN else str(folder)

        def create(run_id: str) -> str:
            create_run(
                database,
                RunRow(
                    id=run_id,
                    task=stored,
                    task_digest=digest,
                    profile=settings.profile,
                    seed=settings.seed,
                    settings=settings.model_dump(mode="json"),
                ),
            )
            return run_id

        return create(name) if name else _create_unnamed(database, label, create)
    finally:
        database.close()


def _create_unnamed(database: Database, label: str, create: Callable[[str], str]) -> str:
    """Create a Run under a free name; the next one where another process was quicker to take it.

    Raises:
        StateError: each of NAME_ATTEMPTS names was taken meanwhile.
    """
    for attempt in range(NAME_ATTEMPTS):
        try:
            return create(_free_name(label, run_names(database)))
        except StateError:
            if attempt == NAME_ATTEMPTS - 1:
                raise
    raise AssertionError("the last attempt returns or raises")


def _check_dev(task: str, settings: RunSettings) -> None:
    """A fresh dev block for each gate needs enough of them."""
    spec = load_spec(find_folder(task))
    block, problems = settings.dev_block or spec.dev_block, spec.sizes[Split.DEV]
    if spec.fresh_dev and settings.generations * block > problems:
        raise RunProblem(
            f"{settings.generations} generations need as many dev blocks of {block}, and '{spec.name}' has {problems} "
            f"dev problems; use --generations {max(1, problems // block)} or fewer, or a smaller --set dev_block"
        )


def execute_run(places: Places, run_id: str, progress: Progress) -> None:
    """Do what is left of a Run; blocks until it is finished.

    Raises:
        RunProblem: no such Run (2), another process works on it (3), or its flow failed (1); it can be resumed.
        KeyboardInterrupt: the person stopped it; it can be resumed.
    """
    database = Database.open(places.database_url)
    try:
        row = find_run(database, run_id)
        if row is None:
            known = ", ".join(run_names(database)) or "none yet"
            raise RunProblem(f"there is no run '{run_id}'; there are: {known}")
        with owned(places, row):
            if row.status == RunStatus.FINISHED:
                return
            if row.profile == EVAL_PROFILE:
                raise RunProblem(f"'{run_id}' is an evaluation, not a run; do it again with `sia eval`")
            if task_digest(row.task) != row.task_digest:
                raise RunProblem(f"the task '{row.task}' has changed since '{run_id}' began; start a new run")
            _work(places, database, row, progress)
    finally:
        database.close()


@contextmanager
def owned(places: Places, row: RunRow) -> Iterator[None]:
    """Hold a Run's lock.

    Raises:
        RunProblem: another process holds it (exit code 3).
    """
    folder = places.run_folder(row.id)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            yield
    except Timeout:
        who = f" (process {row.owner})" if row.owner else ""
        raise RunProblem(
            f"another process is working on '{row.id}'{who}; watch it with `sia status {row.id}`", 3
        ) from None


def is_abandoned(places: Places, database: Database, run_id: str) -> bool:
    """Whether a Run says that it is running although nobody works on it: its process was killed.

    Decided by trying the Run's lock, and the status is read while it is held, so that a Run that is just starting or
    ending is not taken for a killed one. Where this home has no lock file of the Run (it was started from another
    home, on a shared database), nothing can be known and the answer is False.
    """
    path = places.run_folder(run_id) / "lock"
    if not path.is_file():
        return False
    try:
        with FileLock(path, timeout=0):
            row = find_run(database, run_id)
            return row is not None and row.status == RunStatus.RUNNING
    except (Timeout, PermissionError):
        return False


def _work(places: Places, database: Database, row: RunRow, progress: Progress) -> None:
    store = Store(database, row.id)
    server = ensure_server(places, progress.note)
    use_server(places, server)
    from flows.prefect_runs import mark_crashed, run_flow
    from flows.workshop import close_workshop, open_workshop

    if row.flow_run_id is not None:
        mark_crashed(row.flow_run_id)
    store.set_status(RunStatus.RUNNING, owner=f"{socket.gethostname()}:{os.getpid()}")
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(places, store, progress, ended), daemon=True)
    beat.start()
    try:
        shop = open_workshop(places, database, row.id, progress)
        run_flow(shop)
        store.set_status(RunStatus.FINISHED)
    except KeyboardInterrupt:
        store.set_status(RunStatus.INTERRUPTED)
        raise
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        store.set_status(RunStatus.FAILED, error=line)
        raise RunProblem(f"'{row.id}' stopped: {line}; go on with `sia resume {row.id}`", 1) from error
    finally:
        ended.set()
        beat.join()
        close_workshop(row.id)


def _beat(places: Places, store: Store, progress: Progress, ended: threading.Event) -> None:
    """Every few seconds: book working time, so that a kill loses little of it, and see that the server is there."""
    while not ended.wait(BEAT_S):
        store.add_active_time(BEAT_S)
        with contextlib.suppress(ServerError):  # the run needs it at its end only, and says so there
            keep_server(places, progress.note)


def _same(row: RunRow, task: str, digest: str, settings: RunSettings) -> None:
    stored = RunSettings.model_validate(row.settings)
    if row.task_digest != digest:
        raise RunProblem(f"run '{row.id}' is of another task or another version of '{task}'; choose another --name")
    moved = [f for f in RunSettings.model_fields if getattr(stored, f) != getattr(settings, f)]
    if moved:
        raise RunProblem(
            f"run '{row.id}' began with other settings ({', '.join(moved)}); "
            f"resume it as it is with `sia resume {row.id}`, or choose another --name"
        )


def _free_name(label: str, taken: list[str]) -> str:
    number = 1
    while f"{label}-{number}" in taken:
        number += 1
    return f"{label}-{number}"
