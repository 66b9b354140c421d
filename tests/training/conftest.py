"""Engines for the tests of training/, on the real model and on the random tiny one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from training.engine import LocalEngine


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
