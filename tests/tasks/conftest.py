"""Tasks opened once a session, from the user's cache (data is fetched there if it is missing)."""

from __future__ import annotations

import pytest

from tasks.contract import Task
from tasks.loader import cache_root, load_task


@pytest.fixture(scope="session")
def chain_sum() -> Task:
    return load_task("chain-sum", cache_root(), print)


@pytest.fixture(scope="session")
def lawbench() -> Task:
    return load_task("lawbench", cache_root(), print)
