"""The first Scaffold: plain, sensible, and the same for every seed."""

from __future__ import annotations

import pytest

from agents.decision import MetaAgent
from agents.meta_agent import OfflineMetaAgent
from agents.recipes import parse_recipe, space_for
from tasks.contract import AnswerKind, Example, Problem, Split, TaskKind, TaskSpec


def make_task(kind: TaskKind, answer: AnswerKind) -> TaskSpec:
    return TaskSpec(
        name="t",
        title="Colours of things",
        kind=kind,
        answer=answer,
        dev_block=10,
        sizes={Split.TRAIN: 10, Split.DEV: 10, Split.TEST: 10},
        text="# Colours\n\nName the colour of the thing.",
    )


@pytest.mark.parametrize("answer", AnswerKind)
def test_a_solve_task_gets_its_own_sentence_and_no_example(answer: AnswerKind) -> None:
    examples = [Example(Problem(str(i), f"thing {i}"), f"colour {i}") for i in range(80)]
    agent: MetaAgent = OfflineMetaAgent()
    task = make_task(TaskKind.SOLVE, answer)
    draft = agent.first_scaffold(task, examples, seed=1)
    source = draft.files["agent.py"]
    assert "Name the colour of the thing. Reply with" in source
    assert "EXAMPLES = []" in source
    assert "thing 1" not in source
    assert parse_recipe(draft.recipe) == space_for(task).first()
    assert agent.first_scaffold(task, examples, seed=2) == draft


def test_a_program_task_gets_a_program() -> None:
    draft = OfflineMetaAgent().first_scaffold(make_task(TaskKind.PROGRAM, AnswerKind.LABEL), [], seed=1)
    assert "--dataset_dir" in draft.files["agent.py"]
    assert "submission.csv" in draft.files["agent.py"]
