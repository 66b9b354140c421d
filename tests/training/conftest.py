"""Models for the tests of training/: the real one from the user's cache, and a random tiny one of the same form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from training.base_model import ensure_base_model, write_tiny_model
from training.engine import LocalEngine


@pytest.fixture(scope="session")
def smollm() -> Path:
    return ensure_base_model()


@pytest.fixture(scope="session")
def tiny(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", smollm)


@pytest.fixture(scope="module")
def real_engine(smollm: Path) -> Iterator[LocalEngine]:
    engine = LocalEngine(smollm, adapter_path=Path, threads=2)
    yield engine
    engine.close()


@pytest.fixture
def tiny_engine(tiny: Path) -> Iterator[LocalEngine]:
    engine = LocalEngine(tiny, adapter_path=Path, threads=2)
    yield engine
    engine.close()
