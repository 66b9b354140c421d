"""Reading what an untrusted program left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.submission import MAX_BYTES, SUBMISSION, read_submission

IDS = frozenset({"dev-1", "dev-2", "dev-3"})


def left(folder: Path, text: str | bytes) -> dict[str, str]:
    raw = text if isinstance(text, bytes) else text.encode()
    (folder / SUBMISSION).write_bytes(raw)
    return read_submission(folder, IDS)


def test_a_plain_submission(tmp_path: Path) -> None:
    assert left(tmp_path, "id,label\ndev-1,盗窃\ndev-2,故意伤害\n") == {"dev-1": "盗窃", "dev-2": "故意伤害"}


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("\ufeffid,label\r\ndev-1, a \r\n", {"dev-1": "a"}),
        ("label,score,ID\na,1,dev-1\n", {"dev-1": "a"}),
        ('id,label\ndev-1,"a,b"\n', {"dev-1": "a,b"}),
        ("id,label\ndev-1,a\ndev-9,b\ntest-0,c\n", {"dev-1": "a"}),
        ("id,label\ndev-1,a\ndev-2,b\ndev-1,a\n", {"dev-2": "b"}),
        ("id,label\ndev-1,a\ndev-1,b\ndev-1,c\ndev-3,d\n", {"dev-3": "d"}),
        ("id,label\ndev-1\n\ndev-2,\ndev-3,c\n", {"dev-3": "c"}),
        (f"id,label\ndev-1,{'x' * 1001}\ndev-2,b\n", {"dev-2": "b"}),
        (f"id,label\ndev-1,{'x' * 200_000}\ndev-2,b\n", {"dev-2": "b"}),
        (b"id,label\ndev-1,\xff\xfe\ndev-2,b\x00\n", {"dev-1": "\ufffd\ufffd", "dev-2": "b\x00"}),
        ("dev-1,a\n", {}),
        ("", {}),
        ('"', {}),
    ],
)
def test_malformed_rows_fall_out_alone(tmp_path: Path, text: str | bytes, answers: dict[str, str]) -> None:
    assert left(tmp_path, text) == answers


def test_missing_linked_piped_or_oversize_is_no_answer(tmp_path: Path) -> None:
    path = tmp_path / SUBMISSION
    assert read_submission(tmp_path, IDS) == {}
    secret = tmp_path / "secret.csv"
    secret.write_text("id,label\ndev-1,a\n")
    path.symlink_to(secret)
    assert read_submission(tmp_path, IDS) == {}
    path.unlink()
    os.mkfifo(path)
    assert read_submission(tmp_path, IDS) == {}, "and it did not wait for a writer"
    path.unlink()
    path.mkdir()
    assert read_submission(tmp_path, IDS) == {}
    path.rmdir()
    with path.open("wb") as file:
        file.write(b"id,label\ndev-1,a\n")
        file.truncate(MAX_BYTES + 1)
    assert read_submission(tmp_path, IDS) == {}


@settings(max_examples=60)
@given(st.binary(max_size=300))
def test_no_bytes_make_it_raise(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    folder = tmp_path_factory.mktemp("left")
    assert left(folder, b"id,label\n" + raw).keys() <= IDS
