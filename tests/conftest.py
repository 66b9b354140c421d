"""Fixtures of several rooms: models, and a home with a local Prefect server of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.server import PRIVACY, ensure_server, stop_server
from flows.settings import Places
from training.base_model import ensure_base_model, write_tiny_model

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
    """A real local Prefect server for the session."""
    home = tmp_path_factory.mktemp("prefect-home")
    places = Places(home=home, cache=home, database_url="")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PREFECT_API_URL", raising=False)
        info = ensure_server(places, lambda _: None)
    yield info.api_url
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PREFECT_API_URL", raising=False)
        stop_server(places)
