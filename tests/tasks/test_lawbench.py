"""lawbench: the cut, what a program may read, and the scores of an oracle and of a program that does nothing."""

from __future__ import annotations

import csv
import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tasks.contract import Problem, Split, Task, TaskError
from tasks.loader import BUILT_IN
from verifiers.scoring import Reason, mean_reward, score_episode


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def gold_of(task: Task) -> dict[str, str]:
    return task._gold  # type: ignore[attr-defined, no-any-return]


def accuracy(task: Task, split: Split, working_dir: Path) -> float:
    """As the loop does it: recorded answers, scored outside, over every problem of the split."""
    answers = task.read_answers(working_dir)
    ids = [problem.id for problem in task.problems(split)]
    records = {i: score_episode(task, i, answers.get(i), ()) for i in ids}
    return mean_reward(ids, {i: r.reward for i, r in records.items()}).mean


def submit(folder: Path, answers: dict[str, str]) -> Path:
    with (folder / "submission.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "label"))
        writer.writerows(answers.items())
    return folder


def test_the_cut_is_stratified_disjoint_and_the_same_everywhere(lawbench: Task) -> None:
    gold = gold_of(lawbench)
    problems = {split: lawbench.problems(split) for split in Split}
    assert {split: len(asked) for split, asked in problems.items()} == {
        Split.TRAIN: 4441,
        Split.DEV: 891,
        Split.TEST: 913,
    }
    texts = {split: {p.prompt for p in asked} for split, asked in problems.items()}
    assert not texts[Split.DEV] & texts[Split.TRAIN]
    assert len(texts[Split.DEV]) == 891
    classes = {split: Counter(gold[p.id] for p in asked) for split, asked in problems.items()}
    assert len(classes[Split.TRAIN]) == 191, "every class keeps train rows"
    assert max(classes[Split.DEV].values()) == 5
    assert len(classes[Split.TEST]) == 190
    ids = "\n".join(p.id for p in problems[Split.DEV])
    assert hashlib.sha256(ids.encode()).hexdigest().startswith("84296c3b403bf16f")
    assert [e.answer for e in lawbench.examples()] == [gold[p.id] for p in problems[Split.TRAIN]]


def test_the_known_artefacts_are_as_documented(lawbench: Task) -> None:
    gold = gold_of(lawbench)
    known = {p.prompt for split in (Split.TRAIN, Split.DEV) for p in lawbench.problems(split)}
    assert sum(p.prompt in known for p in lawbench.problems(Split.TEST)) == 12
    everything: list[Problem] = [p for split in Split for p in lawbench.problems(split)]
    assert not any(gold[p.id] in p.prompt for p in everything), "masking: a label never stands in its own text"


@pytest.mark.parametrize("split", list(Split))
def test_a_program_gets_the_papers_files_and_no_gold(lawbench: Task, split: Split, tmp_path: Path) -> None:
    lawbench.write_dataset(split, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "train.csv",
        "test.csv",
        "classes.json",
        "sample_submission.csv",
        "task.md",
    }
    train, asked = rows_of(tmp_path / "train.csv"), rows_of(tmp_path / "test.csv")
    assert list(train[0]) == ["id", "text", "label"]
    assert list(asked[0]) == ["id", "text"]
    assert [row["id"] for row in asked] == [p.id for p in lawbench.asked(split)]
    assert not {row["id"] for row in train} & {row["id"] for row in asked}
    classes = json.loads((tmp_path / "classes.json").read_text())
    assert len(classes) == 191
    assert {row["label"] for row in train} == set(classes)
    assert [row["id"] for row in rows_of(tmp_path / "sample_submission.csv")] == [r["id"] for r in asked]
    texts = {p.id: p.prompt for s in Split for p in lawbench.problems(s)}
    assert all(texts[row["id"]] == row["text"] for row in [*train, *asked])
    gold = gold_of(lawbench)
    assert all(gold[row["id"]] == row["label"] for row in train)
    if split is Split.TRAIN:
        assert len(train) + len(asked) == 4441
        assert 800 < len(asked) < 1000
    else:
        assert list(lawbench.asked(split)) == list(lawbench.problems(split))
        assert len(train) == (4441 if split is Split.DEV else 5332)


@pytest.mark.parametrize("split", [Split.DEV, Split.TEST])
def test_oracle_nothing_and_constant(lawbench: Task, split: Split, tmp_path: Path) -> None:
    assert accuracy(lawbench, split, tmp_path) == 0.0, "no submission"
    gold = {p.id: gold_of(lawbench)[p.id] for p in lawbench.problems(split)}
    assert accuracy(lawbench, split, submit(tmp_path, gold)) == 1.0
    label, times = Counter(gold.values()).most_common(1)[0]
    constant = dict.fromkeys(gold, label)
    assert accuracy(lawbench, split, submit(tmp_path, constant)) == times / len(gold)
    assert times == 5, "the majority baseline"
    half = dict(list(gold.items())[: len(gold) // 2])
    assert accuracy(lawbench, split, submit(tmp_path, half)) == (len(gold) // 2) / len(gold), "missing is wrong"


def test_answers_to_other_splits_do_not_help(lawbench: Task, tmp_path: Path) -> None:
    submit(tmp_path, {p.id: gold_of(lawbench)[p.id] for p in lawbench.problems(Split.TRAIN)})
    assert accuracy(lawbench, Split.DEV, tmp_path) == 0.0


def test_labels_are_matched_exactly(lawbench: Task) -> None:
    problem_id = lawbench.problems(Split.DEV)[0].id
    label = gold_of(lawbench)[problem_id]
    assert score_episode(lawbench, problem_id, label, ()).counted_reason is Reason.RIGHT
    for wrong in (label + "罪", label[:-1], [label], {"label": label}, 0, True):
        assert score_episode(lawbench, problem_id, wrong, ()).reward == 0.0
    with pytest.raises(TaskError, match="no problem 'dev-x'"):
        lawbench.score("dev-x", label)


def test_the_reference_program_answers_every_row(tmp_path: Path) -> None:
    dataset, working = tmp_path / "dataset", tmp_path / "working"
    dataset.mkdir()
    working.mkdir()
    (dataset / "train.csv").write_text("id,text,label\n0,aaa,A\n1,aab,A\n2,zzz,Z\n3,zzy,Z\n", encoding="utf-8")
    (dataset / "test.csv").write_text("id,text\nx,aaaa\ny,zzzz\n", encoding="utf-8")
    agent = BUILT_IN / "lawbench" / "reference" / "linear" / "agent.py"
    command = [sys.executable, str(agent), "--dataset_dir", str(dataset), "--working_dir", str(working)]
    subprocess.run(command, check=True)
    assert (working / "submission.csv").read_text().split() == ["id,label", "x,A", "y,Z"]
