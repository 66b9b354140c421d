"""How tests run the loop: small settings on the even-length task with the tiny model, in a home of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

from flows.settings import Places, RunSettings, load_run_settings

ROOT = Path(__file__).resolve().parents[2]
EVEN_LENGTH = ROOT / "tests" / "fixtures" / "even-length"

SMALL: dict[str, object] = {
    "generations": 4,
    "dev_block": 12,
    "test_problems": 16,
    "harness_patience": 1,
    "shard_episodes": 8,
    "weights.iterations": 2,
    "weights.problems": 4,
    "weights.samples": 4,
    "weights.learning_rate": 0.01,
    "search.first_batch": 2,
    "search.second_batch": 0,
    "search.problems": 4,
    "search.finalists": 1,
    "search.final_problems": 4,
}
TABLES = (
    "episodes",
    "model_calls",
    "scores",
    "decisions",
    "generations",
    "training_steps",
    "gate_verdicts",
    "scaffolds",
)
"""What a resumed run may add to but never change."""


def places_in(folder: Path) -> Places:
    cache = Places.from_environment().cache
    return Places(home=folder, cache=cache, database_url=f"sqlite:///{folder / 'sia.db'}")


def small_settings(model: Path, **more: object) -> RunSettings:
    return load_run_settings("offline", {**SMALL, "model": str(model), **more}, Path("/nowhere"))  # type: ignore[dict-item]


def environment(places: Places, prefect_url: str) -> dict[str, str]:
    return {
        **os.environ,
        "SIA_HOME": str(places.home),
        "SIA_CACHE": str(places.cache),
        "SIA_DATABASE_URL": places.database_url,
        "PREFECT_API_URL": prefect_url,
        "OMP_NUM_THREADS": "1",
    }


def sia(arguments: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
    """The real command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "flows", *arguments],
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run_arguments(model: Path, name: str, **more: object) -> list[str]:
    settings = {**SMALL, "model": str(model), **more}
    pairs = [f"{key}={value!r}".replace("'", '"') for key, value in settings.items()]
    return ["run", str(EVEN_LENGTH), "--name", name, "--quiet", *(part for pair in pairs for part in ("--set", pair))]


def recorded(database_url: str) -> dict[str, dict[object, tuple[object, ...]]]:
    """Table -> primary key -> row, of all that is durably done; nothing if the schema is not there yet."""
    if not Path(database_url.removeprefix("sqlite:///")).exists():
        return {}
    with contextlib.suppress(OperationalError):
        return read_rows(database_url)
    return {}


def read_rows(database_url: str) -> dict[str, dict[object, tuple[object, ...]]]:
    """See `recorded`."""
    engine = create_engine(database_url)
    rows: dict[str, dict[object, tuple[object, ...]]] = {}
    with engine.connect() as connection:
        for table in TABLES:
            done = " WHERE status = 'done'" if table in ("episodes", "model_calls") else ""
            found = connection.execute(text(f"SELECT * FROM {table}{done}")).mappings()
            volatile = {"accepted", "status", "adapter_id", "scaffold_id", "note"} if table == "generations" else set()
            rows[table] = {
                row["episode_id"] if table == "scores" else row["id"]: tuple(
                    value for name, value in row.items() if name not in volatile
                )
                for row in found
            }
    engine.dispose()
    return rows


def start_or_resume(places: Places, settings: RunSettings) -> None:
    """What `sia run --name r` does, for a process of its own."""
    from flows.control import execute_run, start_run
    from flows.watch import QuietProgress

    os.environ["SIA_HOME"] = str(places.home)
    execute_run(places, start_run(places, str(EVEN_LENGTH), settings, "r"), QuietProgress())


def kill_and_watch(process: BaseProcess) -> list[str]:
    """`kill -9` a process alone; returns what of its descendants is still there five seconds later."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.kill()
    process.join()
    _, alive = psutil.wait_procs(family, timeout=5)
    return [f"{p.pid} {p.name()}" for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
