"""`sia doctor`: is this machine ready? One line each, with the fix where something is missing.

`fail` is for what the default run needs, `warn` for what it provides by itself or can do without. Nothing is changed:
no folder is made, no server started, no database migrated. Keys are named, and said to be set or not; their values are
never shown.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from flows.settings import Places

PACKAGES = ("prefect", "torch", "transformers", "peft", "trl", "modal", "anthropic", "sqlmodel")
KEYS = {
    "ANTHROPIC_API_KEY": "only for agents on Claude",
    "OPENAI_API_KEY": "only for an OpenAI-compatible endpoint",
    "MODAL_TOKEN_ID": "only for training on Modal",
}
"""Name of a key -> what it is for."""
OLDEST_PYTHON, TOO_NEW_PYTHON = (3, 11), (3, 14)
DISK_NEEDED_GB, DISK_WANTED_GB = 1.0, 5.0
CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
"""Beside the checkout; an installed wheel has none, and then versions are only shown."""


class Status(StrEnum):
    """How a check came out."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Check(BaseModel):
    """One line. `fix` is empty where there is nothing to do."""

    model_config = ConfigDict(frozen=True)
    name: str
    status: Status
    text: str
    fix: str = ""


def examine(places: Places) -> list[Check]:
    """All checks, in the order in which they matter. A check that itself breaks is a failed check."""
    checks: list[Check] = []
    for look in (python, packages, sandbox, disk, model, database, prefect_server, keys):
        try:
            checks.extend(look(places))
        except Exception as error:
            line = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            checks.append(Check(name=look.__name__, status=Status.FAIL, text=line))
    return checks


def python(_places: Places) -> Iterator[Check]:
    """The interpreter's version."""
    version = ".".join(str(part) for part in sys.version_info[:3])
    fits = OLDEST_PYTHON <= sys.version_info[:2] < TOO_NEW_PYTHON
    fix = "" if fits else "use Python 3.11, 3.12 or 3.13: make clean setup PYTHON=python3.11"
    yield Check(name="python", status=Status.OK if fits else Status.FAIL, text=version, fix=fix)


def packages(_places: Places, constraints: Path = CONSTRAINTS) -> Iterator[Check]:
    """Installed versions against the pinned ones, without importing anything."""
    from importlib.metadata import PackageNotFoundError, version

    pinned = _pins(constraints)
    for name in PACKAGES:
        wanted = pinned.get(name)
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Check(name=name, status=Status.FAIL, text="not installed", fix="make setup")
            continue
        if wanted is None or found.partition("+")[0] == wanted:
            yield Check(name=name, status=Status.OK, text=found)
        else:
            text = f"{found}, pinned is {wanted}"
            yield Check(name=name, status=Status.WARN, text=text, fix="pip install -c constraints.txt -e .")


def _pins(constraints: Path) -> dict[str, str]:
    if not constraints.is_file():
        return {}
    lines = (line.split("#")[0].strip() for line in constraints.read_text(encoding="utf-8").splitlines())
    return dict(line.split("==", 1) for line in lines if "==" in line)


def sandbox(_places: Places) -> Iterator[Check]:
    """A real sandbox is started and must hold."""
    from agents.sandbox import BubblewrapSandbox, SandboxUnavailable

    try:
        BubblewrapSandbox().preflight()
    except SandboxUnavailable as error:
        text = " ".join(str(error).split())
        yield Check(name="sandbox", status=Status.FAIL, text=text, fix="or run with --sandbox none, at your own risk")
    else:
        yield Check(name="sandbox", status=Status.OK, text="bubblewrap confines scaffold code here")


