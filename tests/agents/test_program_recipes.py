"""Rendered `program` Scaffolds really run: as a subprocess on a small labelled file, with the two arguments."""

from __future__ import annotations

import ast
import csv
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from agents.program_recipes import Analyzer, Classifier, ProgramRecipe, ProgramSpace, render_program
from tasks.contract import AnswerKind, Split, TaskKind, TaskSpec

TASK = TaskSpec(
    name="charges",
    title='Which """charge"""',
    kind=TaskKind.PROGRAM,
    answer=AnswerKind.LABEL,
    dev_block=10,
    sizes={Split.TRAIN: 60, Split.DEV: 10, Split.TEST: 12},
)

WORDS = {"盗窃": "偷走他人财物后离开", "放火": "点燃房屋引起大火", "诈骗": "虚构事实骗取钱款"}


def texts(per_class: int, seed: int) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    rows = []
    for label, words in WORDS.items():
        for _ in range(per_class):
            filler = "".join(draw.choices("甲乙丙丁戊己庚辛", k=12))
            rows.append((f"{filler}，{words}\n“{filler}”", label))
    draw.shuffle(rows)
    return rows


def write_dataset(directory: Path) -> dict[str, str]:
    """train.csv and test.csv as a program sees them; returns what is right, which the program never sees."""
    directory.mkdir()
    with open(directory / "train.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text", "label"])
        writer.writerows((f"r{i}", text, label) for i, (text, label) in enumerate(texts(20, 1)))
    asked = texts(4, 2)
    with open(directory / "test.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text"])
        writer.writerows((f"q{i}", text) for i, (text, _) in enumerate(asked))
    return {f"q{i}": label for i, (_, label) in enumerate(asked)}


def run(recipe: ProgramRecipe, place: Path) -> tuple[list[dict[str, str]], dict[str, str]]:
    right = write_dataset(place / "data")
    agent = place / "agent.py"
    agent.write_text(render_program(recipe, TASK).files["agent.py"], encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(agent), "--dataset_dir", str(place / "data"), "--working_dir", str(place / "out")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with open(place / "out" / "submission.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file)), right


def test_the_first_scaffold_runs_as_a_program_and_learns(tmp_path: Path) -> None:
    rows, right = run(ProgramSpace(TASK).first(), tmp_path)
    assert [row["id"] for row in rows] == list(right)
    assert {row["id"]: row["label"] for row in rows} == right


@pytest.mark.parametrize("classifier", Classifier)
def test_every_classifier_labels_every_row(
    classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for balanced in (False, True):
        recipe = ProgramRecipe(classifier=classifier, balanced=balanced, strength=4.0).canonical()
        place = tmp_path / str(balanced)
        place.mkdir()
        right = write_dataset(place / "data")
        arguments = ["agent.py", "--dataset_dir", str(place / "data"), "--working_dir", str(place / "out")]
        monkeypatch.setattr(sys, "argv", arguments)
        source = render_program(recipe, TASK).files["agent.py"]
        exec(compile(source, "agent.py", "exec"), {"__name__": "__main__"})
        with open(place / "out" / "submission.csv", encoding="utf-8", newline="") as file:
            said = {row["id"]: row["label"] for row in csv.DictReader(file)}
        assert list(said) == list(right)
        assert sum(said[i] == right[i] for i in right) >= len(right) - 2


def points(count: int) -> Sequence[ProgramRecipe]:
    space, draw = ProgramSpace(TASK), random.Random(3)
    return [space.build({axis: draw.choice(values) for axis, values in space.axes.items()}) for _ in range(count)]


def test_any_point_of_the_space_renders_a_program_with_its_imports() -> None:
    seen: dict[str, ProgramRecipe] = {}
    for point in points(300):
        assert point.canonical() == point
        draft = render_program(point, TASK)
        source = draft.files["agent.py"]
        tree = ast.parse(source)
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
        assert imported <= used
        assert {"TFIDF", "TRUNCATE"} <= used
        assert draft.recipe == point.model_dump(mode="json")
        assert draft.note in source.replace("\n", " ")
        assert seen.setdefault(source, point) == point


def test_the_space_covers_what_it_names() -> None:
    axes = ProgramSpace(TASK).axes
    assert set(axes["classifier"]) == {c.value for c in Classifier}
    assert set(axes["analyzer"]) == {a.value for a in Analyzer}
    assert set(axes) == set(ProgramRecipe.model_fields) - {"kind"}


def test_a_strong_classifier_is_among_the_first_two_tried() -> None:
    first_two = ProgramSpace(TASK).openings()[:2]
    assert Classifier.LINEAR_SVC in {recipe.classifier for recipe in first_two}
    assert ProgramSpace(TASK).first() not in first_two
