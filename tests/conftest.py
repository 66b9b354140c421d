"""Fixtures of several rooms: models, and a home with a local Prefect server of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from flows.server_process import PRIVACY
from training.base_model import ensure_base_model, write_tiny_model

ROOT = Path(__file__).resolve().parent.parent
settings.register_profile("sia", deadline=None)  # machines are shared: an example's time says nothing
settings.load_profile("sia")
os.environ.update(PRIVACY)  # before any test imports prefect


@pytest.fixture(scope="session")
def smollm() -> Path:
    """The real default model, from the user's cache."""
    return ensure_base_model()


@pytest.fixture(scope="session")
def tiny(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny model of the same form and with the same tokenizer."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", smollm)


@pytest.fixture(scope="session")
def prefect_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real local Prefect server for the session, started and stopped by a process of its own: to this one it is a
    server that the user names by `PREFECT_API_URL`, which is used and never stopped."""
    env = {**os.environ, "SIA_HOME": str(tmp_path_factory.mktemp("prefect-home"))}
    env.pop("PREFECT_API_URL", None)

    def server(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "flows", "server", *command],
            env=env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    server("start")
    yield json.loads(server("status", "--json"))["api_url"]
    server("stop")
