"""Finding, reading and opening task folders; what a user gets wrong is one line with the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.contract import Split, TaskError, TaskKind
from tasks.loader import BUILT_IN, cache_root, find_folder, list_tasks, load_spec, load_task, task_digest

TOML = """
name = "mine"
title = "My task"
kind = "solve"
answer = "integer"
dev_block = 2
sizes = { train = 3, dev = 4, test = 5 }
"""

CODE = """
from __future__ import annotations
from dataclasses import dataclass
from pathlib import Path
from tasks.contract import Example, Problem, Split, TaskSpec

@dataclass
class Mine:
    spec: TaskSpec
    cache: Path

    def problems(self, split):
        return [Problem(f"{split.value}-{i}", f"{i} + 1") for i in range(self.spec.sizes[split])]

    def examples(self):
        return [Example(p, "1") for p in self.problems(Split.TRAIN)]

    def score(self, problem_id, answer):
        return float(answer == int(problem_id.split("-")[1]) + 1)

def open_task(spec, cache, say):
    say("opened")
    return Mine(spec, cache)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "my-task"
    path.mkdir()
    (path / "task.toml").write_text(TOML)
    (path / "task.md").write_text("Add one.")
    (path / "task.py").write_text(CODE)
    return path


def one_line(error: pytest.ExceptionInfo[TaskError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_every_built_in_folder_is_complete_and_named_after_its_task() -> None:
    specs = {spec.name: spec for spec in list_tasks()}
    assert {"chain-sum", "lawbench"} <= specs.keys()
    for name, spec in specs.items():
        assert {"task.toml", "task.md", "task.py"} <= {file.name for file in (BUILT_IN / name).iterdir()}
        assert spec.text.startswith("# ")
        assert set(spec.sizes) == set(Split)
        assert spec.sizes[Split.TEST] >= 200
        assert spec.sizes[Split.DEV] % spec.dev_block == 0
    assert specs["lawbench"].kind is TaskKind.PROGRAM
    assert [(b.name, b.score) for b in specs["lawbench"].baselines if not b.comparable] == [("previous best", 45.0)]


def test_a_users_folder_opens_by_path(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    task = load_task(str(folder), tmp_path, said.append)
    assert task.spec.text == "Add one."
    assert said == ["opened"]
    assert [task.score("dev-3", answer) for answer in (4, 5)] == [1.0, 0.0]
    assert len(task.problems(Split.TEST)) == 5


def test_names_and_aliases() -> None:
    assert find_folder("chain_sum") == find_folder("chain-sum") == BUILT_IN / "chain-sum"
    with pytest.raises(TaskError, match="did you mean lawbench") as error:
        find_folder("lawbnch")
    one_line(error)
    with pytest.raises(TaskError, match="no task 'zzz': built in are chain-sum, lawbench"):
        find_folder("zzz")


def test_a_folder_without_a_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"it has no task\.toml"):
        find_folder(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('kind = "solve"', 'kind = "dance"'), "field kind: Input should be 'solve' or 'program'"),
        (("dev_block = 2", ""), "field dev_block: Field required"),
        (("dev_block = 2", "dev_block = 5"), "field dev_block: must be between 1 and sizes.dev = 4"),
        (("test = 5", "test = 0"), "field sizes: test must be at least 1"),
        (("test = 5", 'test = "x"'), "field sizes.test"),
        (('name = "mine"', 'name = "mine"\ncolour = "red"'), "field colour: Extra inputs"),
        (('name = "mine"', "name ="), "not valid TOML"),
    ],
)
def test_a_malformed_spec_names_file_and_field(folder: Path, change: tuple[str, str], said: str) -> None:
    file = folder / "task.toml"
    file.write_text(file.read_text().replace(*change))
    with pytest.raises(TaskError) as error:
        load_spec(folder)
    assert one_line(error).startswith(f"{file}: ")
    assert said in str(error.value)


def test_missing_or_broken_code_is_one_line(folder: Path, tmp_path: Path) -> None:
    code = folder / "task.py"
    code.write_text("open_task = 3")
    with pytest.raises(TaskError, match=r"defines no function open_task\(spec, cache, say\)"):
        load_task(str(folder), tmp_path, print)
    other = folder.rename(tmp_path / "other")
    (other / "task.py").write_text("1 / 0")
    with pytest.raises(TaskError, match="ZeroDivisionError while loading it") as error:
        load_task(str(other), tmp_path, print)
    one_line(error)
    (other / "task.py").unlink()
    with pytest.raises(TaskError, match=r"task\.py: missing"):
        load_task(str(other), tmp_path, print)
    (other / "task.md").unlink()
    with pytest.raises(TaskError, match=r"task\.md: missing"):
        load_task(str(other), tmp_path, print)


def test_the_digest_moves_with_every_file_of_the_folder(folder: Path) -> None:
    seen = {task_digest(str(folder))}
    assert task_digest(f"{folder}/.") in seen
    for name in ("task.toml", "task.md", "task.py"):
        (folder / name).write_text((folder / name).read_text() + "\n")
        seen.add(task_digest(str(folder)))
    assert len(seen) == 4
    assert task_digest("chain_sum") == task_digest("chain-sum")


def test_cache_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SIA_CACHE", str(tmp_path / "c"))
    assert cache_root() == tmp_path / "c"
    monkeypatch.delenv("SIA_CACHE")
    assert cache_root().name == "sia"
