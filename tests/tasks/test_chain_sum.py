"""chain-sum: the problems are pinned, the splits share no text, and only exact integers score."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue

from tasks.contract import Split, Task, TaskError
from tasks.loader import BUILT_IN, load_spec, load_task

ROOT = BUILT_IN.parent
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
OPEN_AND_PRINT = """
import json, sys
from pathlib import Path
from tasks.contract import Split
from tasks.loader import load_task
task = load_task("chain-sum", Path(sys.argv[1]), lambda line: None)
asked = [[p.id, p.prompt] for split in Split for p in task.problems(split)]
print(json.dumps([asked, task._gold, "reasoning_gym" in sys.modules]))
"""


def terms(prompt: str) -> tuple[int, int]:
    """The two terms, read off the prompt by rules of this test's own."""
    found = re.fullmatch(r"State the final answer to the following arithmetic problem: (\d\d) \+ (\d\d) =", prompt)
    assert found, prompt
    return int(found[1]), int(found[2])


def result(prompt: str) -> int:
    return sum(terms(prompt))


def code() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chain_sum_task", BUILT_IN / "chain-sum" / "task.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["chain_sum_task"] = module
    spec.loader.exec_module(module)
    return module


def test_sizes_ids_and_level(chain_sum: Task) -> None:
    for split in Split:
        problems = chain_sum.problems(split)
        assert [p.id for p in problems] == [f"{split.value}-{i}" for i in range(chain_sum.spec.sizes[split])]
        for problem in problems:
            assert all(10 <= term <= 99 for term in terms(problem.prompt))
            assert problem.fields == {}
        assert chain_sum.asked(split) == problems


def test_no_text_occurs_twice_in_all_three_splits(chain_sum: Task) -> None:
    texts = [p.prompt for split in Split for p in chain_sum.problems(split)]
    assert len(texts) == 3000 + 3072 + 400
    assert len(set(texts)) == len(texts)


def test_dev_is_whole_blocks(chain_sum: Task) -> None:
    assert chain_sum.spec.sizes[Split.DEV] % chain_sum.spec.dev_block == 0


def test_splits_ask_for_sums_of_the_same_kind(chain_sum: Task) -> None:
    """No split is easier: the means of the sums differ by less than four standard errors of the smallest."""
    means = [sum(result(p.prompt) for p in ps) / len(ps) for ps in map(chain_sum.problems, Split)]
    deviation = 2**0.5 * 90 / 12**0.5
    assert max(means) - min(means) < 4 * deviation / 400**0.5


def test_a_space_too_small_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = code()
    spec = load_spec(BUILT_IN / "chain-sum")
    level = module.Level.model_validate({**spec.level, "digits": 1})
    monkeypatch.setattr(module, "MAX_DRAWS", 2000)
    with pytest.raises(TaskError, match="only 100 of 400 test problems in 2000 draws"):
        module.draw_all(spec, level)


def test_gold_agrees_with_arithmetic_and_only_train_shows_it(chain_sum: Task) -> None:
    for split in Split:
        for problem in chain_sum.problems(split):
            assert chain_sum.score(problem.id, result(problem.prompt)) == 1.0
            assert chain_sum.score(problem.id, result(problem.prompt) + 1) == 0.0
    examples = chain_sum.examples()
    assert [e.problem for e in examples] == list(chain_sum.problems(Split.TRAIN))
    assert all(int(e.answer) == result(e.problem.prompt) for e in examples)


def test_other_processes_draw_the_same_and_reopen_without_the_generator(chain_sum: Task, tmp_path: Path) -> None:
    opened = []
    for hash_seed in ("1", "2"):  # drawn anew, then from the cache
        done = subprocess.run(
            [sys.executable, "-c", OPEN_AND_PRINT, str(tmp_path)],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        opened.append(json.loads(done.stdout))
    here = [[p.id, p.prompt] for split in Split for p in chain_sum.problems(split)]
    assert opened[0][0] == opened[1][0] == here
    assert opened[0][1] == opened[1][1]
    assert (opened[0][2], opened[1][2]) == (True, False)


def test_a_damaged_cache_is_drawn_again_and_a_wrong_pin_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_task("chain-sum", tmp_path / "whole", print)
    (source,) = (tmp_path / "whole" / "tasks").glob("chain-sum-*.json")
    damaged = tmp_path / "tasks" / source.name
    damaged.parent.mkdir()
    damaged.write_text(source.read_text()[:-20])
    said: list[str] = []
    task = load_task("chain-sum", tmp_path, said.append)
    assert len(said) == 1
    assert damaged.read_text() == source.read_text()

    module = code()
    spec = task.spec.model_copy(update={"level": {**task.spec.level, "problems_sha256": "0" * 64}})
    monkeypatch.setattr(module, "draw_all", lambda spec, level: {split: [] for split in Split})
    with pytest.raises(TaskError, match="install the pinned reasoning-gym"):
        module.open_task(spec, tmp_path / "other", print)
    broken = task.spec.model_copy(update={"level": {**task.spec.level, "terms": "two"}})
    with pytest.raises(TaskError, match=r"field level\.terms"):
        module.open_task(broken, tmp_path, print)


@given(JSON)
def test_any_json_scores_0_or_1(chain_sum: Task, answer: JsonValue) -> None:
    assert chain_sum.score("test-0", answer) in (0.0, 1.0)


def test_hostile_answers_score_0(chain_sum: Task) -> None:
    problem = next(p for p in chain_sum.problems(Split.TEST) if result(p.prompt) == 100)
    hostile: list[JsonValue] = [
        True, [100], {"answer": 100}, "100.0", "100 ", "hundred", 100.5, float("nan"), "1" * 10**6,
    ]  # fmt: skip
    scores = [chain_sum.score(problem.id, answer) for answer in hostile]
    assert scores == [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0], "blanks around an integer are fine"


def test_it_says_what_it_is_not(chain_sum: Task, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="solve task"):
        chain_sum.write_dataset(Split.DEV, tmp_path)
    with pytest.raises(TaskError, match="solve task"):
        chain_sum.read_answers(tmp_path)
    with pytest.raises(TaskError, match="no problem 'dev-999999'"):
        chain_sum.score("dev-999999", 1)
