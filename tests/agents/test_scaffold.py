"""Storing Scaffolds: identity, what is refused, and that a half-written folder is never used."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.decision import ScaffoldDraft
from agents.scaffold import ScaffoldError, read_draft, read_scaffold, scaffold_digest, store_scaffold
from tasks.contract import TaskKind

SOLVE = "def solve(problem, tools):\n    return 1\n"
FILES = st.dictionaries(st.text(min_size=1, max_size=6), st.binary(max_size=12), max_size=4)


def draft(**files: str) -> ScaffoldDraft:
    return ScaffoldDraft(files={name.replace("_DOT_", "."): text for name, text in files.items()}, note="")


@given(FILES, FILES)
def test_digest_tells_file_sets_apart(first: dict[str, bytes], second: dict[str, bytes]) -> None:
    assert (scaffold_digest(first) == scaffold_digest(second)) == (first == second)
    assert scaffold_digest(dict(reversed(first.items()))) == scaffold_digest(first)


def test_digest_does_not_confuse_names_with_content() -> None:
    assert scaffold_digest({"a": b"bc"}) != scaffold_digest({"ab": b"c"})
    assert scaffold_digest({"a": b"", "b": b""}) != scaffold_digest({"a": b"1:b0:"})


def test_stored_is_read_back(tmp_path: Path) -> None:
    files = {"agent.py": SOLVE, "data/shots.json": "[]", "lib/__init__.py": ""}
    stored = store_scaffold(ScaffoldDraft(files=files, note=""), tmp_path / "deep" / "root")
    assert stored.path.name == stored.id
    assert stored.kind is TaskKind.SOLVE
    assert read_scaffold(stored.path) == stored
    assert (stored.path / "data" / "shots.json").read_text() == "[]"
    for path in (stored.path, *stored.path.rglob("*")):
        assert path.stat().st_mode & 0o004, "the sandbox's user must be able to read it"


def test_storing_is_idempotent_and_mends(tmp_path: Path) -> None:
    first = store_scaffold(draft(agent_DOT_py=SOLVE), tmp_path)
    inode = first.path.stat().st_ino
    assert store_scaffold(draft(agent_DOT_py=SOLVE), tmp_path).path.stat().st_ino == inode
    (first.path / "agent.py").write_text("def solve(")
    assert read_scaffold(store_scaffold(draft(agent_DOT_py=SOLVE), tmp_path).path).id == first.id
    assert [path.name for path in tmp_path.iterdir()] == [first.id], "nothing temporary is left"


def test_many_may_store_the_same_at_once(tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def store() -> None:
        try:
            store_scaffold(draft(agent_DOT_py=SOLVE), tmp_path)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=store) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "name",
    ["/etc/x", "../x", "a/../x", "a//b", "", ".hidden", "a/.hidden", "a\\b", "a\0b", "a\nb", "x" * 300, "~/x", "é"],
)
def test_names_stay_inside(tmp_path: Path, name: str) -> None:
    with pytest.raises(ScaffoldError, match="file name"):
        store_scaffold(ScaffoldDraft(files={"agent.py": SOLVE, name: "x"}, note=""), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no agent.py"),
        ({"agent.py": "def solve(:"}, "does not compile: SyntaxError"),
        ({"agent.py": "x = '\0'"}, "does not compile"),
        ({"agent.py": "(" * 5000}, "does not compile"),
        ({"agent.py": "-" * 100_000 + "1"}, "does not compile"),
        ({"agent.py": SOLVE, "big": "x" * 1_000_001}, "bytes"),
        ({"agent.py": SOLVE} | {f"f{i}": "x" * 900_000 for i in range(5)}, "together"),
        ({"agent.py": SOLVE} | {f"f{i}": "" for i in range(300)}, "at most 200"),
        ({"agent.py": SOLVE, "agent.py/x": ""}, "below another file"),
        ({"agent.py": SOLVE, "u": "\ud800"}, "UTF-8"),
    ],
)
def test_what_is_no_scaffold(tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(ScaffoldError, match=message) as caught:
        store_scaffold(ScaffoldDraft.model_construct(files=files, note=""), tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        (SOLVE, TaskKind.SOLVE),
        ("from helper import solve\n", TaskKind.SOLVE),
        ("def main():\n    def solve(): pass\nmain()\n", TaskKind.PROGRAM),
        ("text = '''\ndef solve(problem, tools): ...\n'''\n", TaskKind.PROGRAM),
    ],
)
def test_kind_is_read_from_the_source(tmp_path: Path, source: str, kind: TaskKind) -> None:
    assert store_scaffold(draft(agent_DOT_py=source), tmp_path).kind is kind


def test_compiling_never_runs_the_code(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    store_scaffold(draft(agent_DOT_py=f"open({str(mark)!r}, 'w')\n{SOLVE}"), tmp_path / "root")
    assert not mark.exists()


def test_a_users_folder(tmp_path: Path) -> None:
    with pytest.raises(ScaffoldError, match="is no folder"):
        read_scaffold(tmp_path / "missing")
    (tmp_path / "agent.py").write_text(SOLVE)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "agent.cpython-311.pyc").write_bytes(b"x")
    given = read_scaffold(tmp_path)
    assert given.id == scaffold_digest({"agent.py": SOLVE.encode()})
    os.symlink("/etc/passwd", tmp_path / "link")
    with pytest.raises(ScaffoldError, match="link is a link"):
        read_scaffold(tmp_path)


def test_a_users_folder_as_a_draft(tmp_path: Path) -> None:
    given = tmp_path / "mine"
    (given / "lib" / "__pycache__").mkdir(parents=True)
    (given / "agent.py").write_bytes(SOLVE.encode().replace(b"\n", b"\r\n"))
    (given / "lib" / "words.txt").write_text("é", encoding="utf-8")
    (given / "lib" / "__pycache__" / "words.cpython-311.pyc").write_bytes(b"\xff\xfe\0")
    files = read_draft(given)
    assert sorted(files.files) == ["agent.py", "lib/words.txt"]
    assert files.note == "mine"
    assert store_scaffold(files, tmp_path / "root").id == read_scaffold(given).id, "no line ending is changed"
    (given / "lib" / "weights.bin").write_bytes(b"\xff\xfe\0")
    for read in (read_scaffold, read_draft):
        with pytest.raises(ScaffoldError, match=r"^lib/weights\.bin is no UTF-8 text: remove it.*$"):
            read(given)
