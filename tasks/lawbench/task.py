"""LawBench criminal charges: 191 labels, Chinese case texts, the exact splits of the SIA paper's release.

The data come out of the pinned `sia-agent` wheel (MIT), which is never installed. `test` is its 913 rows; its
5,332 train rows are cut here, once and for all, into our `train` and `dev`:

- A class of n train rows gives min(5, n // 5) of them to dev: at most 5 a class, which is how test was made.
- Which ones: those whose text has the smallest sha256. No random state, so the cut is the same everywhere.
- A text that occurs twice among the train rows stays in train, so dev holds no text of train.

A problem's id is its split and its row in the release's file: `dev-17` was row 17 of train.csv.

Traps, left as published so that figures stay comparable: 12 test texts are exact duplicates of train rows
(the linear baseline scores 77.7 with them, 77.4 without), and a row's own label never occurs in its text
(masking), so ruling out the labels that occur in a text gains about 1.4 points without any skill.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import JsonValue

from tasks.contract import Example, Problem, Say, Split, TaskError, TaskSpec
from tasks.fetch import fetch_from_package
from tasks.submission import read_submission

PACKAGE = "sia-agent==0.6.0"
_DATA = "sia/tasks/lawbench/data"
TRAIN_FILE = f"{_DATA}/training_data/train.csv"
TEST_FILE = f"{_DATA}/public/test.csv"
GOLD_FILE = f"{_DATA}/private/test.csv"
CLASSES_FILE = f"{_DATA}/public/classes.json"
MEMBERS = {
    TRAIN_FILE: "aba2b6fbf1f7942d92a85520621f3ebcc4d99285e9c4beb9d3a4927cd83f9de0",
    TEST_FILE: "889a486485e42e131e26a910c7ad3eb8d41ce5a4bbf474862e6c563b52cc3d75",
    GOLD_FILE: "ae5f0c7c65ad01e7edd8d8e98db39e50e62f84d33ad03b12147f565ab68ac60b",
    CLASSES_FILE: "08bb3ccd2568076b0d2ec2e062e2a25027d147bf8e9bd8337bf4156b3e3cbd88",
}
DEV_ROWS_A_CLASS = 5
DEV_ONE_IN = 5
TRIAL_ONE_IN = 5


class Row(NamedTuple):
    """One case: `number` is its row in the release's file."""

    number: int
    text: str
    label: str


def open_task(spec: TaskSpec, cache: Path, say: Say) -> LawBench:
    """Fetch the data if need be and open the task.

    Raises:
        TaskError: the package cannot be had, or its data does not have the stated sizes.
    """
    return LawBench(spec, fetch_from_package(PACKAGE, MEMBERS, cache, say))


def cut(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """(train, dev) of the release's train rows, each in the original order."""
    copies = Counter(row.text for row in rows)
    by_label: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_label[row.label].append(row)
    dev: set[int] = set()
    for members in by_label.values():
        single = sorted((row for row in members if copies[row.text] == 1), key=lambda row: _hash(row.text))
        dev.update(row.number for row in single[: min(DEV_ROWS_A_CLASS, len(members) // DEV_ONE_IN)])
    return [row for row in rows if row.number not in dev], [row for row in rows if row.number in dev]


class LawBench:
    """The opened task. Gold labels of dev and test stay in here."""

    def __init__(self, spec: TaskSpec, folder: Path) -> None:
        self.spec = spec
        self._classes: list[str] = json.loads((folder / CLASSES_FILE).read_text(encoding="utf-8"))
        train, dev = cut(_read_rows(folder / TRAIN_FILE))
        gold = {row["id"]: row["label"] for row in _read_csv(folder / GOLD_FILE)}
        test = [Row(int(r["id"]), r["text"], gold[r["id"]]) for r in _read_csv(folder / TEST_FILE)]
        self._rows = {Split.TRAIN: train, Split.DEV: dev, Split.TEST: test}
        for split, rows in self._rows.items():
            if len(rows) != spec.sizes[split]:
                raise TaskError(f"{spec.name}: {len(rows)} {split} rows, task.toml says {spec.sizes[split]}")
        self._gold = {_id(split, row): row.label for split, rows in self._rows.items() for row in rows}

    def problems(self, split: Split) -> Sequence[Problem]:
        """All problems of a split in the release's order; the prompt is the case's text."""
        return [Problem(_id(split, row), row.text) for row in self._rows[split]]

    def examples(self) -> Sequence[Example]:
        """The train problems with their labels."""
        rows = self._rows[Split.TRAIN]
        return [Example(Problem(_id(Split.TRAIN, row), row.text), row.label) for row in rows]

    def score(self, problem_id: str, answer: JsonValue) -> float:
        """1.0 for exactly the case's label, else 0.0; an unknown problem is an error of the caller.

        Raises:
            TaskError: no such problem.
        """
        if problem_id not in self._gold:
            raise TaskError(f"{self.spec.name} has no problem {problem_id!r}")
        return float(isinstance(answer, str) and answer == self._gold[problem_id])

    def asked(self, split: Split) -> Sequence[Problem]:
        """All of a split, but of train a fixed fifth: what `write_dataset` puts into test.csv."""
        return [Problem(_id(split, row), row.text) for row in self._asked(split)]

    def write_dataset(self, split: Split, directory: Path) -> None:
        """Write the paper's files: train.csv, test.csv, classes.json, sample_submission.csv, task.md.

        DEV asks the dev rows and TEST the sealed ones, where train.csv then holds the dev rows too (refit).
        TRAIN asks a fixed fifth of train and leaves the rest to learn from, so that a draft can be tried
        without spending dev.
        """
        asked = self._asked(split)
        held_out = {row.number for row in asked} if split is Split.TRAIN else set()
        known = [(Split.TRAIN, row) for row in self._rows[Split.TRAIN] if row.number not in held_out]
        if split is Split.TEST:
            known += [(Split.DEV, row) for row in self._rows[Split.DEV]]
        directory.mkdir(parents=True, exist_ok=True)
        _write_csv(
            directory / "train.csv",
            ("id", "text", "label"),
            ((_id(of, row), row.text, row.label) for of, row in known),
        )
        _write_csv(directory / "test.csv", ("id", "text"), ((_id(split, row), row.text) for row in asked))
        sample = ((_id(split, row), self._classes[0]) for row in asked)
        _write_csv(directory / "sample_submission.csv", ("id", "label"), sample)
        classes = json.dumps(self._classes, ensure_ascii=False, indent=2)
        (directory / "classes.json").write_text(classes, encoding="utf-8")
        (directory / "task.md").write_text(self.spec.text, encoding="utf-8")

    def _asked(self, split: Split) -> list[Row]:
        rows = self._rows[split]
        if split is not Split.TRAIN:
            return rows
        return [row for row in rows if int(_hash(row.text)[:8], 16) % TRIAL_ONE_IN == 0]

    def read_answers(self, working_dir: Path) -> dict[str, JsonValue]:
        """Problem id -> label from the program's submission.csv; see `tasks.submission`."""
        return dict(read_submission(working_dir, self._gold.keys()))


def _id(split: Split, row: Row) -> str:
    return f"{split.value}-{row.number}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read_rows(path: Path) -> list[Row]:
    return [Row(int(row["id"]), row["text"], row["label"]) for row in _read_csv(path)]


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