def disk(places: Places) -> Iterator[Check]:
    """Free space where state and caches live."""
    for name, folder, variable in (("home", places.home, "SIA_HOME"), ("cache", places.cache, "SIA_CACHE")):
        existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        free_gb = shutil.disk_usage(existing).free / 1e9
        if not os.access(existing, os.W_OK):
            yield Check(
                name=name,
                status=Status.FAIL,
                text=f"{folder} cannot be written",
                fix=f"set {variable} to a folder of yours",
            )
            continue
        level = Status.OK if free_gb >= DISK_WANTED_GB else Status.WARN if free_gb >= DISK_NEEDED_GB else Status.FAIL
        fix = "" if level is Status.OK else f"make room, or set {variable} to another disk"
        yield Check(name=name, status=level, text=f"{free_gb:.1f} GB free in {folder}", fix=fix)


def model(_places: Places) -> Iterator[Check]:
    """The base model: converted already, or at least there to be converted."""
    from flows.settings import RunSettings
    from training.base_model import MANIFEST, base_model_path

    name = RunSettings().model or ""
    path = base_model_path(name)
    if (path / MANIFEST).is_file():
        yield Check(name="model", status=Status.OK, text=f"{name} in {path}")
    else:
        yield Check(
            name="model",
            status=Status.WARN,
            text=f"{name} is not prepared yet; the first run does it",
            fix="sia tasks fetch chain-sum",
        )


def database(places: Places) -> Iterator[Check]:
    """Reachable, and its schema the one that this version writes."""
    from sqlalchemy.exc import SQLAlchemyError

    from flows.state.database import StateError, connect, current_revision, newest_revision

    url = places.database_url
    file = Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None
    if file is not None and not file.exists():
        yield Check(name="database", status=Status.OK, text=f"{file} (made by the first command that needs it)")
        return
    try:
        engine = connect(url)
    except StateError:  # its message quotes the URL, which may hold a password
        text = f"a URL that begins with '{url.partition(':')[0]}:' is neither sqlite:/// nor postgresql://"
        yield Check(name="database", status=Status.FAIL, text=text, fix="mend SIA_DATABASE_URL")
        return
    shown = engine.url.render_as_string(hide_password=True)
    try:
        found = current_revision(engine)
    except SQLAlchemyError as error:
        line = str(error).splitlines()[0][:200]
        fix = "start the database server, or mend SIA_DATABASE_URL"
        yield Check(name="database", status=Status.FAIL, text=f"{shown}: {line}", fix=fix)
        return
    finally:
        engine.dispose()
    newest = newest_revision()
    if found == newest:
        yield Check(name="database", status=Status.OK, text=f"{shown}, schema {found}")
    elif found is None or found < newest:
        text = f"{shown}, schema {found or 'empty'}; the next command brings it to {newest}"
        yield Check(name="database", status=Status.OK, text=text)
    else:
        text = f"{shown}, schema {found} is newer than this version's {newest}"
        yield Check(name="database", status=Status.FAIL, text=text, fix="update sia, or set SIA_HOME to another folder")


def prefect_server(places: Places) -> Iterator[Check]:
    """The local Prefect server, or the one that PREFECT_API_URL names."""
    from flows.server import server_status
    from flows.server_process import log_path

    info = server_status(places)
    if info is not None and info.healthy:
        yield Check(name="prefect server", status=Status.OK, text=f"up, UI at {info.ui_url}")
    elif info is not None and info.pid is None:
        text = f"nothing answers at PREFECT_API_URL={info.api_url}"
        yield Check(
            name="prefect server",
            status=Status.FAIL,
            text=text,
            fix="start it, or unset PREFECT_API_URL to use a local one",
        )
    elif info is not None:
        text = f"does not answer at {info.api_url} (see {log_path(places)})"
        yield Check(name="prefect server", status=Status.WARN, text=text, fix="sia server stop; sia server start")
    else:
        yield Check(name="prefect server", status=Status.OK, text="not running; `sia run` starts it")


def keys(_places: Places) -> Iterator[Check]:
    """Which keys are set. The offline profile needs none."""
    for name, use in KEYS.items():
        text = "set" if os.environ.get(name) else f"not set ({use}; the offline profile needs none)"
        yield Check(name=name, status=Status.OK, text=text)
