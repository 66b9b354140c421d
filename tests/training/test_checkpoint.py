"""A folder is whole or it is not accepted."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.checkpoint import MANIFEST, CheckpointError, verify, write


def fill(text: str):  # type: ignore[no-untyped-def]
    def filler(work: Path) -> None:
        (work / "sub").mkdir()
        (work / "sub" / "data").write_text(text)
        (work / "top").write_text("top")

    return filler


def test_written_folder_is_valid_and_replaceable(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "0001"
    write(target, fill("one"))
    verify(target)
    write(target, fill("two"))
    verify(target)
    assert (target / "sub" / "data").read_text() == "two"
    assert [path.name for path in target.parent.iterdir()] == ["0001"]


def test_a_failed_write_leaves_nothing_and_keeps_the_old(tmp_path: Path) -> None:
    def half(work: Path) -> None:
        (work / "data").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "new", half)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "kept", fill("good"))
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "kept", half)
    verify(tmp_path / "kept")


@pytest.mark.parametrize("damage", ["no manifest", "broken manifest", "altered", "truncated", "missing"])
def test_damage_is_noticed(tmp_path: Path, damage: str) -> None:
    target = tmp_path / "c"
    write(target, fill("content"))
    data = target / "sub" / "data"
    match damage:
        case "no manifest":
            (target / MANIFEST).unlink()
        case "broken manifest":
            (target / MANIFEST).write_text("{")
        case "altered":
            data.write_text("CONTENT")
        case "truncated":
            data.write_text("")
        case "missing":
            data.unlink()
    with pytest.raises(CheckpointError):
        verify(target)
    with pytest.raises(CheckpointError):
        verify(tmp_path / "never written")
