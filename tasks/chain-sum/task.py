"""chain-sum: sums of two numbers of two digits, from reasoning-gym's `chain_sum`.

The problems are drawn once, by rules that `task.toml` fixes, kept in the cache and checked against the sha256
that `task.toml` pins: whatever the machine, the run's seed or the generator's version, they are the same
problems or the task refuses to open.

There are 8,100 such sums, so the splits are drawn without replacement: each split draws from a seed range of its
own, in the generator's order, test first, then dev, then train, and skips what was drawn before. No text occurs
twice in all three, so every dev block is fresh, and what a few-shot prompt shows is asked nowhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from tasks.answers import as_integer
from tasks.contract import Example, Problem, Say, Split, TaskError, TaskSpec

MAX_DRAWS = 1_000_000
"""Draws after which a split gives up; the ranges of the splits' seeds are a thousand times as far apart."""


class Level(BaseModel):
    """`[level]` of task.toml: everything that decides which problems there are."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    terms: int
    digits: int
    operators: tuple[str, ...]
    first_seed: dict[Split, int]
    problems_sha256: str


class Drawn(NamedTuple):
    """One question with its answer."""

    question: str
    answer: str


def open_task(spec: TaskSpec, cache: Path, say: Say) -> ChainSum:
    """Open the task from the cache, or draw its problems first (some seconds, once).

    Raises:
        TaskError: the level is malformed, its space too small, or the drawn problems not the pinned ones.
    """
    try:
        level = Level.model_validate(spec.level)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in ("level", *first["loc"]))
        raise TaskError(f"{spec.name}/task.toml: field {field}: {first['msg']}") from error
    file = cache / "tasks" / f"{spec.name}-{_settings_digest(spec, level)}.json"
    pairs = _cached(file, level)
    if pairs is None:
        say(f"drawing the problems of {spec.name} (once; kept in {file})")
        drawn = draw_all(spec, level)
        text = _canonical({split.value: [[d.question, d.answer] for d in drawn[split]] for split in Split})
        if (found := _sha256(text)) != level.problems_sha256:
            raise TaskError(
                f"{spec.name}: the generator gave problems with sha256 {found}, task.toml pins "
                f"{level.problems_sha256}: install the pinned reasoning-gym (constraints.txt)"
            )
        _write_atomically(file, text)
        pairs = json.loads(text)
    return ChainSum(spec, {split: pairs[split.value] for split in Split})


def draw_all(spec: TaskSpec, level: Level) -> dict[Split, list[Drawn]]:
    """All splits, drawn anew by the rules above.

    Raises:
        TaskError: the space is too small for the sizes.
    """
    taken: set[str] = set()
    return {split: _draw(spec, level, split, taken) for split in (Split.TEST, Split.DEV, Split.TRAIN)}


class ChainSum:
    """The opened task. Answers of dev and test stay in here."""

    def __init__(self, spec: TaskSpec, pairs: Mapping[Split, Sequence[Sequence[str]]]) -> None:
        self.spec = spec
        self._problems = {
            split: [Problem(f"{split.value}-{i}", question) for i, (question, _) in enumerate(pairs[split])]
            for split in Split
        }
        self._gold = {
            f"{split.value}-{i}": int(answer) for split in Split for i, (_, answer) in enumerate(pairs[split])
        }

    def problems(self, split: Split) -> Sequence[Problem]:
        """All problems of a split; dev's blocks are its consecutive slices."""
        return self._problems[split]

    def asked(self, split: Split) -> Sequence[Problem]:
        """All problems of the split."""
        return self.problems(split)

    def examples(self) -> Sequence[Example]:
        """The train problems with their answers."""
        return [Example(problem, str(self._gold[problem.id])) for problem in self._problems[Split.TRAIN]]

    def score(self, problem_id: str, answer: JsonValue) -> float:
        """1.0 for an answer that is exactly the right integer (see `tasks.answers.as_integer`), else 0.0.

        Raises:
            TaskError: no such problem.
        """
        if problem_id not in self._gold:
            raise TaskError(f"{self.spec.name} has no problem {problem_id!r}")
        return float(as_integer(answer) == self._gold[problem_id])

    def write_dataset(self, split: Split, directory: Path) -> None:
        """Not for this task.

        Raises:
            TaskError: always.
        """
        raise TaskError(f"{self.spec.name} is a solve task, asked by problem; it has no files for a program")

    def read_answers(self, working_dir: Path) -> dict[str, JsonValue]:
        """Not for this task.

        Raises:
            TaskError: always.
        """
        raise TaskError(f"{self.spec.name} is a solve task, asked by problem; it reads no submission")


def _draw(spec: TaskSpec, level: Level, split: Split, taken: set[str]) -> list[Drawn]:
    """One split, in the generator's order, of texts not taken before; takes them."""
    kept: list[Drawn] = []
    for item in _generate(level, split):
        if item.question in taken:
            continue
        taken.add(item.question)
        kept.append(item)
        if len(kept) == spec.sizes[split]:
            return kept
    raise TaskError(
        f"{spec.name}: only {len(kept)} of {spec.sizes[split]} {split} problems in {MAX_DRAWS} draws: "
        "the level's space is too small for its sizes"
    )


def _generate(level: Level, split: Split) -> Iterator[Drawn]:
    """The generator's problems for the seeds of one split that use the level's operators only: item i is a function of
    `first_seed + i` alone."""
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(
        "chain_sum",
        min_terms=level.terms,
        max_terms=level.terms,
        min_digits=level.digits,
        max_digits=level.digits,
        seed=level.first_seed[split],
        size=MAX_DRAWS,
    )
    for index in range(MAX_DRAWS):
        entry = dataset[index]
        if set(entry["metadata"]["expression"].split()[1::2]) <= set(level.operators):
            yield Drawn(entry["question"], entry["answer"])


def _cached(file: Path, level: Level) -> dict[str, list[list[str]]] | None:
    """The cached problems if they are the pinned ones, else None."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError:
        return None
    if _sha256(text) != level.problems_sha256:
        return None
    pairs: dict[str, list[list[str]]] = json.loads(text)
    return pairs


def _settings_digest(spec: TaskSpec, level: Level) -> str:
    settings = {
        "level": level.model_dump(mode="json"),
        "sizes": {split.value: spec.sizes[split] for split in Split},
    }
    return _sha256(_canonical(settings))[:16]


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _write_atomically(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    with os.fdopen(descriptor, "w", encoding="utf-8") as sink:
        sink.write(text)
    os.replace(temporary, file)
